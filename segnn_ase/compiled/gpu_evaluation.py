"""Evaluation of a potential on a GPU: the compiled network, without autograd in between."""

from threading import Lock

import torch
from torch import Tensor

from segnn_ase.compiled.gpu import GpuPasses
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.sorted_edges import first_edges
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, assemble
from segnn_ase.model.repulsion import core_of, repelled, seen_by_network
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
        species = torch.arange(len(potential.species), device=potential.device)
        none = torch.zeros(0, dtype=torch.long, device=potential.device)
        vectors = torch.zeros(0, 3, dtype=self._dtype, device=potential.device)
        self.elements = potential.elements(self._network(species, vectors, none, none, None)[0])

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        kind, wanted, elements = self.elements.kinds(graph.numbers), forces or stress, self.elements
        vectors = edge_vectors(graph).detach()
        squares = vectors.square().sum(1)
        neighbors = torch.zeros_like(kind).index_add(0, graph.edge_dst, (squares < self._cutoff**2).long())
        close = (squares < elements.radii[kind[graph.edge_dst], kind[graph.edge_src]].square()).any()
        weight = elements.scale[kind].to(self._dtype) if wanted else None
        rounded = vectors.to(self._dtype)
        core = core_of(graph, kind, rounded, elements.core)
        seen = seen_by_network(rounded, core)
        with self._lock:
            epsilon, features, g = self._network(kind, seen, graph.edge_src, graph.edge_dst, weight)
        energies, g = repelled(elements.energies(kind, epsilon), g, rounded, core)
        found = assemble(graph, vectors, energies, g, features, forces=forces or stress, stress=stress)
        return found._replace(neighbors=neighbors, close=close)

    def _network(self, kind: Tensor, vectors: Tensor, src: Tensor, dst: Tensor, weight: Tensor | None):
        """epsilon (N,), invariant features (N, channels), and the gradient of sum_i weight_i epsilon_i with respect to
        r_ij = vectors (E, 3), or None without a weight. Pairs may lie beyond the cutoff: they do nothing."""
        n, at = len(kind), self.passes.at
        self.passes.reserve({"node": n, "edge": len(vectors), "pair": 0})
        squares = vectors.square().sum(1)
        near = squares < self._cutoff**2
        order = torch.argsort(torch.where(near, dst, n), stable=True)  # by receiver; those beyond the cutoff last
        knot = (squares[order].sqrt() / self._step).long().clamp(0, self._knots - 1)
        edges = Topology(n, first_edges(dst, n, near.long()), src[order], knot=knot)
        at(self._plan.vectors).copy_(vectors[order])
        if weight is not None:
            at(self._plan.weight)[:, 0] = weight
        nodes = edges._replace(knot=kind)
        self.passes.run(self._plan.energies if weight is None else self._plan.everything, nodes, edges)
        found = at(self._plan.epsilon)[:, 0].clone(), at(self._plan.features).clone()
        if weight is None:
            return *found, None
        g = torch.empty_like(at(self._plan.gradient)).index_copy(0, order, at(self._plan.gradient))
        return *found, torch.where(near[:, None], g, 0.0)  # of those beyond the cutoff nothing has been written
