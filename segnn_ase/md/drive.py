"""A uniform electric field that a run brings along, constant or oscillating, and what it does to the energy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from ase import Atoms
from ase.md.md import MolecularDynamics

from segnn_ase.base.errors import ConfigError
from segnn_ase.md.ensembles import ENSEMBLES
from segnn_ase.md.settings import LIGHT, MDConfig
from segnn_ase.md.subject import forget, summands
from segnn_ase.structure.cue_settings import FIELD


class Drive:
    """F cos(2 pi c nu t), in place of the field that the structure has.

    It does the work W = -sum of mu . dF/dt over time, by the trapezoidal rule: time is a coordinate of velocity Verlet,
    which sees the field of a step in the forces before and after it (one call for each step), and conserves the energy
    less W as well as it conserves the energy in a constant field.
    """

    def __init__(self, atoms: Atoms, config: MDConfig):
        self.atoms, self.timestep = atoms, config.timestep
        self.amplitude = np.array(config.field, dtype=float)  # V/Å
        self.omega = 2.0 * math.pi * LIGHT * config.field_frequency  # 1/fs
        self.work = 0.0  # eV
        self.place(0)

    def place(self, step: int) -> None:
        """The field at a step, among what the structure tells its calculator."""
        self.atoms.info[FIELD] = self.amplitude * math.cos(self.omega * step * self.timestep)
        forget(self.atoms.calc)

    def step(self, dynamics: MolecularDynamics, step: int) -> None:
        """The one that ends as this one."""
        if not self.omega:
            dynamics.step()  # type: ignore[attr-defined] # of every integrator
            return
        forces, before = self.atoms.get_forces(md=True), self.power(step - 1)
        self.place(step)
        dynamics.step(forces)  # type: ignore[attr-defined] # of those that `driven` lets through
        self.work += 0.5 * self.timestep * (before + self.power(step))

    def power(self, step: int) -> float:
        """-mu . dF/dt, eV/fs, of atoms whose forces were asked for."""
        rate = -self.omega * math.sin(self.omega * step * self.timestep) * self.amplitude
        return -float(dipole_of(self.atoms.calc) @ rate)


@contextmanager
def driven(atoms: Atoms, config: MDConfig) -> Iterator[Drive | None]:
    """The field of a run, None where the settings have none; in the end atoms have what they had before.

    Raises ConfigError for a calculator that knows no field, and an ensemble that cannot follow.
    """
    if config.field is None:
        yield None
        return
    if not any(map(_feels, (calc for calc, _ in summands(atoms.calc)))):
        raise ConfigError(
            f"field is {config.field}, but {type(atoms.calc).__name__} knows no {FIELD}: train a potential with "
            f"cues = ['{FIELD}'], or leave it out"
        )
    if config.field_frequency and not ENSEMBLES[config.ensemble].driven:
        others = ", ".join(repr(name) for name, row in ENSEMBLES.items() if row.driven)
        raise ConfigError(
            f"field_frequency is {config.field_frequency:g} cm^-1, which ensemble {config.ensemble!r} cannot follow: "
            f"use {others}"
        )
    before = atoms.info.get(FIELD)
    try:
        yield Drive(atoms, config)
    finally:
        atoms.info[FIELD] = before
        if before is None:
            del atoms.info[FIELD]
        forget(atoms.calc)


def dipole_of(calc) -> np.ndarray:
    """(3,) e Å, of all parts of a sum of calculators that feel the field. Raises ConfigError where one tells none."""
    parts = [(part, weight) for part, weight in summands(calc) if _feels(part)]
    if any("dipole" not in part.results for part, _ in parts):
        raise ConfigError(
            f"field_frequency is set, but {type(calc).__name__} gives no dipole here, as of periodic ions, so that the "
            "work of the field is not known: expected neutral structures, or molecules"
        )
    return np.sum([weight * part.results["dipole"] for part, weight in parts], axis=0)


def _feels(calc) -> bool:
    return FIELD in getattr(calc, "told_names", ())
