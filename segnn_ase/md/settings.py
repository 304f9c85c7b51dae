"""Settings of molecular dynamics; what an ensemble allows and reads stands in its row of `ENSEMBLES`."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings
from segnn_ase.md.ensembles import ENSEMBLES, readers

LIGHT = 2.99792458e-5  # cm/fs
FEWEST = 20  # steps of a period of the field
RUBBED = 0.5  # friction times time step: the second-order integrator is 0.1 % too hot there, 10 % at 1.5, 40 % at 2
SUFFIXES = {"log": (".csv",), "trajectory": (".traj", ".xyz", ".extxyz"), "restart": (".npz",)}


class MDConfig(Settings):
    """Settings of one run of molecular dynamics; those that the chosen ensemble does not read are not used."""

    ensemble: str = Field("langevin", description="; ".join(f"{name}: {row.about}" for name, row in ENSEMBLES.items()))
    timestep: float = Field(0.5, gt=0, le=20, description="fs")
    steps: int = Field(1000, ge=0, description="in total; raise it to go on with a finished run")
    temperature: float = Field(300.0, gt=0, description="K; without a thermostat of the first velocities alone")
    pressure: float = Field(0.0, description=f"GPa; {readers('pressure')}")
    friction: float = Field(0.01, gt=0, le=1, description=f"1/fs; {readers('friction')}")
    tdamp: float = Field(100.0, gt=0, description=f"fs, time of the thermostat; {readers('tdamp')}")
    pdamp: float = Field(1000.0, gt=0, description=f"fs, time of the barostat; {readers('pdamp')}")
    npt_cell: Literal["isotropic", "full"] = Field(
        "isotropic", description=f"what the barostat moves, volume or cell; {readers('npt_cell')}"
    )
    field: tuple[float, float, float] | None = Field(
        None,
        description="V/Å, a uniform electric field in place of that of the structure, for potentials that know one",
    )
    field_frequency: float = Field(
        0.0, ge=0, le=1e5, description="1/cm, of the field, F cos(2 pi c nu t); 0: it is constant"
    )
    velocities: Literal["auto", "maxwell", "keep"] = Field(
        "auto", description="at the start: drawn anew, kept, or (auto) drawn where all are zero"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of first velocities and thermostat")
    log: str | None = Field(None, description=".csv; eV, K, Å^3, GPa")
    log_every: int = Field(10, ge=1, description="steps between rows of the log")
    trajectory: str | None = Field(None, description=".traj, .xyz or .extxyz")
    save_every: int = Field(100, ge=1, description="steps between frames of the trajectory")
    restart: str | None = Field(None, description=".npz, from which the same call goes on")
    checkpoint_every: int = Field(1000, ge=1, description="steps between restart files")
    max_temperature: float | None = Field(10_000.0, gt=0, description="K; a hotter step stops the run")
    max_energy_drift: float | None = Field(
        None, gt=0, description="eV/atom of the conserved energy since step 0; a larger one stops the run"
    )
    max_forces_std: float | None = Field(
        None, gt=0, description="eV/Å, uncertainty of a force component; a larger one stops the run"
    )
    stop_outside_domain: bool = Field(False, description="stop at a structure outside the training data")
    outside_steps: int = Field(0, ge=0, description="steps in a row outside, or too uncertain, that do not stop it yet")
    max_minutes: float | None = Field(
        None, gt=0, description="minutes of wall-clock time; then the run can be gone on with"
    )

    @field_validator("ensemble")
    @classmethod
    def _in_the_table(cls, value: str) -> str:
        if value not in ENSEMBLES:
            raise ValueError(f"expected one of {', '.join(ENSEMBLES)}")
        return value

    @field_validator("log", "trajectory", "restart", mode="before")
    @classmethod
    def _path(cls, value):
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _files(self):
        for name, suffixes in SUFFIXES.items():
            path = getattr(self, name)
            if path is not None and Path(path).suffix not in suffixes:
                raise ValueError(f"{name} is {path!r}; expected a name that ends in {' or '.join(suffixes)}")
        return self

    @model_validator(mode="after")
    def _damping_times(self):
        reads, rubbed = ENSEMBLES[self.ensemble].reads, self.friction * self.timestep
        if "tdamp" in reads and self.tdamp < 10 * self.timestep:
            raise ValueError(f"tdamp is {self.tdamp} fs; expected at least 10 time steps, 100 are usual")
        if "friction" in reads and rubbed > RUBBED:
            raise ValueError(
                f"friction is {self.friction:g} 1/fs and timestep {self.timestep:g} fs; expected a product of {RUBBED} "
                f"at most, as it is too hot beyond; {self.friction:g} 1/ps would be {1e-3 * self.friction:g}"
            )
        if "pdamp" in reads and self.pdamp < self.tdamp:
            raise ValueError(
                f"pdamp is {self.pdamp} fs; expected at least tdamp, {self.tdamp} fs; 10 times it is usual"
            )
        return self

    @model_validator(mode="after")
    def _field(self):
        if self.field is None and self.field_frequency:
            raise ValueError(f"field_frequency is {self.field_frequency:g}, but there is no field: set that, too")
        if FEWEST * LIGHT * self.field_frequency * self.timestep > 1:
            turn = f"field_frequency is {self.field_frequency:g} cm^-1 and timestep {self.timestep:g} fs"
            raise ValueError(f"{turn}: less than {FEWEST} steps a period; expected a smaller one")
        return self

    @model_validator(mode="after")
    def _of_the_ensemble(self):
        ensemble = ENSEMBLES[self.ensemble]
        if "pressure" not in ensemble.reads and self.pressure != 0:
            has = f"ensemble {self.ensemble!r} has none: use {readers('pressure')!r}"
            raise ValueError(f"pressure is {self.pressure} GPa, but {has}")
        if ensemble.conserved is None and self.max_energy_drift is not None:
            raise ValueError(f"max_energy_drift is set, but ensemble {self.ensemble!r} conserves no energy: remove it")
        return self
