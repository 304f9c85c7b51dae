"""What surrounded the atoms of training structures, and what is new about another one, in words: `model.newness`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor

from segnn_ase.model.fingerprints import (
    COMPONENTS,
    LMAX,
    MIXED,
    RADIAL,
    SPECTRUM,
    Fingerprints,
    coefficients,
    element_channels,
)
from segnn_ase.model.newness import (
    NEVER,
    Bonds,
    KnownSurroundings,
    Landmarks,
    Landscape,
    Newness,
    bonds_of,
    crowding_of,
)
from segnn_ase.structure.graph import Graph, edge_vectors, within
from segnn_ase.trust.landmarks import Seen, measure_landmarks, wider_of_few

FRAMES, ATOMS = 400, 40_000  # that landmarks are taken from
BIN, GAP = 0.01, 0.15  # Å, of a histogram of distances; a gap as wide tells bonds from other pairs
REACH = 1.8  # sums of covalent radii, within which the gap is
CROWDING = (0.25, 0.005)  # below, of the width of the range (more after few frames) and of the value


class Outside(NamedTuple):
    """One way in which a structure is outside, and the data that would help."""

    kind: str  # distance, neighbors, density, energy, virial, forces, features, bonds, surroundings, structure or thin
    reason: str
    help: str


def measure_surroundings(
    graphs: Sequence[Graph], species: Tensor, numbers: Sequence[int], cutoff: float, before: KnownSurroundings | None
) -> KnownSurroundings | None:
    """From training structures with neighbours; None where they are too few to say anything.

    species (119,): number of each element among the potential's, whose atomic numbers are `numbers`; before: of the
    potential that was fine-tuned, whose surroundings stay known.
    """
    graphs = [within(graph, cutoff) for graph in graphs]
    kinds = [species[graph.numbers].cpu() for graph in graphs]
    channels = element_channels(len(numbers)) if before is None else before.landscape.fingerprints.channels
    left, seen = ATOMS, []
    for n in np.random.default_rng(0).permutation(len(graphs))[:FRAMES].tolist():
        if left > 0 or len(seen) < 5:
            seen.append(Seen(kinds[n], coefficients(graphs[n], kinds[n], channels, cutoff)))
            left -= len(kinds[n])
    landscape = measure_landmarks(seen, len(numbers), before and before.landscape)
    if landscape is None:
        return None
    crowding = [float(crowding_of(graph, cutoff).mean()) for graph in graphs] + list(before.crowding if before else ())
    bonds = _measure_bonds(graphs, kinds, covalent_radii[list(numbers)], before and before.bonds)
    return KnownSurroundings(landscape, bonds, (min(crowding), max(crowding)))


def _measure_bonds(graphs: list[Graph], kinds: list[Tensor], radii: np.ndarray, before: Bonds | None) -> Bonds:
    n, reach = len(radii), REACH * (radii[:, None] + radii)
    bins = 1 + int(reach.max() / BIN)
    seen = np.zeros((n, n, bins), bool)
    for graph, kind in zip(graphs, kinds, strict=True):
        at = (edge_vectors(graph).norm(dim=1) / BIN).long().clamp_max(bins - 1)
        seen[kind[graph.edge_dst], kind[graph.edge_src], at] = True
    gaps = torch.zeros(n, n, 2, dtype=torch.float64)
    for a, b in np.ndindex(n, n):
        new = before is None or int(before.counts[[a, b], [a, b], 1].min()) < 0  # one of them was never seen
        known = None if new else before.gaps[a, b].tolist()
        gaps[a, b] = torch.tensor(_gap(np.flatnonzero(seen[a, b] | seen[b, a]) * BIN, reach[a, b], known))
    lengths = gaps.mean(2)
    counts = torch.tensor(NEVER).repeat(n, n, 1) if before is None else before.counts.clone()
    for graph, kind in zip(graphs, kinds, strict=True):
        bonds = bonds_of(graph, kind, lengths)
        for k in kind.unique().tolist():
            own = bonds[kind == k]
            counts[k] = torch.stack([counts[k, :, 0].minimum(own.amin(0)), counts[k, :, 1].maximum(own.amax(0))], 1)
    return Bonds(gaps, counts)


def _gap(distances: np.ndarray, reach: float, known: "list[float] | None") -> tuple[float, float]:
    """The ends of the widest gap in distances (ascending, in bins), within a gap that was known; zero without one."""
    d = distances[distances < reach]
    if known is not None:
        d = np.array([known[0], *d[(d > known[0]) & (d < known[1])], known[1]])
    widest = int(np.diff(d).argmax()) if len(d) > 1 else 0
    if len(d) < 2 or d[widest + 1] - d[widest] < GAP:
        return 0.0, 0.0
    return float(d[widest] + BIN), float(d[widest + 1])


class NoveltyCheck:
    """Compares what surrounds atoms with what did in training."""

    def __init__(self, known: KnownSurroundings, symbols: list[str], frames: int):
        """frames: of the training."""
        self.known, self._symbols = known, symbols
        self._bonds = known.bonds.limits().numpy()
        (low, high), wider = known.crowding, wider_of_few(frames) ** 2
        self.least_crowding = low - max(CROWDING[0] * wider * (high - low), CROWDING[1] * low)

    def knows(self, new: Newness) -> bool:
        """Whether nothing is new."""
        used = max(new.used(self.known.landscape.limits))
        return used <= 1.0 and new.crowding >= self.least_crowding and not new.broken

    def __call__(self, numbers: np.ndarray, kind: np.ndarray, new: Newness) -> list[Outside]:
        """Every way in which a structure of these atomic numbers (N,) and elements (N,) is new; empty for none."""
        used, found = new.used(self.known.landscape.limits), []
        if new.broken:
            fewest, most = self._bonds[kind].transpose(2, 0, 1)
            atom, other = np.argwhere((new.bonds < fewest) | (new.bonds > most))[0].tolist()
            found.append(self._bond(numbers, kind, new, atom, other))
        if not max(used[:2]) <= 1.0:
            found.append(self._atoms(numbers, new, used))
        if not used[2] <= 1.0:
            found.append(self._structure(new, used[2]))
        if not new.crowding >= self.least_crowding:
            found.append(self._thin(new.crowding))
        return found

    def _bond(self, numbers: np.ndarray, kind: np.ndarray, new: Newness, atom: int, other: int) -> Outside:
        low, high = self._bonds[kind[atom], other].tolist()
        length = float(self.known.bonds.lengths()[kind[atom], other])
        who, whom = f"{chemical_symbols[numbers[atom]]} {atom}", self._symbols[other]
        seen = f"{low}" if low == high else f"{low} to {high}"
        reason = f"{who} has {new.bonds[atom, other]} {whom} within {length:.2f} Å; in training it had {seen}"
        return Outside("bonds", reason, f"with bonds like those of {who}")

    def _atoms(self, numbers: np.ndarray, new: Newness, used: tuple[float, float, float]) -> Outside:
        atom = int(new.atoms.argmax())
        who = f"{chemical_symbols[numbers[atom]]} {atom}"
        if used[0] >= used[1]:
            reason = (
                f"the surroundings of {who} are new, {used[0]:.2f} times as far from known ones as is usual at most"
            )
        else:
            reason = (
                f"the surroundings of its atoms are new, on the mean {used[1]:.2f} times as far as is usual at most"
            )
        return Outside("surroundings", reason, f"with surroundings like those of {who}")

    def _structure(self, new: Newness, used: float) -> Outside:
        symbol = self._symbols[int(new.structure.argmax())]
        reason = (
            f"the mean surroundings of {symbol} are new, {used:.2f} times as far from those of known structures as is "
            "usual at most"
        )
        return Outside("structure", reason, "of such a phase, strain or temperature")

    def _thin(self, crowding: float) -> Outside:
        low, high = self.known.crowding
        reason = (
            f"the atoms have fewer neighbours, {crowding:.3g} smoothly counted; in training {low:.3g} to {high:.3g}"
        )
        return Outside("thin", reason, "of lower density, with cavities or surfaces")


def describe_surroundings(known: KnownSurroundings, symbols: list[str]) -> str:
    """In a few words, for `segnn info`."""
    lengths = known.bonds.lengths()
    bonds = [
        f"{a}-{b} {float(lengths[i, j]):.2f}"
        for i, a in enumerate(symbols)
        for j, b in enumerate(symbols)
        if j >= i and lengths[i, j] > 0
    ]
    told = f"; bonds up to {', '.join(bonds)} Å" if bonds else ""
    return f"surroundings like those of {known.landscape.atoms.widths.shape[1]} landmarks of each element{told}"


def surroundings_content(known: KnownSurroundings) -> dict[str, Any]:
    """Plain values and tensors, for a file."""
    place = known.landscape
    return {
        "fingerprints": place.fingerprints._asdict(),
        "atoms": place.atoms._asdict(),
        "structures": place.structures._asdict(),
        "fewest": place.fewest,
        "limits": list(place.limits),
        "bonds": known.bonds._asdict(),
        "crowding": list(known.crowding),
    }


def parse_surroundings(values: dict, n_species: int) -> KnownSurroundings:
    """What `surroundings_content` gave. Raises TypeError, ValueError, KeyError for what is none."""
    fingerprints = Fingerprints(**values["fingerprints"])
    atoms, structures = Landmarks(**values["atoms"]), Landmarks(**values["structures"])
    landscape = Landscape(fingerprints, atoms, structures, values["fewest"], tuple(map(float, values["limits"])))
    known = KnownSurroundings(landscape, Bonds(**values["bonds"]), tuple(map(float, values["crowding"])))
    _check_shapes(known, n_species)
    return known


def _check_shapes(known: KnownSurroundings, s: int) -> None:
    place, bonds = known.landscape, known.bonds
    f, width = place.fingerprints, len(element_channels(s).T) * RADIAL
    expected = {
        "channels": (f.channels, (s, width // RADIAL)),
        "mixing": (f.mixing, (s, LMAX + 1, width, MIXED)),
        "mean": (f.mean, (s, SPECTRUM)),
        "axes": (f.axes, (s, SPECTRUM, COMPONENTS)),
        "fewest": (place.fewest, (s,)),
        "gaps": (bonds.gaps, (s, s, 2)),
        "counts": (bonds.counts, (s, s, 2)),
    }
    for name, marks, width in (("atoms", place.atoms, 1), ("structures", place.structures, 2)):
        expected[f"{name} widths"] = marks.widths, (s, marks.widths.shape[1])
        expected[f"{name} points"] = marks.points, (s, marks.widths.shape[1], width * COMPONENTS)
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()) or 0 in shape:
            raise ValueError(f"{name} of the surroundings is {tuple(tensor.shape)}; expected {shape}, all finite")
    if len(place.limits) != 3 or len(known.crowding) != 2 or not np.isfinite([*place.limits, *known.crowding]).all():
        raise ValueError(f"limits {place.limits} and crowding {known.crowding} are not three and two numbers")
    if not bool((place.atoms.widths > 0).all() and (place.structures.widths > 0).all()):
        raise ValueError("widths of landmarks are not positive")
