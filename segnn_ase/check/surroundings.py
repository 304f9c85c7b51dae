"""One pass over all frames: what the checks need of the neighbours of every atom, which are searched once a frame."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic, minkowski_reduce

from segnn_ase.check.linear_model import Features, concatenated, features_of
from segnn_ase.check.matching import fingerprints, groups_of
from segnn_ase.check.pairs import Pairs, merge_pairs, pairs_of

DETACHED = 4.0, 2.5  # an atom is, without a neighbour within as many Å and as many sums of covalent radii
TINY, COLLISION = 4, 0.75  # atoms, and sums of covalent radii: see `ordinary`
CHUNK = 400  # atoms; temporary arrays stay small
DRAWN = 20_000  # atoms whose distances a figure shows


class Surroundings(NamedTuple):
    """What the neighbours of the atoms of one frame tell."""

    shortest: float  # the smallest distance over the sum of the two covalent radii, or infinity
    detached: np.ndarray  # (N,) whether an atom is farther from all others and all images than both limits
    fingerprint: np.ndarray  # see `matching.py`, Å


class Survey(NamedTuple):
    around: list[Surroundings]  # of every frame
    features: Features | None  # of the frames for which they were asked for
    drawn: Pairs  # of every so many frames


def survey(structures: list[Atoms], judged: Collection[int] = (), species: "list[int] | None" = None) -> Survey:
    """Go through all structures; features, with these species, are made of those numbered `judged`."""
    around, features, drawn, judged = [], [], [], set(judged)
    ends = np.cumsum([len(atoms) for atoms in structures])
    every = max(1, -(-ends.max(initial=0) // DRAWN))
    for chunk in np.split(np.arange(len(ends)), np.flatnonzero(np.diff(ends // CHUNK)) + 1):
        pairs = {n: pairs_of(structures[n]) for n in chunk.tolist()}
        around += surroundings_of([structures[n] for n in pairs], list(pairs.values()))
        if chosen := [n for n in pairs if n in judged]:
            together = merge_pairs(pairs[n] for n in chosen)
            features.append(features_of([structures[n] for n in chosen], together, species))
        drawn += [pairs[n] for n in pairs if n % every == 0]
    return Survey(around, concatenated(features) if features else None, merge_pairs(drawn))


def surroundings_of(structures: list[Atoms], pairs: list[Pairs]) -> list[Surroundings]:
    prints = [np.zeros(0)] * len(structures)
    for members in groups_of(structures).values():
        rows = fingerprints([structures[n] for n in members], merge_pairs(pairs[n] for n in members))
        for n, row in zip(members, rows, strict=True):
            prints[n] = row
    found = zip(structures, pairs, prints, strict=True)
    return [Surroundings(shortest_distance(p), detached_atoms(atoms, p), row) for atoms, p, row in found]


def shortest_distance(pairs: Pairs) -> float:
    """The smallest distance over the sum of the two covalent radii, or infinity."""
    r, radii = np.linalg.norm(pairs.vectors, axis=1), covalent_radii[pairs.numbers]
    return float((r / (radii[pairs.i] + radii[pairs.j])).min(initial=np.inf))


def ordinary(structures: list[Atoms], shortest: Collection[float]) -> np.ndarray:
    """Which structures, (n,), are neither pairs and threes of atoms beside larger ones, nor have atoms so close as
    collisions have: what dissociates or collides has sound labels that nothing else lets one expect."""
    sizes, close = np.array([len(atoms) for atoms in structures]), np.array(shortest) < COLLISION
    tiny = (sizes < TINY) & (np.median(sizes) >= 2 * TINY if len(sizes) else False)
    return ~(tiny | close)


def detached_atoms(atoms: Atoms, pairs: Pairs) -> np.ndarray:
    """Which atoms, (N,), are farther from all others and all images than both limits; never the only one."""
    near = pairs.i[np.linalg.norm(pairs.vectors, axis=1) < DETACHED[0]]
    alone = (np.bincount(near, minlength=len(atoms)) == 0) & (len(atoms) > 1)
    for n in np.flatnonzero(alone):
        alone[n] = not reaches_another(atoms, n)
    return alone


def reaches_another(atoms: Atoms, n: int) -> bool:
    """Is another atom, or an image, within so many sums of covalent radii of atom n?"""
    reach = DETACHED[1] * covalent_radii[atoms.numbers]
    own = np.linalg.norm(minkowski_reduce(periodic_vectors(atoms), atoms.pbc)[0][atoms.pbc], axis=1)
    others = np.delete(reach, n)
    return bool((distances_from(atoms, n) < reach[n] + others).any() or (own < 2 * reach[n]).any())


def distances_from(atoms: Atoms, n: int) -> np.ndarray:
    """Distances of atom n from the nearest images of all others, (N - 1,) Å."""
    return find_mic(np.delete(atoms.positions, n, 0) - atoms.positions[n], periodic_vectors(atoms), atoms.pbc)[1]


def periodic_vectors(atoms: Atoms) -> np.ndarray:
    """The cell without its other vectors: where these are oblique, ASE does not find the nearest images."""
    return atoms.cell.array * atoms.pbc[:, None]
