"""The gradient of a loss on energies and forces in compiled code, on one thread: all four passes of `passes.py`."""

import ctypes
import math

import torch
from torch import Tensor

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.geometry import first_edges
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import apart, dual_pass, gradient_pass, tangent_pass, value_pass
from segnn_ase.compiled.steps import Place, steps_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Loss, assemble
from segnn_ase.model.repulsion import repelled
from segnn_ase.structure.graph import Graph, edge_vectors


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
        room = torch.zeros(sum(sizes) + 64, dtype=self._dtype)  # what C reads and writes behind the last is never used
        pieces = room[: sum(sizes)].split(sizes)
        self._gradient = dict(zip(self._weights, pieces, strict=True))
        self._all_gradients = room
        outside = [x for role in ("value", "gradient", "tangent") for x in self._geometry_places(role)]
        outside += [Place(role, network.radial) for role in ("value", "gradient", "tangent")]
        storage = apart([*(s for p in passes.values() for s in p)], outside)
        lmax = potential.config.lmax_attr
        self._passes = CpuPasses(passes, storage, self._dtype, lmax, self._gradient)
        self._runtime = self._passes.runtime

    def _geometry_places(self, role: str) -> list[Place]:
        return [Place(role, x) for x in self._network.geometry()]

    def __call__(self, graph: Graph, loss_of: Loss, *, forces: bool, stress: bool) -> Tensor:
        """See `model.predict.LossGradient`; the edges are sorted by receiver, else ValueError."""
        potential, network, passes = self._potential, self._network, self._passes
        if not bool((graph.edge_dst[1:] >= graph.edge_dst[:-1]).all()):
            raise ValueError("edges must be sorted by receiver")
        n, species = len(graph.numbers), len(potential.species)
        kind = torch.cat([potential.species_index[graph.numbers], torch.arange(species)])  # a lonely atom of each
        vectors = edge_vectors(graph).detach().to(self._dtype).contiguous()
        geometry = _Geometry(self, graph, vectors, kind)
        geometry.values()
        passes.weights.load()
        geometry.run("value")
        epsilon = self._at("value", network.epsilon)[: len(kind), 0].clone().requires_grad_()
        elements = potential.elements(epsilon[n:])
        weight = self._at("gradient", network.epsilon)
        weight[:n, 0], weight[n : len(kind)] = elements.scale[kind[:n]], 0
        geometry.run("gradient")
        g = geometry.gradient().requires_grad_()
        energies = elements.energies(kind[:n], epsilon[:n])
        energies, slope = repelled(energies, torch.zeros_like(g), graph, kind[:n], vectors, elements.core)
        prediction = assemble(graph, vectors, energies, g + slope, None, forces=forces, stress=stress)
        loss = loss_of(prediction)
        slopes, direction = torch.autograd.grad(loss, [epsilon, g], materialize_grads=True)
        geometry.tangents(direction.contiguous())
        geometry.run("tangent")
        self._all_gradients.zero_()
        self._at("dual", network.epsilon)[: len(kind), 0] = slopes
        geometry.run("dual")
        for w, gradient in self._gradient.items():
            if w.parameter.requires_grad:
                w.parameter.grad = gradient.view_as(w.parameter) * w.scale
        return loss.detach()

    def _at(self, role: str, array) -> Tensor:
        return self._passes.at(Place(role, array))


class _Geometry:
    """Harmonics, envelope, node attributes and Bessel functions of one graph, and their derivatives, in the memory."""

    def __init__(self, owner: CpuLossGradient, graph: Graph, vectors: Tensor, kind: Tensor):
        self._owner, self._vectors, self._passes = owner, vectors, owner._passes
        n, n_edges = len(kind), len(vectors)
        edge_pair = torch.arange(n_edges) if graph.edge_pair is None else graph.edge_pair
        self._chosen, pair = torch.unique(edge_pair, return_inverse=True)
        self._counts = {"node": n, "pair": len(self._chosen), "edge": n_edges}
        first, unused = first_edges(graph.edge_dst, n), torch.empty_like(pair)
        links = [first, graph.edge_src, pair]
        self._on_edges, self._on_nodes = pointers([*links, unused]), pointers([*links, kind])
        self._cuts, self._bounds = [0, n], (ctypes.c_int64 * 2)(0, n)
        cutoff = owner._potential.cutoff
        self._numbers = (ctypes.c_double * 3)(cutoff, cutoff, 1.0)
        self._passes.reserve(self._counts)
        self._radial = _Radial(vectors[self._chosen], owner._network.radial.size, cutoff)

    def _places(self, role: str) -> list[Tensor]:
        return [self._passes.at(place) for place in self._owner._geometry_places(role)]

    def _radials(self, role: str) -> Tensor:
        return self._owner._at(role, self._owner._network.radial)[: len(self._chosen)]

    def values(self) -> None:
        self._values = pointers([self._vectors, *self._places("value")])
        self._gradients = pointers(self._places("gradient"))
        self._owner._runtime.geometry(1, self._bounds, self._on_edges, self._numbers, self._values, self._gradients)
        self._radials("value")[:] = self._radial.values

    def run(self, name: str) -> None:
        self._passes.run(name, self._counts, self._cuts, self._on_edges, self._on_nodes)

    def gradient(self) -> Tensor:
        """With respect to the vectors, from those that the pass left: (E, 3)."""
        g = torch.empty_like(self._vectors)
        self._owner._runtime.geometry_gradient(
            1, self._bounds, self._on_edges, self._numbers, self._values, self._gradients, pointers([g])
        )
        g[self._chosen] += self._radial.gradient(self._radials("gradient"))
        return g

    def tangents(self, direction: Tensor) -> None:
        """Derivatives along a direction (E, 3) of the vectors."""
        harmonics, envelope, _, attributes = self._places("tangent")
        self._owner._runtime.geometry_tangent(
            self._counts["node"],
            self._on_edges,
            self._numbers,
            self._values,
            direction.data_ptr(),
            pointers([harmonics, envelope, attributes]),
        )
        self._radials("tangent")[:] = self._radial.tangents(direction[self._chosen])


class _Radial:
    """Bessel functions of pairs, `model.edges.bessel`, and their derivatives."""

    def __init__(self, vectors: Tensor, n: int, cutoff: float):
        distance = vectors.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()
        self.unit = vectors / distance
        k = math.pi / cutoff * torch.arange(1, n + 1, dtype=vectors.dtype)
        scale = math.sqrt(2.0 / cutoff) / distance
        self.values = scale * torch.sin(k * distance)
        self.slopes = scale * k * torch.cos(k * distance) - self.values / distance

    def gradient(self, weights: Tensor) -> Tensor:
        return (weights * self.slopes).sum(1, keepdim=True) * self.unit

    def tangents(self, direction: Tensor) -> Tensor:
        return self.slopes * (direction * self.unit).sum(1, keepdim=True)
