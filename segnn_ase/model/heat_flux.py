"""The heat flux of a potential whose atoms feel each other through others, exactly and in linear time."""

import copy

import torch
from torch import Tensor

from segnn_ase.base.errors import expect
from segnn_ase.model.edges import Edges
from segnn_ase.model.network import PLAIN, plain_edges
from segnn_ase.model.potential import Potential
from segnn_ase.structure.graph import Graph, edge_vectors


def heat_flux(potential: Potential, graph: Graph, velocities: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Potential and convective part of J = d/dt sum_i r_i E_i, (3,) each, for E_i = U_i + m_i v_i^2 / 2.

    J = sum_ij (r_i - r_j) (dU_i / dr_j . v_j) + sum_i E_i v_i (Langer et al., Phys. Rev. B 108, L100302, eqs. 2 and 3),
    j over all atoms and images that U_i depends on, be it through others; U_i includes E0. Velocities (N, 3) and
    masses (N,) in units in which m v^2 is in eV; J in eV times that of the velocity. In float64; one structure, with no
    pair beyond the cutoff. Raises ConfigError for the published message.

    No cell is unfolded. For J(k) = sum_ij exp(k . (r_i - r_j)) dU_i / dr_j . v_j, whose slope at k = 0 is the first
    sum, the exponential is a product along every way from j to i: whatever is derived with respect to a sender gets a
    factor exp(-k . r_ij) on its edge.
    """
    message = potential.config.message
    expect(message != "published", "message", message, "that of a smooth energy, 'linear' or 'nonlinear'")
    potential = copy.deepcopy(potential).double().requires_grad_(False)
    r = edge_vectors(graph).detach()
    vectors, k = r.clone().requires_grad_(), r.new_zeros(3, requires_grad=True)
    with torch.enable_grad():
        slopes = (1.0 - r @ k)[:, None]

        def edges_with_slopes(*given) -> Edges:
            edges = plain_edges(*given)
            return edges._replace(slopes=edges.to_slots(slopes))

        elements, operations = potential.elements(), PLAIN._replace(edges=edges_with_slopes)
        energies, *_ = potential.atomic_energies(graph, vectors, elements=elements, operations=operations)
        (g,) = torch.autograd.grad(energies.sum(), vectors, create_graph=True)
        rates = velocities[graph.edge_src] * slopes - velocities[graph.edge_dst]
        (potential_part,) = torch.autograd.grad((g * rates).sum(), k)
    kinetic = 0.5 * masses * velocities.square().sum(1)
    return potential_part, ((kinetic + energies.detach())[:, None] * velocities).sum(0)
