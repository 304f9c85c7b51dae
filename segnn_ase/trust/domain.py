"""Where a potential may be trusted: what its training structures covered, compared with every structure that it meets.

Beyond the data a network's energy is whatever comes out. The domain holds for each pair of elements the shortest
distance, for each element the numbers of neighbours, and the ranges of density, binding energy, force and leverage
(`uncertainty.py`) over the training structures, and what surrounded their atoms (`novelty.py`). Outside is what exceeds
them by more than a margin, so that ordinary dynamics at the conditions of the data stays inside.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase.data import atomic_masses, chemical_symbols
from torch import Tensor

from segnn_ase.model.newness import KnownSurroundings, Newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Prediction
from segnn_ase.structure.graph import Graph, edge_vectors
from segnn_ase.trust.cue_ranges import beyond_ranges, both_ranges, cue_ranges
from segnn_ase.trust.landmarks import wider_of_few
from segnn_ase.trust.novelty import (
    NoveltyCheck,
    Outside,
    describe_surroundings,
    measure_surroundings,
    parse_surroundings,
    surroundings_content,
)

NEIGHBORS = (2, 0.1)  # more or fewer than seen: so many, and this part of the most
DENSITY = 0.1  # of the value
COLD = (0.15, 1.0)  # below the binding energies: eV/atom, and of the width of their range; relaxed is colder than all
HOT = 0.02, 0.25  # above them, likewise; the width counts more after few frames
VIRIAL = 0.1, 0.25  # on either side, likewise
FORCE = LEVERAGE = 1.5  # times the largest, more after few frames
DISTANCE = 0.9  # times the shortest; the core repulsion begins a little above


class Domain(NamedTuple):
    """What the training structures covered; species in the order of the potential."""

    lone_atoms: bool  # whether E0 are energies of lone atoms, not a fit
    frames: int
    closest: Tensor  # (S, S) Å, infinite for pairs that never met within the cutoff
    neighbors: Tensor  # (S, 2) fewest and most within the cutoff; the fewest exceeds the most for one never seen
    density: tuple[float, float] | None  # amu/Å^3, of structures periodic in three directions
    binding: tuple[float, float]  # (E - sum E0) / N, eV
    max_force: float  # eV/Å
    max_leverage: float
    virial: tuple[float, float] | None = None  # sum of r dE/dr over the pairs / N, eV
    fewest_atoms: int = 1
    surroundings: KnownSurroundings | None = None
    cues: Tensor | None = None  # (cues, 2) smallest and largest of each, in its unit


class Covered(NamedTuple):
    """One training structure as the potential sees it."""

    graph: Graph
    prediction: Prediction
    volume: float | None  # Å^3, where it is periodic in three directions
    leverage: Tensor  # (N,)


def measure_domain(
    potential: Potential,
    frames: Sequence[Covered],
    closest: dict[tuple[int, int], float],
    *,
    lone_atoms: bool,
    before: Domain | None = None,
) -> Domain | None:
    """The domain of training structures with neighbours, None without any.

    closest: Å by pairs of atomic numbers, see `Potential.set_core`; lone_atoms: where E0 are those of lone atoms,
    these are inside; before: of the potential that was fine-tuned, whose domain is a part of this one.
    """
    frames = [c for c in frames if len(c.graph.edge_src)]
    if not frames:
        return before
    n = len(potential.species)
    distances = torch.full((n, n), math.inf, dtype=torch.float64)
    for (a, b), d in closest.items():
        i, j = potential.species.index(a), potential.species.index(b)
        distances[i, j] = distances[j, i] = d
    kinds = torch.cat([potential.species_index[c.graph.numbers].cpu() for c in frames])
    counts = torch.cat([neighbor_counts(c.graph, potential.cutoff).cpu() for c in frames])
    seen = torch.tensor([[1, 0]]).repeat(n, 1)
    for k in range(n):
        if (kinds == k).any():
            seen[k] = torch.stack([counts[kinds == k].min(), counts[kinds == k].max()])
    densities = [density_of(c.graph.numbers.cpu().numpy(), c.volume) for c in frames if c.volume is not None]
    binding = [binding_energy(potential, c.graph.numbers, c.prediction) for c in frames]
    virials = [v for c in frames if (v := virial_of(c.graph, c.prediction, c.volume)) is not None]
    found = Domain(
        lone_atoms=lone_atoms,
        frames=len(frames),
        closest=distances,
        neighbors=seen,
        density=(min(densities), max(densities)) if densities else None,
        binding=(min(binding), max(binding)),
        max_force=max(float(c.prediction.forces.abs().max()) for c in frames),
        max_leverage=max(float(c.leverage.max()) for c in frames),
        virial=(min(virials), max(virials)) if virials else None,
        fewest_atoms=min(len(c.graph.numbers) for c in frames),
        surroundings=_surroundings(potential, [c.graph for c in frames], before),
        cues=cue_ranges([c.graph for c in frames], potential.config.cues) if potential.config.cues else None,
    )
    return found if before is None else merged(found, before)


def _surroundings(potential: Potential, graphs: list[Graph], before: Domain | None) -> KnownSurroundings | None:
    if before is not None and before.surroundings is None:
        return None  # what it was trained on would be called new
    known = before and before.surroundings
    return measure_surroundings(graphs, potential.species_index, potential.species, potential.cutoff, known)


def merged(new: Domain, old: Domain) -> Domain:
    """What both cover, for a potential that was fine-tuned; the new one knows the old one's surroundings and E0."""

    def both(a, b):
        return a or b if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))

    lowest, most = (torch.stack([new.neighbors, old.neighbors]).unbind(-1)[k] for k in (0, 1))
    unseen = lowest > most  # must not count as having had 0 neighbours
    lowest = lowest.masked_fill(unseen, 2**30).amin(0)
    most = most.masked_fill(unseen, -1).amax(0)
    gone = unseen.all(0)
    return Domain(
        lone_atoms=new.lone_atoms,
        frames=new.frames + old.frames,
        closest=torch.minimum(new.closest, old.closest),
        neighbors=torch.stack([lowest.masked_fill(gone, 1), most.masked_fill(gone, 0)], 1),
        density=both(new.density, old.density),
        binding=new.binding if new.lone_atoms > old.lone_atoms else both(new.binding, old.binding),  # of other E0
        max_force=max(new.max_force, old.max_force),
        max_leverage=max(new.max_leverage, old.max_leverage),
        virial=new.virial and old.virial and both(new.virial, old.virial),
        fewest_atoms=min(new.fewest_atoms, old.fewest_atoms),
        surroundings=new.surroundings,
        cues=both_ranges(new.cues, old.cues),
    )


def neighbor_counts(graph: Graph, cutoff: float) -> Tensor:
    """Atoms within the cutoff of each, (N,)."""
    near = edge_vectors(graph).square().sum(1) < cutoff**2
    return torch.zeros_like(graph.numbers).index_add(0, graph.edge_dst, near.long())


def binding_energy(potential: Potential, numbers: Tensor, p: Prediction) -> float:
    """(E - sum E0) / N, eV."""
    references = [potential.reference_energies[k] for k in potential.species_index[numbers].tolist()]
    return (float(p.energy.sum()) - math.fsum(references)) / len(references)


def virial_of(graph: Graph, p: Prediction, volume: float | None) -> float | None:
    """sum of r dE/dr / N, eV, of one structure; None where neither stress nor, without a cell, forces are there.

    volume: Å^3 where it is periodic in three directions.
    """
    if p.stress is not None and volume is not None:
        return float(np.trace(p.stress[0].cpu().numpy())) * volume / len(graph.numbers)
    if p.forces is None or volume is not None or bool(graph.edge_shift.any()):
        return None
    return -float(np.vdot(graph.positions.cpu().numpy(), p.forces.cpu().numpy())) / len(graph.numbers)


def density_of(numbers: np.ndarray, volume: float) -> float:
    """Mass per volume, amu/Å^3."""
    return float(atomic_masses[numbers].sum() / volume)


class Limits(NamedTuple):
    """What a structure of certain atoms must keep to."""

    neighbors: np.ndarray  # (2, N) float64, fewest and most
    energy: tuple[float, float]  # eV
    volume: float  # Å^3, the smallest
    virial: tuple[float, float]  # eV/atom
    force: float  # eV/Å
    leverage: float


def _widened(virial: tuple[float, float] | None, scatter: float, wider: float) -> tuple[float, float]:
    if virial is None:
        return -math.inf, math.inf
    width = virial[1] - virial[0]
    margin = VIRIAL[0] + (VIRIAL[1] * wider**2 + 0.5 * (scatter - 1.0)) * width
    return virial[0] - margin, virial[1] + margin


class DomainCheck:
    """Compares structures with a potential's domain, at the cost of a few passes over their atoms."""

    def __init__(self, potential: Potential):
        self.potential, self.domain = potential, potential.domain
        lowest, most = self.domain.neighbors.double().numpy().T
        slack = np.maximum(NEIGHBORS[0], NEIGHBORS[1] * most)
        self._neighbor_limits = np.stack([lowest - slack, np.where(lowest > most, -1.0, most + slack)])
        self._index = potential.species_index.cpu().numpy()
        self._references = np.array(potential.reference_energies)
        known = self.domain.surroundings
        self.novelty = known and NoveltyCheck(known, potential.symbols, self.domain.frames)
        self._last: tuple[Tensor, Limits] | None = None  # limits of what was met last

    def limits(self, numbers: Tensor) -> Limits:
        """The limits of atoms with these atomic numbers (N,); the same for the same tensor."""
        last = self._last
        if last is None or last[0] is not numbers:
            domain, n = self.domain, numbers.cpu().numpy()
            kind, (low, high) = self._index[n], domain.binding
            reference, width = float(self._references[kind].sum()), high - low
            scatter = max(1.0, domain.fewest_atoms / len(n)) ** 0.5  # means of fewer atoms scatter more
            wider = wider_of_few(domain.frames)
            most = math.inf if domain.density is None else (1 + DENSITY) * domain.density[1]
            limits = Limits(
                neighbors=np.ascontiguousarray(self._neighbor_limits[:, kind]),
                energy=(
                    reference + len(n) * (low - COLD[0] - COLD[1] * width * scatter),
                    reference + len(n) * (high + HOT[0] + (HOT[1] * wider**2 + 0.5 * (scatter - 1.0)) * width),
                ),
                volume=density_of(n, most),
                virial=_widened(domain.virial, scatter, wider),
                force=FORCE * wider * domain.max_force,
                leverage=LEVERAGE * wider * domain.max_leverage,
            )
            last = self._last = (numbers, limits)
        return last[1]

    def __call__(
        self, graph: Graph, p: Prediction, new: Newness | None, *, volume: float | None, leverage: np.ndarray | None
    ) -> list[Outside]:
        """Every way in which one structure is outside; empty inside. new: of its surroundings, where these are known;
        volume: Å^3 where it is defined."""
        limits, numbers = self.limits(graph.numbers), graph.numbers.cpu().numpy()
        told = self.cues(graph)
        counts = neighbor_counts(graph, self.potential.cutoff) if p.neighbors is None else p.neighbors
        counts = counts.cpu().numpy()
        if self.domain.lone_atoms and not counts.any():
            return told  # such atoms have exactly their reference energies
        found = told
        if ((counts < limits.neighbors[0]) | (counts > limits.neighbors[1])).any():
            found.append(self._neighbors(numbers, counts, *limits.neighbors))
        if p.close or p.close is None:
            found += self._distance(graph)
        if volume is not None and volume < limits.volume:
            found.append(self._density(density_of(numbers, volume)))
        if not limits.energy[0] <= p.energy.item() <= limits.energy[1]:
            found.append(self._energy(binding_energy(self.potential, graph.numbers, p)))
        if p.forces is not None and not float(p.forces.abs().max()) <= limits.force:
            found.append(self._forces(numbers, p.forces))
        if (virial := virial_of(graph, p, volume)) is not None and not limits.virial[0] <= virial <= limits.virial[1]:
            found.append(self._virial(virial))
        if leverage is not None and not leverage.max() <= limits.leverage:
            found.append(self._leverage(numbers, leverage))
        new_ways = self.novelty(numbers, self._index[numbers], new) if self.novelty and new else []
        return found + new_ways

    def cues(self, graph: Graph) -> list[Outside]:
        """Which cue is beyond those in training."""
        cues = self.potential.config.cues
        if self.domain.cues is None or not cues:
            return []
        beyond = beyond_ranges(graph, cues, self.domain.cues)
        return [
            Outside(
                "cue",
                f"{b.name} is {b.here:.3g} here; in training it was {b.seen[0]:.3g} to {b.seen[1]:.3g}",
                f"with {b.name} of {b.here:.3g}",
            )
            for b in beyond
        ]

    def _neighbors(self, numbers, counts, fewest, most) -> Outside:
        atom = int(np.argmax(np.maximum(fewest - counts, counts - most)))
        lowest, highest = self.domain.neighbors[self._index[numbers[atom]]].tolist()
        who = f"{chemical_symbols[numbers[atom]]} {atom} has {counts[atom]} neighbours"
        if lowest > highest:
            return Outside("neighbors", f"{who}, but there was none of its element in training", "with it")
        crowded = counts[atom] > highest
        where = "denser structures or contacts" if crowded else "surfaces, clusters or single molecules"
        return Outside("neighbors", f"{who}; in training it had {lowest} to {highest}", f"of {where}")

    def _distance(self, graph: Graph) -> list[Outside]:
        kind = self.potential.species_index[graph.numbers]
        limits = DISTANCE * self.domain.closest.to(kind.device)
        limits = torch.where(limits.isinf(), self.potential.core_radii.double(), limits)
        ratio = edge_vectors(graph).norm(dim=1) / limits[kind[graph.edge_dst], kind[graph.edge_src]]
        if not len(ratio) or float(ratio.min()) >= 1.0:
            return []
        e = int(ratio.argmin())
        i, j = int(graph.edge_dst[e]), int(graph.edge_src[e])
        d, seen = float(edge_vectors(graph)[e].norm()), float(self.domain.closest[int(kind[i]), int(kind[j])])
        a, b = (chemical_symbols[int(graph.numbers[k])] for k in (i, j))
        before = "they never met in training" if math.isinf(seen) else f"the closest in training were {seen:.2f} Å"
        help = f"with {a}-{b} distances down to {d:.2f} Å, such as compressed cells or collisions"
        return [Outside("distance", f"{a} {i} and {b} {j} are {d:.2f} Å apart; {before}", help)]

    def _density(self, density: float) -> Outside:  # too low may be a vacuum in the cell: the neighbours tell
        low, high = self.domain.density
        reason = f"the density is {density:.4g} amu/Å^3; in training it was {low:.4g} to {high:.4g}"
        return Outside("density", reason, f"of cells compressed to {density:.2g} amu/Å^3")

    def _energy(self, binding: float) -> Outside:
        low, high = self.domain.binding
        reason = f"the energy is {binding:.3f} eV/atom from the sum of E0; in training {low:.3f} to {high:.3f}"
        where = (
            "of such structures, or hotter ones" if binding > high else "of this kind: so low an energy is hardly real"
        )
        return Outside("energy", reason, where)

    def _virial(self, virial: float) -> Outside:
        low, high = self.domain.virial
        reason = f"the virial is {virial:.3g} eV/atom; in training it was {low:.3g} to {high:.3g}"
        return Outside("virial", reason, "under such tension" if virial > high else "under such pressure")

    def _forces(self, numbers, forces: Tensor) -> Outside:
        each = forces.abs().amax(1).cpu().numpy()
        atom = int(each.argmax())
        who = f"{chemical_symbols[numbers[atom]]} {atom}"
        seen = self.domain.max_force
        reason = f"a force on {who} is {each[atom]:.3g} eV/Å; the largest in training was {seen:.3g}"
        return Outside("forces", reason, "at higher temperature or with shorter distances")

    def _leverage(self, numbers, leverage: np.ndarray) -> Outside:
        atom = int(leverage.argmax())
        who = f"{chemical_symbols[numbers[atom]]} {atom}"
        seen = self.domain.max_leverage
        reason = f"the surroundings of {who} are new: leverage {leverage[atom]:.3g}, in training at most {seen:.3g}"
        return Outside("features", reason, f"with surroundings like those of {who}")


def domain_content(domain: Domain) -> dict:
    """Plain values and tensors, for a file."""
    around = domain.surroundings
    return {**domain._asdict(), "surroundings": around and surroundings_content(around)}


def parse_domain(values: dict, n_species: int) -> Domain:
    """The domain of a file. Raises TypeError, ValueError for what is none."""
    around = values.get("surroundings")
    domain = Domain(**{**values, "surroundings": around and parse_surroundings(around, n_species)})
    density, virial = (None if pair is None else tuple(pair) for pair in (domain.density, domain.virial))
    domain = domain._replace(density=density, virial=virial, binding=tuple(domain.binding))  # lists in a file
    wrong = [domain.closest.shape != (n_species, n_species), domain.neighbors.shape != (n_species, 2)]
    ranges = [pair for pair in (density, virial, domain.binding) if pair is not None]
    wrong += [len(pair) != 2 or not all(map(math.isfinite, pair)) for pair in ranges]
    wrong += [not math.isfinite(x) for x in (domain.frames, domain.max_force, domain.max_leverage)]
    wrong += [domain.cues is not None and not (domain.cues.ndim == 2 and bool(domain.cues.isfinite().all()))]
    wrong.append(type(domain.fewest_atoms) is not int or domain.fewest_atoms < 1)
    if any(wrong):
        raise ValueError(f"domain of {n_species} species has other shapes, or numbers that are not finite")
    return domain


def describe_domain(domain: Domain, symbols: list[str]) -> str:
    """The domain in one line, for `segnn info`."""
    pairs = [
        f"{a}-{b} {float(domain.closest[i, j]):.2f}"
        for i, a in enumerate(symbols)
        for j, b in enumerate(symbols)
        if j >= i and not math.isinf(float(domain.closest[i, j]))
    ]
    counts = [f"{s} {lo}-{hi}" for s, (lo, hi) in zip(symbols, domain.neighbors.tolist(), strict=True) if lo <= hi]
    parts = [f"{domain.frames} frames", f"shortest distances {', '.join(pairs)} Å", f"neighbours {', '.join(counts)}"]
    if domain.density is not None:
        parts.append(f"density {domain.density[0]:.3g}-{domain.density[1]:.3g} amu/Å^3")
    parts.append(f"binding {domain.binding[0]:.3f} to {domain.binding[1]:.3f} eV/atom")
    parts.append(f"forces to {domain.max_force:.3g} eV/Å")
    if domain.cues is not None:
        parts.append(f"cues {', '.join(f'{low:.3g} to {high:.3g}' for low, high in domain.cues.tolist())}")
    if domain.surroundings is not None:
        parts.append(describe_surroundings(domain.surroundings, symbols))
    return "; ".join(parts)
