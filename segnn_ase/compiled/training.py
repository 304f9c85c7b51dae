"""The gradient of a loss on energies and forces by all four passes of `passes.py`, forward over reverse."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import apart, dual_pass, gradient_pass, tangent_pass, value_pass
from segnn_ase.compiled.sorted_edges import first_edges
from segnn_ase.compiled.steps import Array, Place, Segment, Weight, steps_of
from segnn_ase.model.electrostatics import LongRange
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Loss, Prediction, assemble, slopes_of, with_charges
from segnn_ase.model.readouts import columns_read
from segnn_ase.model.repulsion import core_of, pulled_back, repelled, seen_by_network
from segnn_ase.model.responses import ResponseReadout, in_field
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

    def __call__(
        self, graph: Graph, loss_of: Loss, *, forces: bool, stress: bool, along: Tensor | None = None
    ) -> Tensor:
        """See `model.predict.LossGradient`; the edges are sorted by receiver, else ValueError."""
        potential = self._potential
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
        epsilon = self._at("value", self._network.epsilon)[: len(kind), 0].clone().requires_grad_()
        elements, read = potential.elements(epsilon[n:]), self._read(n)
        responses = _Responses.of(potential, graph, kind[:n], along)
        turning = None if along is None else self._turning(responses, links, vectors, chosen)
        charged = self._long_range(graph, read)
        self._seed("gradient", elements.scale[kind[:n]], charged.slope.detach() if charged else responses.seeds)
        self._run("gradient", links)
        g = self._gradient_of_vectors(len(vectors), chosen).requires_grad_()
        energies = elements.energies(kind[:n], epsilon[:n])
        energies, slopes = repelled(energies, g, vectors, core)
        told = self._gradient_of_cues(n)
        p = responses.prediction(
            graph, energies, read, lambda e: assemble(graph, vectors, e, slopes, None, forces=forces, stress=stress)
        )
        p = p._replace(cue_gradients=None if told is None else told.double())
        p = with_charges(p, charged, graph) if charged else p
        turned = None if turning is None else slopes_of(graph, pulled_back(turning, vectors, core))
        loss = loss_of(p._replace(dipole_slopes=turned))
        leaves = {"epsilon": epsilon, "g": g, "told": told, "read": read, "turning": turning}
        leaves = {name: x for name, x in leaves.items() if x is not None}
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, retain_graph=bool(charged))
        slope = dict(zip(leaves, found, strict=True))
        self._back(links, chosen, slope["g"], slope.get("told"), slope["epsilon"], slope.get("read"), charged, read)
        gradients = [(w, gradient.clone()) for w, gradient in self._gradients()]
        if turning is not None:
            self._turning(responses, links, vectors, chosen)
            self._back(links, chosen, slope["turning"], None, torch.zeros_like(epsilon), None, None, None)
            for (_, total), (_, more) in zip(gradients, self._gradients(), strict=True):
                total += more
        self._hand_over(gradients)
        return loss.detach()

    def _turning(self, responses: "_Responses", links: TrainingLinks, vectors: Tensor, chosen: Tensor) -> Tensor:
        """Gradient of u . mu with respect to the vectors of the edges; what the passes hold is then of it."""
        self._seed("gradient", torch.zeros(()), responses.turned)
        self._run("gradient", links)
        return self._gradient_of_vectors(len(vectors), chosen).requires_grad_()

    def _seed(self, role: str, epsilon: Tensor, read: Tensor | None) -> None:
        """What a pass back begins with, at the energies and at what is read out besides, of the first atoms."""
        place = self._at(role, self._network.epsilon)
        place.zero_()
        place[: epsilon.numel() if epsilon.dim() else None, 0] = epsilon
        sizes = [x.size for x in self._network.read]
        for array, values in zip(self._network.read, columns_read(read, sizes), strict=True):
            place = self._at(role, array)
            place.zero_()
            if values is not None:
                place[: len(values)] = values

    def _back(
        self,
        links: TrainingLinks,
        chosen: Tensor,
        direction: Tensor,
        turned: Tensor | None,
        epsilon: Tensor,
        slope: Tensor | None,
        charged: LongRange | None,
        read: Tensor | None,
    ) -> None:
        """The passes behind that of the gradient: tangents of vectors and cues, and duals of what was said; that of
        the charges began with a slope which depends on what was read out itself."""
        self._put("tangent", direction, chosen)
        self._tell("tangent", direction.new_zeros(0) if turned is None else turned)
        self._run("tangent", links)
        if charged is not None:
            (moving,) = (self._at("tangent", x)[: len(read)] for x in self._network.read)
            slope = slope + torch.autograd.grad(charged.slope, read, moving.to(charged.slope))[0]
        self._seed("dual", epsilon, slope)
        self._run("dual", links)

    def _long_range(self, graph: Graph, read: Tensor | None) -> LongRange | None:
        if self._potential.charges is None or read is None:
            return None
        return self._potential.charges.differentiable(read, graph)

    def _read(self, n: int) -> Tensor | None:
        if not self._network.read:
            return None
        return torch.cat([self._at("value", x)[:n] for x in self._network.read], dim=1).requires_grad_()

    def _hand_over(self, gradients: list[tuple[Weight, Tensor]]) -> None:
        """The gradients to the parameters, of some of which rows are used apart."""
        parts: dict[Tensor, Tensor] = {}
        found = [(w, gradient.view_as(w.parameter)) for w, gradient in gradients if w.whole.requires_grad]
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
            place.zero_()
            if len(cues):
                place[: len(cues)] = cues

    def _gradient_of_cues(self, n: int) -> Tensor | None:
        cues = self._network.cues
        return None if cues is None else self._at("gradient", cues)[:n].clone().requires_grad_()

    def _gradient_of_vectors(self, n: int, chosen: Tensor) -> Tensor:
        """Of the edges, as the pass left it: (E, 3)."""
        of_edges, of_pairs = (self._at("gradient", x) for x in (self._network.vectors, self._network.pair_vectors))
        return of_edges[:n].index_add(0, chosen, of_pairs[: len(chosen)])


class _Responses(NamedTuple):
    """What a field asks of a potential that knows dipoles and polarizabilities; nothing of others."""

    readout: ResponseReadout | None
    kind: Tensor
    seeds: Tensor | None  # of the field's energy, (N, 9)
    turned: Tensor | None  # of u . mu

    @classmethod
    def of(cls, potential: Potential, graph: Graph, kind: Tensor, along: Tensor | None) -> "_Responses":
        readout = potential.responses
        if readout is None:
            return cls(None, kind, None, None)
        return cls(readout, kind, readout.seeds(graph), None if along is None else readout.slopes(along, graph))

    def prediction(self, graph: Graph, energies: Tensor, read: Tensor | None, made: Callable) -> Prediction:
        if self.readout is None:
            return made(energies)
        added, responses = in_field(graph, self.readout.of_atoms(self.kind, read))
        return made(energies + added)._replace(**responses._asdict())


def _links(graph: Graph, kind: Tensor) -> tuple[Tensor, TrainingLinks]:
    """An edge of every pair, and what the passes read."""
    n, n_edges = len(kind), len(graph.edge_src)
    edge_pair = torch.arange(n_edges, device=kind.device) if graph.edge_pair is None else graph.edge_pair
    chosen, pair = torch.unique(edge_pair, return_inverse=True)
    counts = {"node": n, "pair": len(chosen), "edge": n_edges}
    return chosen, TrainingLinks(counts, first_edges(graph.edge_dst, n), graph.edge_src, pair, kind)
