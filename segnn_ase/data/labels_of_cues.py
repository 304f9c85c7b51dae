"""Labels of what belongs to cues, such as dipoles: every place where one may be, which is taken, and in which unit."""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units

from segnn_ase.base.errors import DataError, StructureError
from segnn_ase.base.label_names import PREFIXES
from segnn_ase.data.labels import Reading
from segnn_ase.data.units import stated_units, unit_value
from segnn_ase.structure.cue_settings import CONJUGATES, FIELD, OF_FIELD, Cue
from segnn_ase.structure.told import Told

NAMES = {**OF_FIELD, **{name: (name,) for name, _ in CONJUGATES.values()}}  # by kind, the usual one first
OF_STRUCTURE = ("dipole", "polarizability")  # arrays of these are of atoms, and something else
PER_VOLT = units.Bohr**2 / units.Hartree
UNITS: dict[str, dict[str, float]] = {  # what one is in e, Å, V and μB, as `_as_written` writes it; the usual one first
    "dipole": {"eå": 1.0, "ea": 1.0, "debye": units.Debye, "d": units.Debye, "ebohr": units.Bohr, "au": units.Bohr},
    "polarizability": {
        **dict.fromkeys(("eå^2/v", "ea^2/v"), 1.0),
        **dict.fromkeys(("å^3", "a^3"), 1.0 / (units.Hartree * units.Bohr)),
        **dict.fromkeys(("bohr^3", "au", "e^2bohr^2/ha", "e^2bohr^2/hartree"), PER_VOLT),
    },
    "born": {"e": 1.0, "au": 1.0},
    "magnetic_forces": {"ev/μb": 1.0, "ev/mub": 1.0, "ev/bohrmagneton": 1.0},
    "electronegativities": {"ev/e": 1.0, "v": 1.0, "ha/e": units.Hartree, "au": units.Hartree},
    FIELD: {"v/å": 1.0, "v/a": 1.0},  # which calculators read as it is
}


class LabelsOfCues(NamedTuple):
    """What was found."""

    values: Told  # one of each kind, under its usual name
    units: tuple[tuple[str, str], ...]  # kind and unit of those that were converted
    stated: frozenset[str]  # kinds of which a unit is stated


def labels_of_cues(atoms: Atoms, where: str) -> LabelsOfCues:
    """One of each kind: behind a prefix, as REF_dipole, before that of a calculator, and that before plain names, which
    may be of a model. Raises DataError for a unit that is not known."""
    stated, values, converted, known = stated_units(atoms.info), {}, [], []
    for kind, names in NAMES.items():
        for place, key, value in _places(atoms, kind):
            unit = next((stated[name.lower()] for name in (key, *names) if name.lower() in stated), None)
            factor = 1.0 if unit is None else _in_usual_units(kind, unit, where)
            values[place, names[0]] = copy.deepcopy(value) if factor == 1.0 else _times(value, factor, kind, where)
            converted += [(kind, unit)] if unit is not None and factor != 1.0 else []
            known += [kind] if unit is not None else []
            break
    if FIELD in stated:
        _in_usual_units(FIELD, stated[FIELD], where)
        known.append(FIELD)
    return LabelsOfCues(values, tuple(converted), frozenset(known))


def refuse_unknown_units(told: Told, reading: Reading, cues: Sequence[Cue]) -> None:
    """Raise StructureError for labels of these cues, or a field, whose unit is not stated, where energies or forces are
    not in ASE's."""
    others = {kind: unit for kind, unit in reading.units if kind in ("energy", "forces")}
    strange = [kind for kind, unit in others.items() if unit_value(unit, kind, "the file") != 1.0]
    names = {cue.name for cue in cues}
    kinds = {name for cue, (name, _) in CONJUGATES.items() if cue in names}
    kinds |= {*OF_FIELD, FIELD} if FIELD in names else set()
    there = {name for (_, name), value in told.items() if name != FIELD or np.any(value)}
    unsure = [kind for kind in sorted(kinds - reading.stated) if NAMES.get(kind, (kind,))[0] in there]
    if strange and unsure:
        raise StructureError(
            f"its {strange[0]} is in {others[strange[0]]!r}, but nothing is said of its {unsure[0]}: convert that to "
            f"{next(iter(UNITS[unsure[0]]))!r}, and state this as {unsure[0]}_unit"
        )


def _places(atoms: Atoms, kind: str) -> Iterator[tuple[str, str, Any]]:
    """Where it is, in order: place, name and value."""
    names, results = NAMES[kind], {} if atoms.calc is None else atoms.calc.results
    places = ("info",) if kind in OF_STRUCTURE else ("arrays", "info")
    stored = [(place, str(name), value) for place in places for name, value in getattr(atoms, place).items()]
    ranks = {f"{prefix}_{name}": rank for rank, prefix in enumerate(PREFIXES) for name in names}
    prefixed = [one for one in stored if one[1].lower() in ranks]
    yield from _there(sorted(prefixed, key=lambda one: ranks[one[1].lower()]))
    yield from _there([("info", name, results.get(name)) for name in names])
    yield from _there([one for name in names for one in stored if one[1] == name])


def _there(found: list[tuple[str, str, Any]]) -> Iterator[tuple[str, str, Any]]:
    return (one for one in found if one[2] is not None)


def _in_usual_units(kind: str, unit: str, where: str) -> float:
    factor = UNITS[kind].get(_as_written(unit))
    if factor is None:
        raise DataError(
            f"{where} says that its {kind} is in {unit!r}, which is no known unit of it: convert it to "
            f"{next(iter(UNITS[kind]))!r}, and say that, or nothing"
        )
    return factor


def _times(value: Any, factor: float, kind: str, where: str) -> np.ndarray:
    try:
        return factor * np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise DataError(f"{kind} of {where} is {value!r}; expected numbers") from None


def _as_written(unit: str) -> str:
    """In small letters, without blanks, signs of products and points, with one name for Å."""
    text = unit.lower().replace("**", "^").replace("²", "^2").replace("³", "^3")
    return re.sub(r"ångström|angstroms?|angs?", "å", re.sub(r"[\s*·_.]", "", text))
