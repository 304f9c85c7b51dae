"""`Potential`: elements, embedding, readout, reference energies; energy, forces and stress by autograd."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.gpu import DeviceEngine
from segnn_ase.model.potential import Potential
from segnn_ase.structure.graph import Graph, edge_vectors, sum_over_atoms, sum_over_structure_edges, volume


class Prediction(NamedTuple):
    energy: Tensor  # (B,) eV, float64
    energies: Tensor  # (N,) eV, float64
    forces: Tensor | None  # (N, 3) eV/Å
    stress: Tensor | None  # (B, 3, 3) eV/Å^3, ASE's sign
    edge_gradients: Tensor | None  # (E, 3) dE/dr_ij, eV/Å
    features: Tensor | None  # (N, d) invariant descriptors
    neighbors: Tensor | None = None  # (N,) atoms within the cutoff, where they were counted on the way
    close: bool | Tensor | None = None  # whether atoms are closer than their core radius, likewise; () on a GPU


def predict(potential: Potential, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
    """Evaluate a potential; in training mode the results keep their graph for a second derivative.

    Forces and virial come from one gradient g_ij = dE/dr_ij: F_i = sum_j (g_ij - g_ji), and
    stress = (1 / V) sum_ij r_ij (x) g_ij, symmetrised. The stress of a cell without volume is NaN.
    Pairs beyond the cutoff do nothing where the model is smooth; the engine leaves them out of `edge_gradients`.
    """
    wanted = forces or stress
    if potential.engine is not None:
        found = _by_engine(potential, graph, wanted, stress)
        if found is not None:
            return found
    vectors = edge_vectors(graph).detach().to(potential.dtype)
    energy, energies, features, g = _by_autograd(potential, graph, vectors, wanted)
    if not wanted:
        return Prediction(energy, energies, None, None, None, features)
    return assemble(graph, vectors, energies, g, features, forces=forces, stress=stress)


def _by_engine(potential: Potential, graph: Graph, gradient: bool, stress: bool) -> Prediction | None:
    """The same by the engine; None for a graph that is not sorted by receiver."""
    engine, kind = potential.engine, potential.species_index[graph.numbers]
    if isinstance(engine, DeviceEngine):
        return _by_device_engine(potential, graph, kind, gradient, stress)
    if len(kind) and int(kind.min()) < 0:
        raise ValueError(f"numbers has elements that are not of {potential.symbols}")
    edges = engine.edges(graph, kind, potential.core_radii)
    if edges is None:
        return None
    weight = potential.per_species(kind)[1].to(potential.dtype) if gradient else None
    epsilon, features, g = engine(kind, edges.vectors, edges.src, edges.first, weight)
    energies = potential.in_eV(kind, epsilon, engine.isolated)
    if edges.close and potential.config.core_repulsion:
        near = graph._replace(edge_src=edges.src, edge_dst=edges.dst)
        energies, repulsion = potential.with_repulsion(near, kind, edges.vectors, energies, gradient=gradient)
        g = g if g is None or repulsion is None else g + repulsion
    energy, neighbors = sum_over_atoms(energies, graph), edges.first.diff()
    if not gradient:
        return Prediction(energy, energies, None, None, None, features, neighbors, edges.close)
    forces, virial = engine.gather(graph, edges, g, stress=stress)
    s = None if virial is None else _stress(virial, graph)
    return Prediction(energy, energies, forces, s, g.double(), features, neighbors, edges.close)


def _by_device_engine(potential: Potential, graph: Graph, kind: Tensor, gradient: bool, stress: bool) -> Prediction:
    """Without a look at any number, so that it can be captured (`captured.py`)."""
    engine, vectors = potential.engine, edge_vectors(graph).detach()
    weight = potential.per_species(kind)[1].to(potential.dtype) if gradient else None
    squares, ends = vectors.square().sum(1), (kind[graph.edge_dst], kind[graph.edge_src])
    neighbors = torch.zeros_like(kind).index_add(0, graph.edge_dst, (squares < potential.cutoff**2).long())
    close = (squares < potential.core_radii[ends].square()).any()
    epsilon, features, g = engine(kind, vectors, graph.edge_src, graph.edge_dst, weight)
    energies = potential.in_eV(kind, epsilon, engine.isolated)
    energies, repulsion = potential.with_repulsion(graph, kind, vectors, energies, gradient=gradient)
    if gradient:
        g = g if repulsion is None else g + repulsion
        found = assemble(graph, vectors, energies, g, features, forces=True, stress=stress)
    else:
        found = Prediction(sum_over_atoms(energies, graph), energies, None, None, None, features)
    return found._replace(neighbors=neighbors, close=close)


def assemble(
    graph: Graph, vectors: Tensor, energies: Tensor, g: Tensor, features: Tensor | None, *, forces: bool, stress: bool
) -> Prediction:
    """Totals, forces and stress from atomic energies (N,) and g = dE/dr_ij (E, 3), differentiable in both."""
    g = g.double()
    f = s = None
    if forces:
        zero = g.new_zeros(len(graph.numbers), 3)
        f = zero.index_add(0, graph.edge_dst, g).index_add(0, graph.edge_src, -g)
    if stress:
        s = _stress(sum_over_structure_edges(vectors.detach().double()[:, :, None] * g[:, None], graph), graph)
    return Prediction(sum_over_atoms(energies, graph), energies, f, s, g, features)


def _stress(virial: Tensor, graph: Graph) -> Tensor:
    size = volume(graph)[:, None, None]
    # a cell without volume divides by 1, not 0: its NaN must not reach the gradients of the others in a batch
    s = 0.5 * (virial + virial.transpose(1, 2)) / torch.where(size > 0, size, 1.0)
    return s.masked_fill(size == 0, math.nan)


def _by_autograd(potential: Potential, graph: Graph, vectors: Tensor, wanted: bool) -> tuple:
    with torch.set_grad_enabled(wanted or potential.training):
        vectors.requires_grad_(wanted)
        energies, features = potential.atomic_energies(graph, vectors)
        energy, g = sum_over_atoms(energies, graph), None
        if wanted:
            (g,) = torch.autograd.grad(energy.sum(), vectors, create_graph=potential.training)
    if not potential.training:
        energy, energies, features = energy.detach(), energies.detach(), features.detach()
    return energy, energies, features, g


def hessian(potential: Potential, graph: Graph) -> Tensor:
    """d^2 E / dr dr, (3N, 3N) eV/Å^2, by differentiating the forces row by row; float64."""
    positions = graph.positions.detach().requires_grad_()
    with torch.enable_grad():
        energy, _ = potential(graph._replace(positions=positions))
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        rows = [
            torch.autograd.grad(component, positions, retain_graph=True)[0].flatten()
            for component in gradient.flatten()
        ]
    return torch.stack(rows)
