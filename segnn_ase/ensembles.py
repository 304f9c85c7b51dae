"""Settings of molecular dynamics, and ASE's integrators with the degrees of freedom that there are."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet
from pydantic import Field, field_validator, model_validator

from segnn_ase.config import Settings

GUARDED = ("nve", "nhc", "npt")  # ensembles with a conserved energy
SUFFIXES = {"log": (".csv",), "trajectory": (".traj", ".xyz", ".extxyz"), "restart": (".npz",)}


class MDConfig(Settings):
    """Settings of one run of molecular dynamics.

    Ensembles: "nve" is velocity Verlet; "langevin" (NVT) also moves the centre of mass, so all 3N degrees of
    freedom are thermal; "nhc" (NVT) is a Nosé-Hoover chain and "npt" Martyna-Tobias-Klein. Settings of other
    ensembles than the chosen one are not read.
    """

    ensemble: Literal["nve", "langevin", "nhc", "npt"] = "nve"
    timestep: float = Field(0.5, gt=0, le=20, description="fs")
    steps: int = Field(1000, ge=0, description="in total; raise it to go on with a finished run")
    temperature: float = Field(300.0, gt=0, allow_inf_nan=False, description="K; of the first velocities in nve")
    pressure: float = Field(0.0, allow_inf_nan=False, description="GPa, npt")
    friction: float = Field(0.01, gt=0, le=1, description="1/fs, langevin")
    tdamp: float = Field(100.0, gt=0, allow_inf_nan=False, description="fs, time of the thermostat, nhc and npt")
    pdamp: float = Field(1000.0, gt=0, allow_inf_nan=False, description="fs, time of the barostat, npt")
    npt_cell: Literal["isotropic", "full"] = Field("isotropic", description="what the barostat moves: volume or cell")
    velocities: Literal["auto", "maxwell", "keep"] = Field("auto", description="auto: keep those that are not zero")
    seed: int = Field(0, ge=0)
    log: str | None = Field(None, description=".csv; eV, K, Å^3, GPa")
    log_every: int = Field(10, ge=1, description="steps")
    trajectory: str | None = Field(None, description=".traj, .xyz or .extxyz")
    save_every: int = Field(100, ge=1, description="steps between frames")
    restart: str | None = Field(None, description=".npz")
    checkpoint_every: int = Field(1000, ge=1, description="steps between restart files")
    max_temperature: float | None = Field(10_000.0, gt=0, description="K; a hotter step stops the run")
    max_energy_drift: float | None = Field(None, gt=0, description="eV/atom of the conserved energy since step 0")
    max_forces_std: float | None = Field(None, gt=0, description="eV/Å, largest uncertainty of a force component")
    stop_outside_domain: bool = Field(False, description="stop at a structure outside the training data")
    max_minutes: float | None = Field(None, gt=0, description="of wall-clock time; then the run can be gone on with")

    @field_validator("log", "trajectory", "restart", mode="before")
    @classmethod
    def _path(cls, value):
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _consistent(self):
        for name, suffixes in SUFFIXES.items():
            path = getattr(self, name)
            if path is not None and Path(path).suffix not in suffixes:
                raise ValueError(f"{name} is {path!r}; expected a name that ends in {' or '.join(suffixes)}")
        if self.ensemble in ("nhc", "npt") and self.tdamp < 10 * self.timestep:
            raise ValueError(f"tdamp is {self.tdamp} fs; expected at least 10 time steps, 100 are usual")
        if self.ensemble == "npt" and self.pdamp < self.tdamp:
            raise ValueError(
                f"pdamp is {self.pdamp} fs; expected at least tdamp, {self.tdamp} fs; 10 times it is usual"
            )
        if self.ensemble != "npt" and self.pressure != 0:
            raise ValueError(f"pressure is {self.pressure} GPa, but ensemble {self.ensemble!r} has none: use 'npt'")
        if self.ensemble not in GUARDED and self.max_energy_drift is not None:
            raise ValueError(f"max_energy_drift is set, but ensemble {self.ensemble!r} conserves no energy: remove it")
        return self


def set_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution, without total momentum, for molecules without rotation.

    What is left after the projection is the canonical distribution of the other degrees of freedom: it needs
    no rescaling. With constraints nothing is projected out.
    """
    masses = atoms.get_masses()[:, None]  # (N, 1) amu
    velocities = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature / masses)
    if not atoms.constraints:
        velocities -= (masses * velocities).sum(axis=0) / masses.sum()
        if not atoms.pbc.any():
            arms, inertia = _inertia(atoms)
            # pinv: the inertia about the axis of a linear molecule is zero
            spin = np.linalg.pinv(inertia, rcond=1e-8, hermitian=True) @ np.cross(arms, masses * velocities).sum(axis=0)
            velocities -= np.cross(spin, arms)
    atoms.set_momenta(masses * velocities)


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Count the degrees of freedom that share the thermal energy.

    All ensembles but "langevin" conserve the total momentum, and of a molecule the angular one: those that
    are zero stay so and hold no heat.
    """
    count = atoms.get_number_of_degrees_of_freedom()
    if ensemble == "langevin" or atoms.constraints:
        return count
    momenta = atoms.get_momenta()
    arms, inertia = _inertia(atoms)
    if np.linalg.norm(momenta.sum(axis=0)) <= 1e-4 * np.linalg.norm(momenta):
        count -= 3
        turning = np.cross(arms, momenta).sum(axis=0)
        scale = np.linalg.norm(arms) * np.linalg.norm(momenta)
        if not atoms.pbc.any() and np.linalg.norm(turning) <= 1e-4 * scale:
            count -= np.linalg.matrix_rank(inertia, tol=1e-8 * np.trace(inertia), hermitian=True)
    return max(int(count), 1)


def _inertia(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Return positions from the centre of mass (N, 3) Å and the tensor of inertia (3, 3) amu Å^2."""
    arms = atoms.positions - atoms.get_center_of_mass()
    second = np.einsum("n,na,nb->ab", atoms.get_masses(), arms, arms)
    return arms, np.trace(second) * np.eye(3) - second


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
