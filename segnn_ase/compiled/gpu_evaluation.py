"""Evaluation of a potential on a GPU: the compiled network, without autograd in between."""

import copy
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.gpu import GpuPasses
from segnn_ase.compiled.gpu_newness import GpuNewness
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.newness import PlainNewness, chosen_newness
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.newness import KnownSurroundings, Newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, assemble, in_any_order, slopes_of, with_charges
from segnn_ase.model.readouts import columns_read
from segnn_ase.model.repulsion import core_of, pulled_back, repelled, seen_by_network
from segnn_ase.model.responses import in_field
from segnn_ase.structure.graph import Graph, edge_vectors


class GpuEvaluator(Evaluator):
    """What `CpuEvaluator` is on the CPU. No number is read back, so that it can be recorded; raises CompilerError."""

    name = "the network by Triton"

    def __init__(self, potential: Potential):
        self._dtype, self._cutoff = potential.dtype, potential.cutoff
        tables = radial_tables(potential)
        self._step, self._knots = tables.step, round(potential.cutoff / tables.step)
        plan = self._plan = evaluation(make_steps(potential, tables))
        self.passes = GpuPasses(plan.everything, plan.storage(), self._dtype, potential.device)
        self._lock = Lock()
        self._newness: GpuNewness | PlainNewness | None = None
        species = torch.arange(len(potential.species), device=potential.device)
        none = torch.zeros(0, dtype=torch.long, device=potential.device)
        vectors = torch.zeros(0, 3, dtype=self._dtype, device=potential.device)
        nothing = potential.no_cues(len(species))
        near = _compacted(none, none.bool(), len(species))
        lonely = self._network(species, vectors, none, near, None, nothing, None)
        self.elements = potential.elements(lonely.epsilon)
        self._responses, self._charges = copy.deepcopy(potential.responses), copy.deepcopy(potential.charges)

    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        if not bool((graph.edge_dst[1:] < graph.edge_dst[:-1]).any()):
            return self.of_sorted(graph, forces=forces, stress=stress, along=along)
        return in_any_order(self.of_sorted, graph, forces=forces, stress=stress, along=along)

    def newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        chosen = self.newness_of(graph, kind, known)
        return chosen and chosen(graph, kind)

    def newness_of(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> "GpuNewness | PlainNewness | None":
        """What measures newness; None where the pairs are not sorted by receiver."""
        if bool((graph.edge_dst[1:] < graph.edge_dst[:-1]).any()):
            return None
        if self._newness is None or self._newness.known is not known:
            make = partial(GpuNewness, device=kind.device)
            self._newness = chosen_newness(make, known, self._cutoff, graph, kind)
        return self._newness

    def of_sorted(
        self, graph: Graph, *, forces: bool, stress: bool, core: bool = True, along: Tensor | None = None
    ) -> Prediction:
        """Of a graph whose pairs are sorted by receiver. Without `core` it is right where the result's `close` is not:
        the core is a matter of few pairs, but which ones they are cannot be asked here."""
        kind, wanted, elements = self.elements.kinds(graph.numbers), forces or stress, self.elements
        vectors = edge_vectors(graph).detach()
        squares = vectors.square().sum(1)
        near = _compacted(graph.edge_dst, squares < self._cutoff**2, len(kind))
        close = (squares < elements.radii[kind[graph.edge_dst], kind[graph.edge_src]].square()).any()
        weight = elements.scale[kind].to(self._dtype) if wanted else None
        rounded = vectors.to(self._dtype)
        pairs = core_of(graph, kind, rounded, elements.core) if core else None
        with self._lock:
            seen, added = seen_by_network(rounded, pairs), None
            seeds = None if self._responses is None else self._responses.seeds(graph)
            if self._charges is not None:
                read = self._network(kind, seen, graph.edge_src, near, None, graph.cues, None).read
                added = self._charges.long_range(read, graph, derivatives=wanted)
                seeds = added.slope
            said = self._network(kind, seen, graph.edge_src, near, weight, graph.cues, seeds)
            slopes = None
            if along is not None and self._responses is not None:
                turned = self._responses.slopes(along, graph)
                nothing = torch.zeros_like(elements.scale[kind], dtype=self._dtype)
                slopes = self._network(kind, seen, graph.edge_src, near, nothing, graph.cues, turned).gradient
        energies, g = repelled(elements.energies(kind, said.epsilon), said.gradient, rounded, pairs)
        responses: dict = {}
        if self._responses is not None:
            of_field, told_of_it = in_field(graph, self._responses.of_atoms(kind, said.read))
            energies, responses = energies + of_field, told_of_it._asdict()
            if slopes is not None:
                responses["dipole_slopes"] = slopes_of(graph, pulled_back(slopes, rounded, pairs))
        found = assemble(graph, vectors, energies, g, said.features, forces=wanted, stress=stress)
        told = None if said.cue_gradients is None else said.cue_gradients.double()
        found = found._replace(neighbors=near.first.diff(), close=close, cue_gradients=told, **responses)
        return found if added is None else with_charges(found, added, graph)

    def _network(
        self,
        kind: Tensor,
        vectors: Tensor,
        src: Tensor,
        near: "_Near",
        weight: Tensor | None,
        cues: Tensor | None,
        seeds: Tensor | None,
    ) -> "_Outcome":
        """For r_ij = vectors (E, 3) and cues (N, width); weight (N,): of the epsilon in the sum whose gradients are
        taken, None for none, and seeds (N, 9), of what is read out besides."""
        at, place = self.passes.at, near.place
        self.passes.reserve({"node": len(kind), "edge": len(vectors), "pair": 0})
        there = at(self._plan.vectors).index_copy_(0, place, vectors)
        knot = (there.square().sum(1).sqrt() / self._step).long().clamp(0, self._knots - 1)
        edges = Topology(len(kind), near.first, torch.empty_like(src).index_copy_(0, place, src), knot=knot)
        if weight is not None:
            at(self._plan.weight)[:, 0] = weight
        if self._plan.cues is not None:
            at(self._plan.cues).copy_(cues)
        sizes = [place.array.size for place in self._plan.read_weight]
        for to, values in zip(map(at, self._plan.read_weight), columns_read(seeds, sizes), strict=True):
            to.copy_(values) if values is not None else to.zero_()
        nodes = edges._replace(knot=kind)
        self.passes.run(self._plan.energies if weight is None else self._plan.everything, nodes, edges)
        read = torch.cat([at(x) for x in self._plan.read], dim=1) if self._plan.read else None
        found = _Outcome(at(self._plan.epsilon)[:, 0].clone(), at(self._plan.features).clone(), read)
        if weight is None:
            return found
        g = at(self._plan.gradient)[place]
        told = None if self._plan.cue_gradient is None else at(self._plan.cue_gradient).clone()
        g = torch.where(near.within[:, None], g, 0.0)  # beyond the cutoff nothing has been written
        return found._replace(gradient=g, cue_gradients=told)


class _Outcome(NamedTuple):
    """What the network makes of N atoms with E pairs."""

    epsilon: Tensor  # (N,)
    features: Tensor  # (N, channels)
    read: Tensor | None  # (N, 9)
    gradient: Tensor | None = None  # (E, 3)
    cue_gradients: Tensor | None = None  # (N, width)


class _Near(NamedTuple):
    """Pairs within the cutoff before all others, in the same order."""

    within: Tensor  # (E,) which ones they are
    place: Tensor  # (E,) of each pair
    first: Tensor  # (N + 1,) place of each receiver's first


def _compacted(edge_dst: Tensor, within: Tensor, n_atoms: int) -> _Near:
    before = torch.nn.functional.pad(within.long().cumsum(0), (1, 0))  # how many of the pairs up to each are within
    rank = torch.arange(len(within), device=within.device)
    place = torch.where(within, before[:-1], before[-1] + rank - before[:-1])
    ends = torch.searchsorted(edge_dst, torch.arange(n_atoms + 1, device=within.device))
    return _Near(within, place, before[ends])
