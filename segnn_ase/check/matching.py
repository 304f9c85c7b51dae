"""Structures that are the same or nearly so: in the same order, permuted, shifted, rotated or mirrored.

A fingerprint holds, for each element and each element of the neighbours, the distances to the nearest of them, in
ascending order over the atoms. It changes by no more than the structure does: close structures have close ones.
"""

from typing import NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.check.pairs import CUTOFF, Pairs
from segnn_ase.structure.told import Told, same_told

NEAR = 0.05  # Å, rms of the components of the atoms' displacements
SAME = 1e-3  # Å, likewise, of structures that count as equal
SAME_ENERGY = 2e-5  # eV/atom
SAME_TOLD = 1e-4  # of charges, moments and fields, relative and in their units
CANDIDATES = 3  # nearest fingerprints that are looked at
RELATIVES = 8  # likewise, where all copies of a set are wanted
BLOCK = 1000  # rows of a distance matrix at a time


class Match(NamedTuple):
    """A structure and the nearest other one."""

    first: int
    second: int
    distance: float  # rms difference of the fingerprints, Å
    kind: str  # exact, symmetry, near, or "" for neither
    typical: float  # median distance to all of this composition, Å


def groups_of(structures: list[Atoms]) -> dict[tuple, list[int]]:
    """Indices of the structures with the same numbers of each element and the same periodicity."""
    groups: dict[tuple, list[int]] = {}
    for n, atoms in enumerate(structures):
        groups.setdefault((*np.sort(atoms.numbers).tolist(), *atoms.pbc.tolist()), []).append(n)
    return groups


def fingerprints(structures: list[Atoms], pairs: Pairs) -> np.ndarray:
    """Sorted distances, Å, (n, D), of structures of one group; what is farther than the cutoff counts as there."""
    numbers = np.sort(structures[0].numbers)
    species = np.unique(numbers)
    nearest = max(4, 16 // len(species))
    r = np.linalg.norm(pairs.vectors, axis=1)
    shell = pairs.i * len(species) + np.searchsorted(species, pairs.numbers[pairs.j])
    order = np.lexsort((r, shell))
    counts = np.bincount(shell, minlength=len(pairs.numbers) * len(species))
    rank = np.arange(len(r)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), nearest), CUTOFF)
    kept = rank < nearest
    table[shell[order][kept], rank[kept]] = r[order][kept]
    table = table.reshape(len(structures), len(numbers), -1)
    by_element = np.argsort([atoms.numbers for atoms in structures], axis=1, kind="stable")
    table = np.take_along_axis(table, by_element[:, :, None], axis=1)
    for z in species:
        table[:, numbers == z] = np.sort(table[:, numbers == z], axis=1)
    return table.reshape(len(structures), -1)


def nearest(
    a: np.ndarray, b: np.ndarray, *, skip_own: bool, most: int = CANDIDATES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row of a the nearest rows of b, (n, most), their rms differences, and the median to all of b.

    skip_own: a is b, and no row is its own neighbour.
    """
    middle = b.mean(0)
    x, y = (a - middle).astype("f4"), (b - middle).astype("f4")
    kept, found = min(most, len(b) - skip_own), []
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        square = (part**2).sum(1)[:, None] - 2 * part @ y.T + (y**2).sum(1)
        if skip_own:
            square[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        columns = np.argpartition(square, kept - 1, axis=1)[:, :kept]
        exact = ((a[start : start + BLOCK][:, None] - b[columns]) ** 2).mean(2)
        found.append((columns, exact, np.median(square, axis=1) / a.shape[1]))
    columns, exact, typical = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(exact, axis=1, kind="stable")
    columns, exact = (np.take_along_axis(values, order, axis=1) for values in (columns, exact))
    return columns, np.sqrt(exact), np.sqrt(np.maximum(typical, 0))


def displacement(a: Atoms, b: Atoms) -> float:
    """Rms component of displacements after shift and rotation, Å; infinite if the order of atoms is another."""
    if not np.array_equal(a.numbers, b.numbers):
        return np.inf
    (old, new), turn = frames_of(a, b), turn_onto(a, b)
    new = new @ turn
    if not a.pbc.any():
        return float(np.sqrt(((old - new) ** 2).mean()))
    shift = b.cell.scaled_positions(b.positions) - a.cell.scaled_positions(a.positions) if a.pbc.all() else None
    if shift is None:
        shift = np.linalg.solve(old.T, (b.positions - a.positions).T).T
    shift = shift - shift[0]
    shift[:, a.pbc] -= np.round(shift[:, a.pbc])
    moved = (shift - shift.mean(0)) @ ((old + new) / 2)
    strained = ((new - old)[a.pbc] ** 2).sum() / 12  # mean over the cell of the square of s (new - old), |s| < 1/2
    return float(np.sqrt((moved**2).mean() + strained / 3))


def frames_of(a: Atoms, b: Atoms) -> list[np.ndarray]:
    """What orients each of two structures, as rows, Å: the cell if there is one, or the positions about their mean."""
    if a.pbc.any():
        return [atoms.cell.complete().array for atoms in (a, b)]
    return [atoms.positions - atoms.positions.mean(0) for atoms in (a, b)]


def turn_onto(a: Atoms, b: Atoms) -> np.ndarray:
    """The rotation R, (3, 3), without a reflection, after which vectors of b, as rows v R, are oriented as those of a.

    The identity if they are already: a linear molecule determines no rotation about its axis.
    """
    x, y = frames_of(a, b)
    if np.sqrt(((x - y) ** 2).mean()) < SAME:
        return np.eye(3)
    u, _, v = np.linalg.svd(y.T @ x)
    u[:, -1] *= np.sign(np.linalg.det(u @ v))
    return u @ v


def compare(a: Atoms, b: Atoms, distance: float, same_energy: bool) -> str:
    """What two structures are to each other whose fingerprints differ by so much: exact, symmetry, near or ""."""
    if distance > 2 * NEAR:
        return ""
    moved = displacement(a, b)
    if moved < SAME:
        return "exact"
    if distance < SAME and same_energy and (a.pbc.any() or _all_distances(a, b) < SAME):
        return "symmetry"
    return "near" if moved < NEAR else ""


def _all_distances(a: Atoms, b: Atoms) -> float:
    x, y = (np.sort(atoms.get_all_distances(), axis=None) for atoms in (a, b))
    return float(np.sqrt(np.mean((x - y) ** 2)))


class Described(NamedTuple):
    """Structures with what they are compared by."""

    structures: list[Atoms]
    prints: list[np.ndarray]
    energies: np.ndarray  # eV/atom, NaN where unknown
    told: list[Told] | None = None  # charges, moments, fields: with others it is not the same structure


def matches(first: Described, second: Described) -> list[Match]:
    """For each structure of `first` the closest of `second`, if one of the same composition is there.

    Of several that are exactly it the first is taken, so that all copies are compared with the same one.
    With one and the same set for both no structure is its own match.
    """
    found, others = [], groups_of(second.structures)
    for key, mine in groups_of(first.structures).items():
        theirs = others.get(key, [])
        if len(theirs) < 1 + (first is second) or (len(key) == 4 and not any(key[1:])):
            continue
        b = np.array([second.prints[n] for n in theirs])
        a = np.array([first.prints[n] for n in mine])
        columns, distances, medians = nearest(a, b, skip_own=first is second)
        for row, n in enumerate(mine):
            candidates = [(theirs[c], float(d)) for c, d in zip(columns[row], distances[row], strict=True)]
            kinds = [_match_kind(first, n, second, m, distance) for m, distance in candidates]
            exact = [k for k, kind in enumerate(kinds) if kind == "exact"]
            best = next((k for k, kind in enumerate(kinds) if kind), 0)
            best = min(exact, key=lambda k: candidates[k][0]) if exact else best
            found.append(Match(n, *candidates[best], kinds[best], float(medians[row])))
    return found


def _match_kind(first: Described, n: int, second: Described, m: int, distance: float) -> str:
    if first.told and second.told and not same_told(first.told[n], second.told[m], SAME_TOLD):
        return ""
    same_energy = not abs(first.energies[n] - second.energies[m]) > SAME_ENERGY
    return compare(first.structures[n], second.structures[m], distance, same_energy)


def copies_among(own: Described) -> list[tuple[int, int, str]]:
    """Pairs of structures that are copies or nearly so, with their kind: of each structure the nearest `RELATIVES`."""
    kinds: dict[tuple[int, int], str] = {}
    for key, members in groups_of(own.structures).items():
        if len(members) < 2 or (len(key) == 4 and not any(key[1:])):
            continue
        prints = np.array([own.prints[n] for n in members])
        columns, distances, _ = nearest(prints, prints, skip_own=True, most=RELATIVES)
        for row, column in np.argwhere(distances < 2 * NEAR).tolist():
            n, m = sorted((members[row], members[columns[row, column]]))
            if (n, m) not in kinds:
                kinds[n, m] = _match_kind(own, n, own, m, float(distances[row, column]))
    return [(*pair, kind) for pair, kind in kinds.items() if kind]


def trajectories(structures: list[Atoms]) -> list[list[int]]:
    """Indices of structures of one composition whose consecutive ones are alike."""
    groups = groups_of(structures).values()
    return [members for members in groups if steps_are_alike([structures[n] for n in members])]


def steps_are_alike(structures: list[Atoms]) -> bool:
    """Are consecutive structures much closer than those five and half the list apart?"""
    if len(structures) < 20:
        return False
    lags = (1, 5, len(structures) // 2)
    near, *apart = (
        np.median([displacement(a, b) for a, b in zip(structures, structures[lag:], strict=False)]) for lag in lags
    )
    return bool(near < 0.6 * min(apart) < np.inf)
