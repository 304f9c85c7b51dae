"""The table of ensembles: a new one is a new row, and nothing else.

Which settings are valid, how many degrees of freedom share the heat, what a restart file keeps and what the help
texts say all follow from the row. ASE is imported where an integrator is made: settings are read without it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from segnn_ase.base.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from ase import Atoms
    from ase.md.md import MolecularDynamics

THERMOSTAT = ("_thermostat._eta", "_thermostat._p_eta")
BAROSTAT = ("_barostat._xi", "_barostat._p_xi")
CELL = {"isotropic": ("_eps", "_p_eps", "_cell0", "_volume0"), "full": ("_p_g",)}  # by npt_cell


class Ensemble(NamedTuple):
    """What is needed of an ensemble; config is an `MDConfig`, which is validated by this table."""

    about: str  # in a few words, for help texts
    make: Callable[..., "MolecularDynamics"]  # (atoms, config, rng, degrees of freedom) -> ASE's integrator
    reads: tuple[str, ...] = ()  # settings that not every ensemble reads; one with a pressure moves the cell
    state: Callable[[Any], tuple[str, ...]] = lambda config: ()  # what the integrator remembers besides the atoms
    conserved: Callable[["MolecularDynamics"], float] | None = None  # energy in eV; NaN where it is not known
    centre_moves: bool = False  # the total momentum is not kept, so all 3N degrees of freedom are thermal
    constraints: bool = True  # atoms may be held
    driven: bool = False  # a step takes the forces before it, so that a field may change meanwhile


def readers(setting: str) -> str:
    """The names of the ensembles that read a setting."""
    return ", ".join(name for name, ensemble in ENSEMBLES.items() if setting in ensemble.reads)


def make_dynamics(atoms: "Atoms", config, rng: "np.random.Generator", dof: int) -> "MolecularDynamics":
    """Return ASE's integrator, its thermostat set to the degrees of freedom that there are."""
    return ENSEMBLES[config.ensemble].make(atoms, config, rng, dof)


def state_names(config) -> tuple[str, ...]:
    """Attributes of the integrator that a restart file keeps."""
    return ENSEMBLES[config.ensemble].state(config)


def _verlet(atoms, config, rng, dof):
    from ase import units
    from ase.md.verlet import VelocityVerlet

    return VelocityVerlet(atoms, config.timestep * units.fs)


def _langevin(atoms, config, rng, dof):
    from ase import units
    from ase.md.langevin import Langevin

    heat = {"temperature_K": config.temperature, "friction": config.friction / units.fs, "rng": rng}
    return Langevin(atoms, config.timestep * units.fs, fixcm=False, **heat)


def _rescaling(atoms, config, rng, dof):
    from ase import units
    from ase.md.bussi import Bussi

    if atoms.get_kinetic_energy() <= 1e-12:
        raise ConfigError("momenta of atoms are zero, which 'bussi' cannot scale; expected velocities that are not")
    heat = {"temperature_K": config.temperature, "taut": config.tdamp * units.fs, "rng": rng}
    dynamics = Bussi(atoms, config.timestep * units.fs, **heat)
    dynamics.ndof = dof  # ASE counts 3N, see `_count`
    dynamics.target_kinetic_energy = dof / 2 * units.kB * config.temperature
    return dynamics


def _chain(atoms, config, rng, dof):
    from ase import units
    from ase.md.nose_hoover_chain import NoseHooverChainNVT

    heat = {"temperature_K": config.temperature, "tdamp": config.tdamp * units.fs}
    return _count(NoseHooverChainNVT(atoms, config.timestep * units.fs, **heat), dof)


def _barostat(atoms, config, rng, dof):
    from ase import units
    from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT

    heat = {"temperature_K": config.temperature, "tdamp": config.tdamp * units.fs}
    push = {"pressure_au": config.pressure * units.GPa, "pdamp": config.pdamp * units.fs}
    kind = {"isotropic": IsotropicMTKNPT, "full": MTKNPT}[config.npt_cell]
    dynamics = _count(kind(atoms, config.timestep * units.fs, **heat, **push), dof)
    dynamics._num_atoms_global = dof / 3
    if config.npt_cell == "full":
        # ASE counts 9, but the momentum of the cell is symmetric: it would be held at 1.5 times the temperature
        dynamics._barostat._cell_dof = 6
        dynamics._barostat._R[0] *= 6 / 9
    return dynamics


def _count(dynamics, dof: int):
    """ASE counts 3N: with the centre of mass at rest, what moves would be hotter by 3N/dof, a sixth for 15 atoms."""
    dynamics._thermostat._num_atoms_global = dof / 3
    dynamics._thermostat._Q[0] *= dof / (3 * len(dynamics.atoms))
    return dynamics


def _total(dynamics) -> float:
    return float(dynamics.atoms.get_potential_energy()) + float(dynamics.atoms.get_kinetic_energy())


def _untransferred(dynamics) -> float:
    return _total(dynamics) - float(dynamics.transferred_energy)


def _extended(dynamics) -> float:
    """The energy with that of thermostat and barostat, from the energy that belongs to the forces."""
    known = "free_energy" in dynamics.atoms.calc.implemented_properties
    return dynamics.get_conserved_energy() if known else float("nan")


ENSEMBLES = {
    "nve": Ensemble("constant energy, velocity Verlet", _verlet, conserved=_total, driven=True),
    "langevin": Ensemble(
        "constant temperature by friction and noise", _langevin, ("friction",), centre_moves=True, driven=True
    ),
    "bussi": Ensemble(
        "constant temperature by stochastic rescaling of velocities",
        _rescaling,
        ("tdamp",),
        state=lambda config: ("transferred_energy",),
        conserved=_untransferred,
        driven=True,
    ),
    "nhc": Ensemble(
        "constant temperature by a Nosé-Hoover chain",
        _chain,
        ("tdamp",),
        state=lambda config: THERMOSTAT,
        conserved=_extended,
        constraints=False,
    ),
    "npt": Ensemble(
        "constant temperature and pressure, Martyna-Tobias-Klein",
        _barostat,
        ("tdamp", "pressure", "pdamp", "npt_cell"),
        state=lambda config: (*THERMOSTAT, *BAROSTAT, *CELL[config.npt_cell]),
        conserved=_extended,
        constraints=False,
    ),
}
