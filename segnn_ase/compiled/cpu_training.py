"""The gradient of a loss on energies and forces in compiled code: all four passes of `passes.py`."""

import torch
from torch import Tensor

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.kernels import receiver_ranges
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import apart, dual_pass, gradient_pass, tangent_pass, value_pass
from segnn_ase.compiled.sorted_edges import first_edges
from segnn_ase.compiled.steps import NetworkSteps, Place, steps_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Loss, assemble
from segnn_ase.model.repulsion import core_of, repelled, seen_by_network
from segnn_ase.structure.graph import Graph, edge_vectors

EDGE_WORK = 128  # all passes over an edge; see `kernels.WORK_PER_THREAD`


class CpuLossGradient:
    """Puts the gradient of a loss into the parameters' `grad`, with the weights that they have at each call.

    Raises CompilerError.
    """

    name = "all passes in C"

    def __init__(self, potential: Potential):
        self._potential, self._dtype = potential, potential.dtype
        network = self._network = make_steps(potential)
        made = (value_pass, gradient_pass, tangent_pass, dual_pass)
        passes = dict(zip(("value", "gradient", "tangent", "dual"), (make(network) for make in made), strict=True))
        self._weights = {w: None for step in steps_of(passes["value"]) for w in step.weights()}
        sizes = [w.parameter.numel() for w in self._weights]
        self._size, behind = sum(sizes), 64  # what C reads and writes there is never used
        self._all_gradients = torch.zeros(torch.get_num_threads(), self._size + behind, dtype=self._dtype)
        self._gradient = dict(zip(self._weights, self._all_gradients[0, : self._size].split(sizes), strict=True))
        vectors = network.vectors, network.pair_vectors
        outside = [Place(role, x) for role in ("value", "gradient", "tangent") for x in vectors]
        storage = apart([*(s for p in passes.values() for s in p)], outside)
        self._passes = CpuPasses(passes, storage, self._dtype, self._gradient, self._size + behind)

    def __call__(self, graph: Graph, loss_of: Loss, *, forces: bool, stress: bool) -> Tensor:
        """See `model.predict.LossGradient`; the edges are sorted by receiver, else ValueError."""
        potential, network, passes = self._potential, self._network, self._passes
        if not bool((graph.edge_dst[1:] >= graph.edge_dst[:-1]).all()):
            raise ValueError("edges must be sorted by receiver")
        n, species = len(graph.numbers), len(potential.species)
        kind = torch.cat([potential.species_index[graph.numbers], torch.arange(species)])  # a lonely atom of each
        vectors = edge_vectors(graph).detach().to(self._dtype).contiguous()
        core = core_of(graph, kind[:n], vectors, potential.core)
        run = _Run(passes, network, graph, kind, len(self._all_gradients))
        passes.weights.load()
        run.put("value", seen_by_network(vectors, core))
        run("value")
        epsilon = self._at("value", network.epsilon)[: len(kind), 0].clone().requires_grad_()
        elements = potential.elements(epsilon[n:])
        weight = self._at("gradient", network.epsilon)
        weight[:n, 0], weight[n : len(kind)] = elements.scale[kind[:n]], 0
        run("gradient")
        g = run.gradient().requires_grad_()
        energies = elements.energies(kind[:n], epsilon[:n])
        energies, slopes = repelled(energies, g, vectors, core)
        prediction = assemble(graph, vectors, energies, slopes, None, forces=forces, stress=stress)
        loss = loss_of(prediction)
        slopes, direction = torch.autograd.grad(loss, [epsilon, g], materialize_grads=True)
        run.put("tangent", direction)
        run("tangent")
        self._all_gradients.zero_()
        self._at("dual", network.epsilon)[: len(kind), 0] = slopes
        run("dual")
        self._all_gradients[0] = self._all_gradients.sum(0)
        for w, gradient in self._gradient.items():
            if w.parameter.requires_grad:
                w.parameter.grad = gradient.view_as(w.parameter) * w.scale
        return loss.detach()

    def _at(self, role: str, array) -> Tensor:
        return self._passes.at(Place(role, array))


class _Run:
    """The passes on one graph, whose edges and pairs of atoms share vectors."""

    def __init__(self, passes: CpuPasses, network: NetworkSteps, graph: Graph, kind: Tensor, threads: int):
        self._passes, self._network = passes, network
        n, n_edges = len(kind), len(graph.edge_src)
        edge_pair = torch.arange(n_edges) if graph.edge_pair is None else graph.edge_pair
        self._chosen, pair = torch.unique(edge_pair, return_inverse=True)  # an edge of every pair
        self._counts = {"node": n, "pair": len(self._chosen), "edge": n_edges}
        links = [first_edges(graph.edge_dst, n), graph.edge_src, pair]
        self._links = pointers([*links, torch.empty_like(pair)]), pointers([*links, kind])
        self._cuts = receiver_ranges(links[0], n, n_edges, EDGE_WORK, threads)
        passes.reserve(self._counts, len(self._cuts) - 1)

    def __call__(self, name: str) -> None:
        self._passes.run(name, self._counts, self._cuts, *self._links)

    def _vectors(self, role: str) -> tuple[Tensor, Tensor]:
        network, at = self._network, self._passes.at
        of_edges, of_pairs = (at(Place(role, x)) for x in (network.vectors, network.pair_vectors))
        return of_edges[: self._counts["edge"]], of_pairs[: self._counts["pair"]]

    def put(self, role: str, vectors: Tensor) -> None:
        of_edges, of_pairs = self._vectors(role)
        of_edges[:] = vectors
        of_pairs[:] = vectors[self._chosen]

    def gradient(self) -> Tensor:
        """With respect to the vectors of the edges, as the pass left it: (E, 3)."""
        of_edges, of_pairs = self._vectors("gradient")
        return of_edges.index_add(0, self._chosen, of_pairs)
