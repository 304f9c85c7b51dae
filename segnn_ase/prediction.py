"""Structures of files with what a model says of them: energies and forces, or properties."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.base.files import home_expanded
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.convert import SUFFIXES, refuse_as_output, write_labelled
from segnn_ase.data.frames import as_paths, structure_alone
from segnn_ase.data.images import read_images
from segnn_ase.properties.files import holds_properties, load_properties
from segnn_ase.properties.labels import PER_ATOM

OF_POTENTIALS = ("energy", "forces", "stress")
OLD = "REF_"  # before the names of results that the file had


def predict_files(model: str, paths: "str | Path | list", out: "str | Path", *, device: str = "auto") -> list[str]:
    """Write every structure with what a model says, as results where ASE has that property; returns what was done.

    What the file itself had by these names is kept as REF_energy and so on, all else as it was; "outside"
    says in which ways a structure is outside of what a potential was trained on. Raises FileNotFoundError, DataError,
    ConfigError for a name that is no extended XYZ, ModelFileError, and StructureError for what cannot be evaluated.
    """
    out, paths = home_expanded(out, "out"), as_paths(paths)
    expect(bool(paths), "paths", paths, "at least one")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out is {str(out)!r}; expected a name that ends in .xyz or .extxyz")
    refuse_as_output(out, paths)
    images = [image for path in paths for image in read_images(path)]
    bare = [structure_alone(atoms, source) for source, atoms in images]
    found, per_atom = _said_of(model, bare, device)
    marked = (_with(atoms, values, per_atom) for (_, atoms), values in zip(images, found, strict=True))
    left = write_labelled(out, marked)
    lost = [f"left out, as extended XYZ cannot hold it: {', '.join(left)}"] if left else []
    return [*lost, f"wrote {len(images)} frames to {out}"]


def _said_of(model: str, structures: Sequence[Atoms], device: str) -> tuple[list[dict[str, Any]], set[str]]:
    """What is said of each structure, and the names of what is said of each atom."""
    if holds_properties(model):
        loaded = load_properties(model, device=resolve_device(device))
        return loaded.predict_all(structures), {target.name for target in loaded.targets if target.per == "atom"}
    calculator, found = SEGNNCalculator(model, device=device, domain="ignore"), []
    for results in calculator.evaluate(structures, ["energy", "forces", "stress"]):
        ways = ", ".join(dict.fromkeys(way.kind for way in results.get("outside_domain", ())))
        known = {name: results[name] for name in OF_POTENTIALS if name in results}
        found.append(known | ({"outside": ways} if ways else {}))
    return found, PER_ATOM


def _with(atoms: Atoms, values: dict[str, Any], per_atom: set[str]) -> Atoms:
    """The structure with these values beside all that it had."""
    marked, old = atoms.copy(), {} if atoms.calc is None else atoms.calc.results
    for name, value in old.items():
        _put(marked, f"{OLD}{name}", value, name in PER_ATOM)
    for store in (marked.info, marked.arrays):
        for name in set(store) & set(values):
            store[f"{OLD}{name}"] = store.pop(name)
    results = {name: value for name, value in values.items() if name in all_properties and np.ndim(value) < 2}
    results |= {name: value for name, value in values.items() if name == "forces"}
    for name in set(values) - set(results):
        _put(marked, name, values[name], name in per_atom)
    marked.calc = SinglePointCalculator(marked, **results)
    return marked


def _put(atoms: Atoms, name: str, value: Any, per_atom: bool) -> None:
    """As a column, of a matrix nine numbers a row, or as an entry."""
    if per_atom:
        rows = np.reshape(value, (len(atoms), -1))
        atoms.arrays[name] = rows[:, 0] if rows.shape[1] == 1 else rows
    else:
        atoms.info[name] = value
