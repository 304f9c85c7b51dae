"""Dipoles and polarizabilities of atoms, and the energy of a uniform electric field that goes with them.

E(R, F) = E(R) - F . mu(R) - F . alpha(R) . F / 2, mu = sum_i mu_i and alpha = sum_i alpha_i read out of steerable
features: the field's conjugates are exact, and so are its forces, whose slopes are the Born charges Z* = d mu / d r.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.model.irreps import SCALAR, Kind, matrices_of
from segnn_ase.model.readouts import Readout
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.graph import Graph, sum_over_atoms

VECTOR, TENSOR = Kind(1, -1), Kind(2, 1)
READ = (VECTOR, SCALAR, TENSOR)  # out of an atom, in this order


@cache
def _basis(device: torch.device) -> Tensor:
    """(9, 12): an atom's dipole and polarizability, row by row, from its vector and its parts 0e and 2e; float64."""
    symmetric = torch.cat([matrices_of(0), matrices_of(2)], dim=1)
    return torch.block_diag(torch.eye(3), symmetric.mT).double().to(device)


@cache
def _unit(device: torch.device) -> Tensor:
    """(12,): the polarizability of one atom that is 1."""
    return torch.cat([torch.zeros(3), torch.eye(3).flatten()]).double().to(device)


class Responses(NamedTuple):
    """What a potential says besides energies: of who knows fields, of structures, and of who has charges, of atoms."""

    dipole: Tensor | None = None  # (B, 3) e Å
    polarizability: Tensor | None = None  # (B, 3, 3) e Å^2/V
    charges: Tensor | None = None  # (N,) e


class ResponseReadout(Readout):
    """mu_i, and the trace and the rest of alpha_i, (N, 9)."""

    def __init__(self, config: ModelConfig, n_species: int):
        super().__init__(config, READ)
        self.register_buffer("scales", torch.ones(2))  # e Å, e Å^2/V
        self.register_buffer("usual", torch.zeros(n_species))  # e Å^2/V, polarizability of an atom of each element

    def _linear(self) -> Tensor:
        dipole, polarizability = self.scales.double().split(1)
        return torch.cat([dipole.expand(3), polarizability.expand(6)])[:, None] * _basis(self.scales.device)

    def of_atoms(self, kind: Tensor, read: Tensor) -> Tensor:
        """mu_i and alpha_i (N, 3 + 9) in float64, of atoms of species kind (N,), from what was read out."""
        usual = self.usual.double()[kind][:, None] * _unit(kind.device)
        return usual + read.double() @ self._linear()

    def seeds(self, graph: Graph) -> Tensor | None:
        """Derivative of the energy of a field with respect to what is read out, (N, 9); None without one."""
        if graph.field is None:
            return None
        return (_weights(graph.field) @ self._linear().mT)[graph.batch]

    def slopes(self, along: Tensor, graph: Graph) -> Tensor:
        """Derivative of u . mu along the directions u (B, 3) with respect to what is read out, (N, 9)."""
        bent = torch.zeros(len(along), 9, dtype=torch.float64, device=along.device)
        if graph.field is not None:
            bent = (along.double()[:, :, None] * graph.field.double()[:, None]).flatten(1)
        return (torch.cat([along.double(), bent], dim=1) @ self._linear().mT)[graph.batch]


def _weights(field: Tensor) -> Tensor:
    """Of mu and alpha in the energy -F . mu - F . alpha . F / 2 of fields (B, 3) V/Å, (B, 12)."""
    field = field.double()
    return torch.cat([-field, (-0.5 * field[:, :, None] * field[:, None]).flatten(1)], dim=1)


def in_field(graph: Graph, moments: Tensor) -> tuple[Tensor, Responses]:
    """Of moments (N, 12): the energies that atoms have in the field, (N,) eV, zero where there is none; and, in the
    field, the dipoles -dE/dF (B, 3) and polarizabilities -d2E/dF2 (B, 3, 3)."""
    total = sum_over_atoms(moments, graph)
    dipole, polarizability = total[:, :3], total[:, 3:].unflatten(1, (3, 3))
    if graph.field is None:
        return moments.new_zeros(len(moments)), Responses(dipole, polarizability)
    energies = (moments * _weights(graph.field)[graph.batch]).sum(dim=1)
    dipole = dipole + (polarizability @ graph.field.double()[:, :, None])[:, :, 0]
    return energies, Responses(dipole, polarizability)


@torch.no_grad()
def nearest_branch(label: Tensor, dipole: Tensor, graph: Graph) -> Tensor:
    """Labels of dipoles (B, 3) e Å, plus e times those vectors by which their structures repeat that bring them nearest
    to other dipoles: of what is periodic a dipole is defined up to these."""
    if graph.periodic is None or not bool(graph.periodic.any()):
        return label
    lattice = torch.where(graph.periodic[:, :, None], graph.cell, 0.0).to(label)
    apart = (dipole - label).nan_to_num()
    parts = torch.einsum("bj,bji->bi", apart, torch.linalg.pinv(lattice)).round()
    return label + torch.einsum("bi,bij->bj", parts, lattice)
