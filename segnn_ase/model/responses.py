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
def symmetric() -> Tensor:
    """The symmetric 3 x 3 matrices of 0e and 2e, row by row: (9, 6)."""
    return torch.cat([matrices_of(0), matrices_of(2)], dim=1)


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

    def of_atoms(self, kind: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """mu_i (N, 3) and alpha_i (N, 3, 3) in float64, of atoms of species kind (N,), from what was read out."""
        read, scales = read.double(), self.scales.double()
        usual = self.usual.double()[kind][:, None, None] * torch.eye(3, dtype=torch.float64, device=read.device)
        alpha = (read[:, 3:] @ symmetric().to(read).T).unflatten(1, (3, 3))
        return scales[0] * read[:, :3], usual + scales[1] * alpha

    def seeds(self, field: Tensor) -> Tensor:
        """Derivative of the energy of fields (N, 3) V/Å at atoms with respect to what is read out, (N, 9)."""
        squared = (field[:, :, None] * field[:, None]).flatten(1) @ symmetric().to(field)
        scales = self.scales.to(field)
        return torch.cat([-scales[0] * field, -0.5 * scales[1] * squared], dim=1)

    def slopes(self, along: Tensor, graph: Graph) -> Tensor:
        """Derivative of u . mu, along (N, 3) the directions u at atoms, with respect to what is read out, (N, 9)."""
        scales = self.scales.to(along)
        bent = torch.zeros(len(along), 6, dtype=along.dtype, device=along.device)
        if graph.field is not None:
            field = graph.field.to(along)[graph.batch]
            bent = (along[:, :, None] * field[:, None]).flatten(1) @ symmetric().to(along)
        return torch.cat([scales[0] * along, scales[1] * bent], dim=1)


def field_energies(graph: Graph, mu: Tensor, alpha: Tensor) -> Tensor:
    """-F . mu_i - F . alpha_i . F / 2 of every atom, (N,) eV; zero without a field."""
    if graph.field is None:
        return mu.new_zeros(len(mu))
    field = graph.field.to(mu)[graph.batch]
    return -(field * mu).sum(1) - 0.5 * torch.einsum("na,nab,nb->n", field, alpha, field)


def summed(graph: Graph, mu: Tensor, alpha: Tensor) -> Responses:
    """In the field that there is: dipoles -dE/dF (B, 3) and polarizabilities -d2E/dF2 (B, 3, 3)."""
    dipole, polarizability = sum_over_atoms(mu, graph), sum_over_atoms(alpha, graph)
    if graph.field is not None:
        dipole = dipole + torch.einsum("bac,bc->ba", polarizability, graph.field.to(dipole))
    return Responses(dipole, polarizability)


def nearest_branch(label: Tensor, dipole: Tensor, cell: Tensor) -> Tensor:
    """Labels of dipoles (B, 3) e Å, of periodic cells (B, 3, 3) Å plus e times those lattice vectors that bring them
    nearest to other dipoles: of such a cell a dipole is defined up to these."""
    periodic = torch.linalg.det(cell).abs()[:, None] > 1e-6
    lattice = torch.where(periodic[:, :, None], cell, torch.eye(3, dtype=cell.dtype, device=cell.device))
    apart = (dipole.detach() - label).nan_to_num()
    parts = torch.linalg.solve(lattice.mT, apart[:, :, None])[:, :, 0].round()
    return label + torch.where(periodic, torch.einsum("bi,bij->bj", parts, lattice), 0.0)
