"""Charges of atoms, which the network learns by itself or a structure brings along, and their Coulomb energy at any
distance.

Latent ones: q_i is read out of the features, without labels, and shifted so that a structure has its total charge, that
of the cue `charge` or the sum of `initial_charges`, 0 without. Given ones are those of `initial_charges`. An isolated
atom keeps E0. The charges are Gaussians, whose energy is that of points where they are apart and smooth where they are
not, which the network of short range sees anyway:

    E = sum_i<j k q_i q_j erf(r_ij / (s sqrt(2))) / r_ij,  s = `smearing`,

in crystals and slabs by Ewald's sums over plane waves; a net charge of a crystal has a uniform background (Grisafi and
Ceriotti, J. Chem. Phys. 151, 204105 (2019); latent charges: Cheng, npj Comput. Mater. 11, 80 (2025)). Neutral
structures have the same energy with all charges turned round, so that the sign of latent charges is arbitrary. The
shift is shared by all atoms of a structure: where fragments of different kind are far apart, and the network does not
make each of them neutral, one changes the charges of the other, and the energy is not the sum of theirs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segnn_ase.model.coulomb import coulomb_energies, of_charges
from segnn_ase.model.irreps import SCALAR
from segnn_ase.model.readouts import Readout
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.structure.graph import Graph, refuse_wire, sum_over_atoms, volume

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
        raw, counts = USUAL * read[:, 0].double(), self._counts(graph)
        excess = sum_over_atoms(raw, graph) - self.total_charges(graph, counts)
        return raw - (excess / counts)[graph.batch]

    def total_charges(self, graph: Graph, counts: Tensor) -> Tensor:
        """(B,) e."""
        if self.total is None or graph.cues is None:
            return torch.zeros(graph.n_graphs, dtype=torch.float64, device=counts.device)
        column, unit, of_atoms = self.total
        told = unit * sum_over_atoms(graph.cues[:, column].double(), graph)
        return told if of_atoms else told / counts

    def _counts(self, graph: Graph) -> Tensor:
        return torch.bincount(graph.batch, minlength=graph.n_graphs).clamp_min(1)

    def _slopes(self, potential: Tensor, graph: Graph) -> tuple[Tensor, Tensor | None]:
        """dE/d of what is read out and dE/dcues, of the potential dE/dq (N,) at each charge."""
        counts = self._counts(graph)
        mean = sum_over_atoms(potential, graph) / counts
        if self.total is None or graph.cues is None:
            told = None if graph.cues is None else torch.zeros_like(graph.cues)
        else:
            column, unit, of_atoms = self.total
            told = torch.zeros_like(graph.cues)
            told[:, column] = unit * (mean if of_atoms else mean / counts)[graph.batch]
        return USUAL * (potential - mean[graph.batch])[:, None], told

    def energies(self, charges: Tensor, graph: Graph) -> Tensor:
        """Of charges (N,), (N,) eV, differentiable in positions and cells too. Raises StructureError for wires,
        and for slabs with a net charge."""
        found = [coulomb_energies(*one, self.smearing) for one in _by_structure(charges, graph)]
        return torch.cat(found) if found else charges

    @torch.no_grad()
    def long_range(self, read: Tensor, graph: Graph, *, derivatives: bool) -> LongRange:
        """What the charges that were read out add."""
        charges = self.charges(read, graph)
        if not derivatives:
            return LongRange(charges, self.energies(charges, graph))
        found = [of_charges(*one, self.smearing) for one in _by_structure(charges, graph)]
        potential, forces = (torch.cat([x[k] for x in found]) for k in (0, 1))
        slope, told = self._slopes(potential, graph)
        virial = torch.stack([one.virial for one in found])
        return LongRange(charges, 0.5 * charges * potential, slope, forces, virial, told)

    def differentiable(self, read: Tensor, graph: Graph) -> LongRange:
        """The same for a loss: by autograd, differentiable in what was read out."""
        with torch.enable_grad():
            moved, inputs = strained(graph)
            charges, cues = self.charges(read, moved), [] if moved.cues is None else [moved.cues]
            energies = self.energies(charges, moved)
            slope, push, virial, *told = torch.autograd.grad(
                energies.sum(), [read, *inputs, *cues], create_graph=True, materialize_grads=True
            )
        return LongRange(charges.detach(), energies, slope, -push, virial, *told)


class GivenCharges(ChargeReadout):
    """q_i of the cue `initial_charges`, whatever the network says: nothing of it is read out, its weights are zero."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        for weight in self.parameters():
            nn.init.zeros_(weight)
        self.column = _columns_of_cues(config.cues)["initial_charges"][:2]

    def charges(self, read: Tensor, graph: Graph) -> Tensor:
        if graph.cues is None:
            raise ValueError("the graph has no cues; expected initial_charges among them")
        column, unit = self.column
        return unit * graph.cues[:, column].double() + 0.0 * read[:, 0].double()  # so that its gradients are there

    def _slopes(self, potential: Tensor, graph: Graph) -> tuple[Tensor, Tensor | None]:
        column, unit = self.column
        told = torch.zeros_like(graph.cues)
        told[:, column] = unit * potential
        return torch.zeros_like(potential)[:, None], told


def charges_of(config: ModelConfig) -> ChargeReadout | None:
    """What gives the charges of the settings' electrostatics."""
    if config.electrostatics == "none":
        return None
    return GivenCharges(config) if config.electrostatics == "given" else ChargeReadout(config)


def _by_structure(charges: Tensor, graph: Graph) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Charges, positions, and the vectors by which they are repeated, None in molecules."""
    sizes = torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()
    if graph.periodic is None:
        raise ValueError("the graph does not say in which directions it is periodic, which charges need to know")
    parts = charges.split(sizes), graph.positions.split(sizes), graph.cell, graph.periodic
    for q, x, h, periodic in zip(*parts, strict=True):
        refuse_wire(periodic.tolist())
        yield q, x, h[periodic] if bool(periodic.any()) else None


def strained(graph: Graph) -> tuple[Graph, list[Tensor]]:
    """The graph, and its positions and the strains (B, 3, 3) of its structures, zero, in which it is differentiable."""
    positions = graph.positions.detach().clone().requires_grad_()
    strain = positions.new_zeros(graph.n_graphs, 3, 3).requires_grad_()
    both = 0.5 * (strain + strain.mT)
    placed = positions + torch.einsum("na,nab->nb", positions, both[graph.batch])
    cues = None if graph.cues is None else graph.cues.detach().clone().requires_grad_()
    return graph._replace(positions=placed, cell=graph.cell + graph.cell @ both, cues=cues), [positions, strain]


def _column_of_charge(cues: Sequence[Cue]) -> tuple[int, float, bool] | None:
    """Where the total charge is among the numbers of an atom's cues, its unit, and whether it is the sum of those of
    the atoms: `charge`, or else `initial_charges`."""
    found = _columns_of_cues(cues)
    return found.get("charge") or found.get("initial_charges")


def _columns_of_cues(cues: Sequence[Cue]) -> dict[str, tuple[int, float, bool]]:
    """Where each is among the numbers of an atom, its unit, and whether every atom has its own."""
    found, first = {}, 0
    for cue in cues:
        found[cue.name] = first, cue.unit, cue.per == "node"
        first += cue.size
    return found


def stress_of_charges(virial: Tensor, graph: Graph) -> Tensor:
    """(B, 3, 3) eV/Å^3; nothing where there is no volume."""
    size = volume(graph)[:, None, None]
    return virial / torch.where(size > 0, size, 1.0)
