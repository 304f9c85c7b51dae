"""What a structure, its calculator and the settings of a run need of each other."""

import numpy as np
from ase import Atoms
from ase.data import atomic_masses

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.md.ensembles import ENSEMBLES
from segnn_ase.md.settings import MDConfig
from segnn_ase.md.subject import summands
from segnn_ase.structure.cue_settings import FIELD
from segnn_ase.structure.ions import is_charged


def check_run(atoms: Atoms, config: MDConfig) -> None:
    """Raise ConfigError where structure, calculator and settings do not fit together."""
    expect(isinstance(config, MDConfig), "config", config, "an MDConfig")
    if atoms.calc is None or not len(atoms):
        raise ConfigError("atoms has no calculator: set atoms.calc" if len(atoms) else "atoms is empty")
    unknown = (atoms.numbers < 0) | (atoms.numbers >= len(atomic_masses))
    if unknown.any():
        atom = int(np.flatnonzero(unknown)[0])
        raise ConfigError(f"atom {atom} has the atomic number {atoms.numbers[atom]}; expected up to 118")
    if not (atoms.get_masses() > 0).all():
        raise ConfigError(f"masses of atoms {np.flatnonzero(atoms.get_masses() <= 0).tolist()} are zero; set_masses")
    if not np.isfinite(atoms.get_momenta()).all():
        atom = int(np.flatnonzero(~np.isfinite(atoms.get_momenta()).all(axis=1))[0])
        raise ConfigError(f"momenta of atom {atom} are {atoms.get_momenta()[atom].tolist()}; expected finite numbers")
    if (left := atoms.get_number_of_degrees_of_freedom()) <= 0:
        counted = f"of {3 * len(atoms)} degrees of freedom constraints leave {left}"
        raise ConfigError(f"{counted}: free an atom, or hold none by two constraints, which counts it twice")
    heated = bool(ENSEMBLES[config.ensemble].reads)  # at constant energy the temperature is that of velocities at most
    if heated and config.max_temperature is not None and config.temperature > config.max_temperature:
        limit = f"max_temperature, which stops a run, is {config.max_temperature:g} K"
        raise ConfigError(f"temperature is {config.temperature:g} K, but {limit}: raise that, too")
    check_ensemble(atoms, config)
    if config.max_energy_drift is not None and not implements(atoms, "free_energy"):
        raise ConfigError(f"max_energy_drift needs the free_energy; {type(atoms.calc).__name__} does not implement it")


def check_ensemble(atoms: Atoms, config: MDConfig) -> None:
    """Raise ConfigError where the structure or its calculator has not what the ensemble needs."""
    name = f"ensemble {config.ensemble!r}"
    if atoms.constraints and not ENSEMBLES[config.ensemble].constraints:
        others = " or ".join(repr(other) for other, row in ENSEMBLES.items() if row.constraints)
        raise ConfigError(f"{name} cannot hold constraints: remove them, or use {others}")
    row = ENSEMBLES[config.ensemble]
    if row.reads and not row.centre_moves and flies_away(atoms, config):
        others = " or ".join(repr(other) for other, row in ENSEMBLES.items() if row.centre_moves or not row.reads)
        raise ConfigError(
            f"{name} takes the motion of the whole for heat, and a field pulls the ion away, which would freeze it: "
            f"use {others}"
        )
    if has_barostat(config) and not atoms.pbc.all():
        raise ConfigError(f"{name} needs pbc in three directions, not {atoms.pbc.tolist()}: use one without pressure")
    if has_barostat(config) and not implements(atoms, "stress"):
        raise ConfigError(f"{name} needs the stress, which {type(atoms.calc).__name__} does not implement")


def flies_away(atoms: Atoms, config: MDConfig) -> bool:
    """Whether a field accelerates a molecule as a whole, by its net charge."""
    field = atoms.info.get(FIELD) if config.field is None else config.field
    feeling = [calc for calc, _ in summands(atoms.calc) if FIELD in getattr(calc, "told_names", ())]
    pulled = feeling and not atoms.pbc.any() and is_something(field)
    return bool(pulled) and any(is_charged(atoms, getattr(calc, "cues", ())) for calc in feeling)


def is_turned(atoms: Atoms, config: MDConfig) -> bool:
    """Whether a calculator is told of a direction in space, so that the angular momentum is not conserved: a field, or
    vectors of atoms, but for moments of which only the angles count."""
    told = {**atoms.arrays, **atoms.info} | ({} if config.field is None else {FIELD: config.field})
    cues = [cue for calc, _ in summands(atoms.calc) for cue in getattr(calc, "cues", ())]
    names = {cue.name for cue in cues if cue.kind == "polar" or cue.spin_orbit}
    return any(is_something(told.get(name)) for name in names)


def is_something(value) -> bool:
    """Whether a vector is there and not zero; of what is none the calculator will tell."""
    try:
        return value is not None and bool(np.any(np.asarray(value, dtype=float)))
    except (TypeError, ValueError):
        return True


def has_barostat(config: MDConfig) -> bool:
    return "pressure" in ENSEMBLES[config.ensemble].reads


def implements(atoms: Atoms, name: str) -> bool:
    return name in atoms.calc.implemented_properties
