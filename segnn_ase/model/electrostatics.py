"""Charges of atoms that the network learns by itself, and their Coulomb energy at any distance.

q_i is read out of the features, without labels, and shifted so that a structure has its total charge, that of the cue
`charge` or the sum of `initial_charges`, 0 without; an isolated atom keeps E0. The charges are Gaussians, whose energy
is that of points where they are apart and smooth where they are not, which the network of short range sees anyway:

    E = sum_i<j k q_i q_j erf(r_ij / (s sqrt(2))) / r_ij,  s = `smearing`,

in crystals by Ewald's sum over plane waves; a net charge there has a uniform background (Grisafi and Ceriotti, J. Chem.
Phys. 151, 204105 (2019); latent charges: Cheng, npj Comput. Mater. 11, 80 (2025)). Neutral structures have the same
energy with all charges turned round, so that the sign of latent charges is arbitrary. The shift is shared by all atoms
of a structure: where fragments of different kind are far apart, and the network does not make each of them neutral, one
changes the charges of the other, and the energy is not the sum of theirs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase.units import Bohr, Hartree
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.model.irreps import SCALAR
from segnn_ase.model.readouts import Readout
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.structure.graph import Graph, is_crystal, sum_over_atoms, volume
from segnn_ase.structure.neighbors import compact

COULOMB = Hartree * Bohr  # eV Å / e^2
TOLERANCE = 1e-12  # of the weight of waves that are left out
MOST = 5e7  # charges times waves: a few GB
USUAL = 0.3  # e, of what a network with random weights says


class LongRange(NamedTuple):
    """What the charges add, and its derivatives where they are asked for."""

    charges: Tensor  # (N,) e
    energies: Tensor  # (N,) eV, half of every pair for either atom
    slope: Tensor | None = None  # (N, 1) dE/d of what was read out
    forces: Tensor | None = None  # (N, 3) eV/Å, of charges that stay as they are
    virial: Tensor | None = None  # (B, 3, 3) eV, likewise
    cue_slope: Tensor | None = None  # (N, width) dE/dcues, by the total charge


class ChargeReadout(Readout):
    """q_i, linear in the scalars after every interaction."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, (SCALAR,))
        self.smearing = config.smearing
        self.total = _column_of_charge(config.cues)

    def charges(self, read: Tensor, graph: Graph) -> Tensor:
        """q_i (N,) e, float64, of what was read out (N, 1); they add up to the total charge of their structure."""
        raw = USUAL * read[:, 0].double()
        counts = torch.bincount(graph.batch, minlength=graph.n_graphs).clamp_min(1)
        excess = sum_over_atoms(raw, graph) - self.total_charges(graph, counts)
        return raw - (excess / counts)[graph.batch]

    def total_charges(self, graph: Graph, counts: Tensor) -> Tensor:
        """(B,) e."""
        if self.total is None or graph.cues is None:
            return torch.zeros(graph.n_graphs, dtype=torch.float64, device=counts.device)
        column, unit, of_atoms = self.total
        told = unit * sum_over_atoms(graph.cues[:, column].double(), graph)
        return told if of_atoms else told / counts

    def energies(self, charges: Tensor, graph: Graph) -> Tensor:
        """Of charges (N,), (N,) eV, differentiable in positions and cells too. Raises StructureError for slabs and
        wires."""
        sizes = torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()
        if graph.periodic is None:
            raise ValueError("the graph does not say in which directions it is periodic, which charges need to know")
        periodic = map(is_crystal, graph.periodic.tolist())
        parts = zip(charges.split(sizes), graph.positions.split(sizes), graph.cell, periodic, strict=True)
        found = [coulomb_energies(q, x, h if crystal else None, self.smearing) for q, x, h, crystal in parts]
        return torch.cat(found) if found else charges

    def long_range(self, read: Tensor, graph: Graph, *, derivatives: bool, differentiable: bool = False) -> LongRange:
        """What the charges that were read out add; `differentiable` in them, for a loss."""
        with torch.enable_grad():
            read = read if differentiable else read.detach().requires_grad_()
            moved, inputs = strained(graph)
            charges, cues = self.charges(read, moved), moved.cues
            energies = self.energies(charges, moved)
            if not derivatives:
                return LongRange(charges.detach(), energies if differentiable else energies.detach())
            wanted = [read, *inputs, *([] if cues is None else [cues])]
            slope, push, virial, *told = torch.autograd.grad(
                energies.sum(), wanted, create_graph=differentiable, materialize_grads=True
            )
        energies = energies if differentiable else energies.detach()
        return LongRange(charges.detach(), energies, slope, -push, virial, told[0] if told else None)


def strained(graph: Graph) -> tuple[Graph, list[Tensor]]:
    """The graph, and its positions and the strains (B, 3, 3) of its structures, zero, in which it is differentiable."""
    positions = graph.positions.detach().clone().requires_grad_()
    strain = positions.new_zeros(graph.n_graphs, 3, 3).requires_grad_()
    both = 0.5 * (strain + strain.mT)
    placed = positions + torch.einsum("na,nab->nb", positions, both[graph.batch])
    cues = None if graph.cues is None else graph.cues.detach().clone().requires_grad_()
    return graph._replace(positions=placed, cell=graph.cell + graph.cell @ both, cues=cues), [positions, strain]


def coulomb_energies(charges: Tensor, positions: Tensor, cell: Tensor | None, smearing: float) -> Tensor:
    """Energy of Gaussian charges (N,) e at positions (N, 3) Å, half of every pair for either, (N,) eV; cell (3, 3) Å of
    a crystal, whose net charge has a uniform background."""
    around = _among(charges, positions, smearing) if cell is None else _in_waves(charges, positions, cell, smearing)
    return 0.5 * COULOMB * charges * around


def _among(charges: Tensor, positions: Tensor, smearing: float) -> Tensor:
    """Potential of all others at each, e/Å."""
    apart = (positions[:, None] - positions).square().sum(2)
    alone = torch.eye(len(charges), dtype=torch.bool, device=charges.device)
    distance = apart.masked_fill(alone, 1.0).sqrt()
    return (torch.erf(distance / (math.sqrt(2.0) * smearing)) / distance).masked_fill(alone, 0.0) @ charges


def _in_waves(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float) -> Tensor:
    """The same of all periodic images, by a sum over plane waves."""
    longest = math.sqrt(-2.0 * math.log(TOLERANCE)) / smearing
    given = cell.detach().cpu().numpy()
    room = abs(np.linalg.det(given))
    if (expected := len(charges) * room * longest**3 / (12 * math.pi**2)) > MOST:
        raise StructureError(
            f"{len(charges)} charges of width {smearing:g} Å in {room:.0f} Å^3 need {expected:.1e} numbers; expected "
            f"at most {MOST:.0e}: fewer atoms, less vacuum, or a potential with another `smearing`"
        )
    short = torch.as_tensor(compact(given, True)[1]).to(cell) @ cell
    waves = _whole_numbers(short.detach(), longest) @ (2.0 * math.pi * torch.linalg.inv(short)).T
    squares = waves.square().sum(1)
    size = torch.linalg.det(cell).abs()
    weight = 8.0 * math.pi / size * torch.exp(-0.5 * smearing**2 * squares) / squares  # of a wave and its opposite
    phase = positions @ waves.T
    c, s = phase.cos(), phase.sin()
    background = 2.0 * math.pi * smearing**2 / size * charges.sum()  # less than of points
    itself = math.sqrt(2.0 / math.pi) / smearing * charges
    return c @ (weight * (charges @ c)) + s @ (weight * (charges @ s)) - background - itself


def _whole_numbers(cell: Tensor, longest: float) -> Tensor:
    """Of the waves that are not longer, one of every two that are opposite, (K, 3)."""
    most = (longest * cell.norm(dim=1) / (2.0 * math.pi)).floor().long().tolist()
    numbers = torch.cartesian_prod(*(torch.arange(-m, m + 1, device=cell.device) for m in most)).to(cell)
    numbers = numbers[len(numbers) // 2 + 1 :]  # behind (0, 0, 0) come the opposites of those before
    waves = numbers @ (2.0 * math.pi * torch.linalg.inv(cell)).T
    return numbers[waves.square().sum(1) <= longest**2]


def _column_of_charge(cues: Sequence[Cue]) -> tuple[int, float, bool] | None:
    """Where the total charge is among the numbers of an atom's cues, its unit, and whether it is the sum of those of
    the atoms: `charge`, or else `initial_charges`."""
    found, first = {}, 0
    for cue in cues:
        found[cue.name] = first, cue.unit, cue.per == "node"
        first += cue.size
    return found.get("charge") or found.get("initial_charges")


def stress_of_charges(virial: Tensor, graph: Graph) -> Tensor:
    """(B, 3, 3) eV/Å^3; nothing where there is no volume."""
    size = volume(graph)[:, None, None]
    return virial / torch.where(size > 0, size, 1.0)
