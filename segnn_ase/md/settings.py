"""Settings of molecular dynamics, and ASE's integrators with the degrees of freedom that there are."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings

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
