"""The gradient of a loss on energies and forces by all four passes of `passes.py`, forward over reverse."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import apart, dual_pass, gradient_pass, tangent_pass, value_pass
from segnn_ase.compiled.sorted_edges import first_edges
from segnn_ase.compiled.steps import Array, Place, Segment, Weight, steps_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Loss, assemble
from segnn_ase.model.repulsion import core_of, repelled, seen_by_network
from segnn_ase.structure.graph import Graph, edge_vectors

PASSES = {"value": value_pass, "gradient": gradient_pass, "tangent": tangent_pass, "dual": dual_pass}


class TrainingLinks(NamedTuple):
    """What the passes read of a graph besides vectors."""

    counts: dict[str, int]  # of nodes, pairs and edges
    first: Tensor  # (N + 1,), as src and pair see `kernels.Topology`
    src: Tensor
    pair: Tensor
    kind: Tensor  # (N,)


class CompiledLossGradient(ABC):
    """Puts the gradient of a loss into the parameters' `grad`, with the weights that they have at each call.

    Raises CompilerError.
    """

    def __init__(self, potential: Potential):
        self._potential, self._dtype = potential, potential.dtype
        network = self._network = make_steps(potential)
        passes = {name: make(network) for name, make in PASSES.items()}
        weights = dict.fromkeys(w for step in steps_of(passes["value"]) for w in step.weights())
        vectors = network.vectors, network.pair_vectors
        outside = [Place(role, x) for role in ("value", "gradient", "tangent") for x in vectors]
        everything = [segment for segments in passes.values() for segment in segments]
        self._make(passes, list(weights), apart(everything, outside))

    @abstractmethod
    def _make(self, passes: dict[str, list[Segment]], weights: list[Weight], storage: dict) -> None: ...

    @abstractmethod
    def _start(self, links: TrainingLinks) -> None:
        """Make room, and take the present weights."""

    @abstractmethod
    def _run(self, name: str, links: TrainingLinks) -> None:
        """One of the passes."""

    @abstractmethod
    def _at(self, role: str, array: Array) -> Tensor:
        """Where an array lies, (rows, size), of which as many are used as were asked for. More atoms than there are
        count for nothing, as the weight of their epsilon is 0, nor do more pairs."""

    @abstractmethod
    def _gradients(self) -> Iterable[tuple[Weight, Tensor]]:
        """Of all weights, after the last pass."""

    def __call__(self, graph: Graph, loss_of: Loss, *, forces: bool, stress: bool) -> Tensor:
        """See `model.predict.LossGradient`; the edges are sorted by receiver, else ValueError."""
        potential, epsilon_of = self._potential, self._network.epsilon
        if not bool((graph.edge_dst[1:] >= graph.edge_dst[:-1]).all()):
            raise ValueError("edges must be sorted by receiver")
        n, species = len(graph.numbers), torch.arange(len(potential.species), device=graph.numbers.device)
        kind = torch.cat([potential.species_index[graph.numbers], species])  # a lonely atom of each
        vectors = edge_vectors(graph).detach().to(self._dtype).contiguous()
        core = core_of(graph, kind[:n], vectors, potential.core)
        chosen, links = _links(graph, kind)
        self._start(links)
        self._put("value", seen_by_network(vectors, core), chosen)
        self._tell("value", graph.cues)
        self._run("value", links)
        epsilon = self._at("value", epsilon_of)[: len(kind), 0].clone().requires_grad_()
        elements = potential.elements(epsilon[n:])
        weight = self._at("gradient", epsilon_of)
        weight[:n, 0], weight[n:] = elements.scale[kind[:n]], 0
        self._run("gradient", links)
        g = self._gradient_of_vectors(len(vectors), chosen).requires_grad_()
        energies = elements.energies(kind[:n], epsilon[:n])
        energies, slopes = repelled(energies, g, vectors, core)
        told = self._gradient_of_cues(n)
        p = assemble(graph, vectors, energies, slopes, None, forces=forces, stress=stress)
        loss = loss_of(p._replace(cue_gradients=None if told is None else told.double()))
        inputs = [epsilon, g, *([] if told is None else [told])]
        slopes, direction, *turned = torch.autograd.grad(loss, inputs, materialize_grads=True)
        self._put("tangent", direction, chosen)
        self._tell("tangent", *turned)
        self._run("tangent", links)
        dual = self._at("dual", epsilon_of)
        dual[: len(kind), 0], dual[len(kind) :] = slopes, 0
        self._run("dual", links)
        self._hand_over()
        return loss.detach()

    def _hand_over(self) -> None:
        """The gradients to the parameters, of some of which rows are used apart."""
        parts: dict[Tensor, Tensor] = {}
        found = [(w, gradient.view_as(w.parameter)) for w, gradient in self._gradients() if w.whole.requires_grad]
        scaled = torch._foreach_mul([gradient for _, gradient in found], [w.scale for w, _ in found]) if found else []
        for (w, _), gradient in zip(found, scaled, strict=True):
            if w.rows is None:
                w.whole.grad = gradient
            else:
                parts.setdefault(w.whole, torch.zeros_like(w.whole))[w.rows] = gradient
        for parameter, total in parts.items():
            parameter.grad = total

    def _put(self, role: str, vectors: Tensor, chosen: Tensor) -> None:
        """The pairs of atoms share vectors with an edge of each."""
        for x, values in ((self._network.vectors, vectors), (self._network.pair_vectors, vectors[chosen])):
            self._at(role, x)[: len(values)] = values

    def _tell(self, role: str, cues: Tensor | None = None) -> None:
        """Cues of the atoms, or what belongs to them in another pass; of lonely ones, and of more, nothing is told."""
        if self._network.cues is not None and cues is not None:
            place = self._at(role, self._network.cues)
            place[: len(cues)], place[len(cues) :] = cues, 0

    def _gradient_of_cues(self, n: int) -> Tensor | None:
        cues = self._network.cues
        return None if cues is None else self._at("gradient", cues)[:n].clone().requires_grad_()

    def _gradient_of_vectors(self, n: int, chosen: Tensor) -> Tensor:
        """Of the edges, as the pass left it: (E, 3)."""
        of_edges, of_pairs = (self._at("gradient", x) for x in (self._network.vectors, self._network.pair_vectors))
        return of_edges[:n].index_add(0, chosen, of_pairs[: len(chosen)])


def _links(graph: Graph, kind: Tensor) -> tuple[Tensor, TrainingLinks]:
    """An edge of every pair, and what the passes read."""
    n, n_edges = len(kind), len(graph.edge_src)
    edge_pair = torch.arange(n_edges, device=kind.device) if graph.edge_pair is None else graph.edge_pair
    chosen, pair = torch.unique(edge_pair, return_inverse=True)
    counts = {"node": n, "pair": len(chosen), "edge": n_edges}
    return chosen, TrainingLinks(counts, first_edges(graph.edge_dst, n), graph.edge_src, pair, kind)
