"""Settings of molecular dynamics, and ASE's integrators with the degrees of freedom that there are."""

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from segnn_ase.md.settings import MDConfig


def make_dynamics(atoms: Atoms, config: MDConfig, rng: np.random.Generator, dof: int) -> MolecularDynamics:
    """Return ASE's integrator, its thermostat set to the degrees of freedom that there are."""
    timestep, tdamp = config.timestep * units.fs, config.tdamp * units.fs
    if config.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    if config.ensemble == "langevin":
        friction = config.friction / units.fs
        return Langevin(atoms, timestep, temperature_K=config.temperature, friction=friction, fixcm=False, rng=rng)
    if config.ensemble == "nhc":
        dynamics = NoseHooverChainNVT(atoms, timestep, temperature_K=config.temperature, tdamp=tdamp)
    else:
        dynamics = {"isotropic": IsotropicMTKNPT, "full": MTKNPT}[config.npt_cell](
            atoms,
            timestep,
            temperature_K=config.temperature,
            pressure_au=config.pressure * units.GPa,
            tdamp=tdamp,
            pdamp=config.pdamp * units.fs,
        )
        dynamics._num_atoms_global = dof / 3
    # ASE counts 3N: with the centre of mass at rest, what moves would be hotter by 3N/dof, a sixth for 15 atoms
    dynamics._thermostat._num_atoms_global = dof / 3
    dynamics._thermostat._Q[0] *= dof / (3 * len(atoms))
    if config.ensemble == "npt" and config.npt_cell == "full":
        # ASE counts 9, but the momentum of the cell is symmetric: it would be held at 1.5 times the temperature
        dynamics._barostat._cell_dof = 6
        dynamics._barostat._R[0] *= 6 / 9
    return dynamics


THERMOSTAT = ("_thermostat._eta", "_thermostat._p_eta")
BAROSTAT = ("_barostat._xi", "_barostat._p_xi")
STATE = {  # what an integrator remembers besides the atoms
    "nve": (),
    "langevin": (),
    "nhc": THERMOSTAT,
    "isotropic": (*THERMOSTAT, *BAROSTAT, "_eps", "_p_eps", "_cell0", "_volume0"),
    "full": (*THERMOSTAT, *BAROSTAT, "_p_g"),
}


def state_names(config: MDConfig) -> tuple[str, ...]:
    return STATE[config.npt_cell if config.ensemble == "npt" else config.ensemble]
