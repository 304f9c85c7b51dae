"""What a calculator gives besides ASE's results (virials, heat flux, second derivatives, descriptors, pairs), and what
dispersion adds to them."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.stress import full_3x3_to_voigt_6_stress

from segnn_ase.base.dispersion_name import parse_dispersion
from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.base.threads import SharedCalculator, one_at_a_time
from segnn_ase.model.heat_flux import heat_flux
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, atomic_virials, hessian
from segnn_ase.structure.cues import field_of
from segnn_ase.structure.dispersion import (
    dispersion_energies,
    dispersion_hessian,
    dispersion_of,
    require_dispersion,
)
from segnn_ase.structure.graph import Graph, within
from segnn_ase.structure.ions import is_charged
from segnn_ase.structure.neighbors import Neighbors
from segnn_ase.structure.skin import SkinGraphs

CERTAIN = 1 - 1e-9  # of the cutoff: pairs at it may be rounded to either side, and do nothing


class InspectedCalculator(SharedCalculator):
    """Of potentials, one or several whose mean it gives."""

    _potentials: list[Potential]
    _graphs: dict[float, SkinGraphs]  # by cutoff
    _dispersion: str | None  # that is added

    @abstractmethod
    def _graph(self, atoms: Atoms | None, cutoff: float) -> Graph:
        """The graph of a structure, of the last one without."""

    @abstractmethod
    def _chosen(self, graphs: dict[float, Graph]) -> list[Evaluator]:
        """An evaluator of each potential."""

    @one_at_a_time
    def get_hessian(self, atoms: Atoms | None = None) -> np.ndarray:
        """Second derivatives of the energy with respect to the positions by autograd, (3N, 3N) eV/Å^2."""
        graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._graphs}
        found = np.mean([as_numpy(hessian(p, within(graphs[p.cutoff], p.cutoff))) for p in self._potentials], axis=0)
        if self._dispersion is None:
            return found
        return found + dispersion_hessian(self._dispersion, self.atoms if atoms is None else atoms)

    @one_at_a_time
    def get_virials(self, atoms: Atoms | None = None) -> np.ndarray:
        """Virials sum_j r_ij (x) dE/dr_ij of the atoms, half of every pair for either end: (N, 3, 3) eV, not symmetric.

        Their sum is the stress times the volume. The heat flux is not theirs: see `get_heat_flux`.
        """
        graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._graphs}
        return self._virials(graphs, self.atoms if atoms is None else atoms)

    def get_atomic_volumes(self) -> float:
        """What "stresses" are divided by: nothing. ASE asks for it to add the ideal gas in the same units."""
        return 1.0

    def _virials(self, graphs: dict[float, Graph], atoms: Atoms) -> np.ndarray:
        self._refuse_pulled(atoms, "virials of the atoms (stresses)")
        refuse_with_dispersion(self._dispersion, "virials of the atoms (stresses)")
        refuse_with_charges(self._potentials, "virials of the atoms (stresses)")
        near = {cutoff: within(graph, CERTAIN * cutoff) for cutoff, graph in graphs.items()}
        pairs = zip(self._chosen(near), (near[p.cutoff] for p in self._potentials), strict=True)
        return np.mean([as_numpy(atomic_virials(g, evaluator.pairwise(g))) for evaluator, g in pairs], axis=0)

    @one_at_a_time
    def get_heat_flux(self, atoms: Atoms | None = None, *, convective: bool = True) -> np.ndarray:
        """J = d/dt sum_i r_i E_i, (3,) eV Å per ASE's unit of time (divide by the volume for a density).

        Exact for potentials that pass messages (`model.heat_flux`), with periodic images. With `convective`
        sum_i E_i v_i is in it, E_i being the energy of an atom with its E0 and its kinetic energy.
        """
        expect(isinstance(convective, bool), "convective", convective, "True or False")
        refuse_with_dispersion(self._dispersion, "heat flux")
        refuse_with_charges(self._potentials, "heat flux")
        graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._graphs}
        atoms = self.atoms if atoms is None else atoms
        self._refuse_pulled(atoms, "heat flux")
        return np.mean([flux_of(p, graphs[p.cutoff], atoms, convective=convective) for p in self._potentials], axis=0)

    def _refuse_pulled(self, atoms: Atoms, what: str) -> None:
        cues = self._potentials[0].config.cues
        field = field_of(atoms, cues)
        if field is not None and field.any() and is_charged(atoms, cues):
            raise PropertyNotImplementedError(f"{what} of an ion in a field, whose pull depends on the origin")

    @one_at_a_time
    def get_descriptors(self, atoms: Atoms | None = None) -> np.ndarray:
        """Invariant features of each atom after the last interaction, (N, channels); of the first potential."""
        graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._graphs}
        found = self._chosen(graphs)[0](graphs[self._potentials[0].cutoff], forces=False)
        return as_numpy(found.features)  # type: ignore[arg-type]

    @one_at_a_time
    def get_pairs(self, atoms: Atoms | None = None) -> Neighbors:
        """The pairs i, j, S that are evaluated, as ASE's `neighbor_list` returns them; of the first potential."""
        cutoff = self._potentials[0].cutoff
        graph = within(self._graph(atoms, cutoff), cutoff)
        return Neighbors(*map(as_numpy, (graph.edge_dst, graph.edge_src, graph.edge_shift.long())))


def dispersion_to_add(potentials: Sequence[Potential], asked: str | None) -> str | None:
    """What was taken off the labels of the members, else what is asked for; checked to be at hand.

    Raises ConfigError for members that differ, and where another one is asked for than theirs.
    """
    known = list(dict.fromkeys(p.dispersion for p in potentials))
    if len(known) > 1:
        raise ConfigError(f"the members of the committee have different dispersion: {known}; expected the same")
    own, asked = (None if name is None else parse_dispersion(name) for name in (known[0], asked))
    if own and asked and own != asked:
        raise ConfigError(
            f"dispersion is {asked!r}, but {own!r} was taken off the labels of this potential, and is added: leave "
            "dispersion out"
        )
    if name := own or asked:
        require_dispersion(name, potentials[0].species)
    return own or asked


def with_dispersion(results: dict, name: str, atoms: Atoms, properties: Sequence[str]) -> dict:
    """Results of the network and what dispersion adds to each; energies of the atoms only where they are asked for."""
    added = dispersion_of(name, atoms, derivatives="forces" in results)
    total = {**results, "energy": results["energy"] + added.energy}
    total["free_energy"], energies = total["energy"], total.pop("energies")
    if "energies" in properties:
        total["energies"] = energies + dispersion_energies(name, atoms)
    if "forces" in results:
        total["forces"] = results["forces"] + added.forces
    if "stress" in results:
        total["stress"] = results["stress"] + full_3x3_to_voigt_6_stress(added.virial / atoms.cell.volume)
    return total


def refuse_with_dispersion(name: str | None, what: str) -> None:
    if name is not None:
        raise PropertyNotImplementedError(
            f"{what} with dispersion {name!r}: dftd3 does not share its virial out among the atoms. That of the "
            "network alone: load_potential(...), set its dispersion to None, and make a calculator of it"
        )


def like(charges: np.ndarray, others: np.ndarray) -> np.ndarray:
    """With the sign of others: latent charges of neutral structures have no sign of their own."""
    return charges if charges @ others >= 0 or abs(charges.sum()) > 1e-6 else -charges


def refuse_with_charges(potentials: Sequence[Potential], what: str) -> None:
    if any(p.charges is not None for p in potentials):
        raise PropertyNotImplementedError(
            f"{what} with electrostatics: the share of each atom in the energy of plane waves is not known"
        )


def flux_of(potential: Potential, graph: Graph, atoms: Atoms, *, convective: bool) -> np.ndarray:
    near = within(graph, potential.cutoff)
    moving = (torch.as_tensor(x).to(potential.device) for x in (atoms.get_velocities(), atoms.get_masses()))
    flux, carried = heat_flux(potential, near, *moving)
    return as_numpy(flux + carried if convective else flux)


def as_numpy(x: torch.Tensor) -> np.ndarray:
    return x.numpy(force=True)
