"""Labels of one structure: every place where one may be, which is taken, in which unit, and what was left aside."""

import math
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from segnn_ase.base.errors import DataError
from segnn_ase.base.label_names import PREFIXES, looks_like, means_virial, usual_name
from segnn_ase.base.settings import Settings
from segnn_ase.data.cut_forces import mask_of, without_cut_forces
from segnn_ase.data.units import stated_units, unit_of, unit_value

CALCULATOR = "calculator"
RESULTS = ("energy", "free_energy", "forces", "stress")
LARGEST = {"energy": 1e12, "forces": 1e8, "stress": 1e8, "virial": 1e12}  # eV, Å; none of matter is larger
SAME = {"energy": 1e-6, "forces": 1e-4, "stress": 1e-6}  # eV/atom, eV/Å, eV/Å^3, between two sources that agree


class LabelKeys(Settings):
    """Names of the labels in `atoms.info` and (forces) `atoms.arrays`; None searches the usual ones."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None  # a name that says virial is one
    virial: str | None = None  # eV, minus stress times volume
    forces_mask: str | None = None  # array that is true where a force counts
    inputs: tuple[str, ...] = ()  # what a potential is told besides, under names that are not ASE's


class Source(NamedTuple):
    """A place where a label is; the smallest rank is taken."""

    rank: float
    name: str
    kind: str  # energy, free_energy, forces, stress or virial
    prefix: str
    value: object


class Rival(NamedTuple):
    """Another place where a label is, with another value."""

    kind: str
    name: str
    difference: float  # of what is taken less this, eV/atom; of forces and stress the largest, eV/Å and eV/Å^3


class Reading(NamedTuple):
    """How the labels of a frame were read."""

    isolated: bool = False  # named so in the file
    cut: str = ""  # why some forces are unknown
    rivals: tuple[Rival, ...] = ()
    agreeing: tuple[str, ...] = ()  # other places with the same values
    unread: tuple[tuple[str, str], ...] = ()  # kind and name of what looks like a label
    units: tuple[tuple[str, str], ...] = ()  # kind and unit, of labels that were converted
    no_stress: bool = False  # whether it was exactly zero, and forces were not
    stated: frozenset[str] = frozenset()  # kinds of labels of cues whose unit is stated


class Found(NamedTuple):
    """Labels and where they were found."""

    energy: float | None  # eV
    forces: np.ndarray | None  # (N, 3) eV/Å, NaN where they are cut
    stress: np.ndarray | None  # (3, 3) eV/Å^3
    origins: tuple[str | None, str | None, str | None]
    reading: Reading


def find_labels(atoms: Atoms, keys: LabelKeys, where: str) -> Found:
    """Take the labels from where the keys say, else from names with a prefix, the calculator, or plain names.

    Raises DataError for labels of the wrong shape or unit and for those that are NaN.
    """
    sources, stated = usual_sources(atoms), stated_units(atoms.info)
    by_kind = {
        "energy": _named(atoms, energy=keys.energy) or _energies(sources, len(atoms)),
        "forces": _named(atoms, forces=keys.forces) or [s for s in sources if s.kind == "forces"],
        "stress": _stresses(atoms, sources, keys) if atoms.pbc.all() else [],
    }
    name, mask = mask_of(atoms, keys.forces_mask, where)
    if name:  # what does not count may be no number
        by_kind["forces"] = [without_masked(source, mask) for source in by_kind["forces"]]
    values, origins, rivals, agreeing = {}, [], [], []
    for kind, candidates in by_kind.items():
        values[kind] = value_of(candidates[0], atoms, stated, where) if candidates else None
        origins.append(None if values[kind] is None else candidates[0].name)
        for other in candidates[1:]:
            rival = _rival(kind, values[kind], other, atoms, stated, where)
            rivals += [rival] if rival else []
            agreeing += [] if rival else [other.name]
    taken = {kind: candidates[0] for kind, candidates in by_kind.items() if values[kind] is not None}
    units = {kind: unit for kind, s in taken.items() if (unit := unit_of(stated, plain(s), physical_kind(s)))}
    check_units(taken, units, stated, where)
    cut = ""
    if values["forces"] is not None:
        values["forces"], cut = without_cut_forces(atoms, values["forces"], keys.forces_mask, where)
        if np.isnan(values["forces"]).all():
            values["forces"], origins[1] = None, None
    seen = {plain(s) for s in (*taken.values(), *sources)}
    unread = tuple((kind, name) for kind, name in look_alikes(atoms) if name not in seen)
    reading = Reading(is_named_isolated(atoms), cut, tuple(rivals), tuple(agreeing), unread, tuple(units.items()))
    return Found(values["energy"], values["forces"], values["stress"], tuple(origins), reading)


def without_masked(source: Source, mask: np.ndarray) -> Source:
    """Forces with zeros where they do not count and are no numbers, if they have the shape of forces."""
    value = np.asarray(source.value)
    fits = value.shape == mask.shape and value.dtype.kind in "iuf"
    return source._replace(value=np.where(mask | np.isfinite(value), value, 0.0)) if fits else source


def usual_sources(atoms: Atoms) -> list[Source]:
    """Everything under a usual name: with a prefix, of the calculator, or without a prefix, in this order."""
    results = {} if atoms.calc is None else atoms.calc.results
    found = [
        Source(len(PREFIXES), f"{CALCULATOR} {n}", n, "", results[n]) for n in RESULTS if results.get(n) is not None
    ]
    arrays = {name: value for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}
    for name, value in (*atoms.info.items(), *arrays.items()):
        usual = usual_name(str(name))
        if usual is None or value is None or _is_per_atom(str(name), value, len(atoms)):
            continue
        if name in arrays and usual.kind != "forces":
            continue
        if len(str(name)) == 1 and looks_like(name, value, len(atoms)) != usual.kind:
            continue  # E may be a field, F anything
        rank = PREFIXES.index(usual.prefix) if usual.prefix else len(PREFIXES) + 1 + (len(str(name)) == 1)
        found.append(Source(rank, str(name), usual.kind, usual.prefix, value))
    return sorted(found, key=lambda s: (s.rank, s.kind))


def _is_per_atom(name: str, value, size: int) -> bool:
    """In ASE the plural is of atoms: (N,) energies, (N, 6) stresses."""
    return name.endswith("s") and not name.endswith("stress") and size > 1 and _is_of_atoms(np.shape(value), name, size)


def _is_of_atoms(shape: tuple, name: str, size: int) -> bool:
    kind = usual_name(name).kind
    if kind in ("energy", "free_energy"):
        return shape == (size,)
    return kind in ("stress", "virial") and shape in ((size, 6), (size, 9), (size, 3, 3))


def _named(atoms: Atoms, **keys: str | None) -> list[Source]:
    """Where the keys say, by kind; a key that this structure lacks gives a source of nothing."""
    results = {} if atoms.calc is None else atoms.calc.results
    store = {**results, **atoms.info, **atoms.arrays}
    given = {kind: key for kind, key in keys.items() if key is not None}
    return [Source(0, key, kind, "", store.get(key)) for kind, key in given.items()]


def _energies(sources: list[Source], size: int) -> list[Source]:
    """Energies in order. Forces are the derivative of the free energy, where both are there and differ."""
    energies = [s for s in sources if s.kind == "energy"]
    free = [s for s in sources if s.kind == "free_energy"]
    has_forces = size == 1 or any(s.kind == "forces" for s in sources)
    if not energies:
        return free
    of_forces = [s for s in free if (s.rank, s.prefix) == (energies[0].rank, energies[0].prefix)]
    if not (has_forces and of_forces) or _close(of_forces[0].value, energies[0].value, size):
        return energies + of_forces
    return of_forces + energies


def _close(a, b, size: int) -> bool:
    try:
        return bool(np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=SAME["energy"] * size))
    except (TypeError, ValueError):
        return True  # no numbers: told where the energy itself is read


def _stresses(atoms: Atoms, sources: list[Source], keys: LabelKeys) -> list[Source]:
    named = keys.stress is not None and means_virial(keys.stress)
    given = _named(atoms, **{"virial" if named else "stress": keys.stress}) + _named(atoms, virial=keys.virial)
    return [s for s in given if s.value is not None] or given or [s for s in sources if s.kind in ("stress", "virial")]


def value_of(source: Source, atoms: Atoms, stated: dict[str, str], where: str):
    """The label in eV and Å: a number, (N, 3) forces or a (3, 3) stress; None where there is none."""
    kind, name = physical_kind(source), source.name
    shape = {"energy": (), "forces": (len(atoms), 3)}.get(kind, (3, 3))
    value = checked(kind, source.value, shape, where, name)
    if value is None:
        return None
    if unit := unit_of(stated, plain(source), kind):
        value = value * unit_value(unit, kind, where)
    if kind != "virial":
        return value
    if atoms.cell.rank < 3:
        raise DataError(f"virial of {where} (from {name}) needs a volume, but cell is {atoms.cell.tolist()}")
    return -value / atoms.cell.volume


def physical_kind(source: Source) -> str:
    return "energy" if source.kind == "free_energy" else source.kind


def plain(source: Source) -> str:
    return source.name.removeprefix(f"{CALCULATOR} ")


def checked(name: str, value, shape: tuple[int, ...], where: str, origin: str):
    """The value as a float or an array of this shape, None as it is. Raises DataError for all else."""
    if value is None:
        return None
    try:
        if np.asarray(value).dtype == bool:
            raise TypeError  # energy=T is no number
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise DataError(f"{name} of {where} (from {origin}) is {value!r}; expected numbers") from None
    if shape == (3, 3) and array.shape == (6,):
        array = voigt_6_to_full_3x3_stress(array)
    if shape in ((), (3, 3)) and array.size == math.prod(shape):
        array = array.reshape(shape)
    if array.shape != shape:
        raise DataError(f"{name} of {where} (from {origin}) has shape {array.shape}; expected {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name} of {where} (from {origin}) has NaN or infinite values: drop or repair that frame")
    if array.size and np.abs(array).max() > LARGEST.get(name, math.inf):
        place = tuple(map(int, np.unravel_index(np.abs(array).argmax(), shape)))
        atom = f" of atom {place[0]}" if name == "forces" else ""
        raise DataError(
            f"{name} of {where} (from {origin}) is {array[place]:.3g}{atom}; expected up to {LARGEST[name]:g} in eV "
            "and Å: drop or repair that frame"
        )
    return float(array) if shape == () else array


def _rival(kind: str, taken, other: Source, atoms: Atoms, stated: dict[str, str], where: str) -> Rival | None:
    """What is in another place, if it can be read and differs."""
    try:
        value = value_of(other, atoms, stated, where)
    except DataError:
        return Rival(kind, other.name, math.nan)
    if taken is None or value is None:
        return None
    difference = (taken - value) / len(atoms) if kind == "energy" else float(np.abs(taken - value).max())
    return Rival(kind, other.name, difference) if abs(difference) > SAME[kind] else None


def check_units(taken: dict[str, Source], units: dict[str, str], stated: dict[str, str], where: str) -> None:
    """Raise DataError where the unit of some labels is stated, but not that of the others, and it is not ASE's."""
    strange = [kind for kind, unit in units.items() if unit_value(unit, physical_kind(taken[kind]), where) != 1.0]
    missing = [kind for kind in ("energy", "forces") if kind in taken and kind not in units]
    if strange and missing:
        raise DataError(
            f"{where} says that its {strange[0]} is in {units[strange[0]]!r}, but nothing of its {missing[0]}: "
            f"state {missing[0]}_unit, too"
        )
    if "" in stated and not units and stated[""].lower() not in ("ev", "ev/å", "ev/a", "ev, å", "ase"):
        raise DataError(
            f"{where} says that its units are {stated['']!r}: convert its labels to eV, eV/Å and eV/Å^3, or say "
            "energy_unit, forces_unit and stress_unit instead"
        )


def look_alikes(atoms: Atoms) -> list[tuple[str, str]]:
    """Kind and name of all that looks like a label."""
    store = {
        **atoms.info,
        **{name: atoms.arrays[name] for name in atoms.arrays if name not in ("numbers", "positions")},
    }
    kinds = ((looks_like(str(name), value, len(atoms)), str(name)) for name, value in store.items())
    return [(kind, name) for kind, name in kinds if kind and not (kind == "stress" and not atoms.pbc.all())]


def is_named_isolated(atoms: Atoms) -> bool:
    """Does its config_type say that this is an isolated atom?"""
    named = [str(value) for name, value in atoms.info.items() if str(name).lower() in ("config_type", "configtype")]
    plain_names = {"".join(filter(str.isalpha, text.lower())).removesuffix("s") for text in named}
    return len(atoms) == 1 and bool(plain_names & {"isolatedatom", "isolated", "singleatom", "freeatom"})
