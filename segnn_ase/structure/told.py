"""What stands beside the atoms and the cell of a structure, and a potential may be told: taken off, put on again."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ase import Atoms

Told = dict[tuple[str, str], Any]  # values by "arrays" or "info" and their names

OWN = ("numbers", "positions", "momenta")


def told_in(atoms: Atoms, names: Iterable[str]) -> Told:
    """Those of the names that are in `atoms.arrays` or `atoms.info`, as copies."""
    return {key: copy.deepcopy(value) for key, value in said_in(atoms, names).items()}


def said_in(atoms: Atoms, names: Iterable[str]) -> Told:
    """The same as they are there."""
    places = {"arrays": atoms.arrays, "info": atoms.info}
    return {
        (place, name): values[name]
        for name in names
        for place, values in places.items()
        if values.get(name) is not None
    }


def with_told(atoms: Atoms, told: Mapping[tuple[str, str], Any]) -> Atoms:
    """A copy with these values."""
    atoms = atoms.copy()
    for (place, name), value in told.items():
        getattr(atoms, place)[name] = copy.deepcopy(value)
    return atoms


def bare(atoms: Atoms, names: Iterable[str] = ()) -> Atoms:
    """Elements, positions, cell and pbc alone, and what has one of the names."""
    return with_told(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc), told_in(atoms, names))


def standing(atoms: Atoms) -> Atoms:
    """The same without calculator, constraints and velocities."""
    return bare(atoms, [*atoms.info, *(name for name in atoms.arrays if name not in OWN)])


def same_told(a: Mapping[tuple[str, str], Any], b: Mapping[tuple[str, str], Any], tolerance: float) -> bool:
    """Whether both say the same, to so much relatively and absolutely."""
    return a.keys() == b.keys() and all(_same_value(a[key], b[key], tolerance) for key in a)


def _same_value(a: Any, b: Any, tolerance: float) -> bool:
    try:
        x, y = (np.asarray(v, dtype=float) for v in (a, b))
    except (TypeError, ValueError):
        return bool(np.array_equal(a, b))
    if x.shape != y.shape:
        return False
    return np.array_equal(x, y) or bool(np.allclose(x, y, rtol=tolerance, atol=tolerance))
