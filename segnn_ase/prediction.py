"""Structures of files with what a model says of them: energies and forces, or properties."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from segnn_ase.base.devices import resolve_device
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.convert import images_for, write_labelled
from segnn_ase.data.frames import structure_alone
from segnn_ase.properties.files import holds_properties, load_properties
from segnn_ase.properties.labels import PER_ATOM
from segnn_ase.structure.cue_settings import OF_FIELD
from segnn_ase.structure.told import told_in, with_told

OF_POTENTIALS = ("energy", "forces", "stress")
OF_SOME = ("dipole", "polarizability", "charges")  # of those that know fields, or have charges
OUTSIDE = "outside"  # entry of structures outside of what a potential was trained on
OF_ENERGY = {"energies", "energy", "forces", "free_energy", "stress", "stresses", OUTSIDE}  # of one calculation
OF_ENERGY |= {"charges", "dipole", "magmom", "magmoms"}
BEFORE = "before_"  # names of what is there already as REF_


class Said(NamedTuple):
    """What a model says of structures."""

    values: list[dict[str, Any]]  # by name, of each
    per_atom: set[str]  # names of what is said of each atom
    of_potential: bool


def predict_files(
    model: str, paths: "str | Path | list", out: "str | Path", *, device: str = "auto", overwrite: bool = False
) -> list[str]:
    """Write every structure with what a model says, as results where ASE has that property; returns what was done.

    What the file itself has by these names is kept, as REF_energy and so on, all else is as it was; "outside" says in
    which ways a structure is outside of what a potential was trained on. Raises FileNotFoundError, DataError,
    ConfigError for a name that is no extended XYZ or of a file that is there, unless `overwrite`, ModelFileError, and
    StructureError for what cannot be evaluated.
    """
    out, images = images_for(out, paths, overwrite=overwrite)
    said = _said_of(model, images, device)
    claimed = {name for values in said.values for name in values} | (OF_ENERGY if said.of_potential else set())
    claimed |= {name for names in OF_FIELD.values() if claimed & {*names} for name in names}  # other names of the same
    renamed = _free_names(claimed, [atoms for _, atoms in images])
    pairs = zip(images, said.values, strict=True)
    left = write_labelled(out, [_marked(atoms, values, said.per_atom, renamed) for (_, atoms), values in pairs])
    kept = [f"what the frames had as {old} is now {new}" for old, new in renamed.items()]
    lost = [f"left out, as extended XYZ cannot hold it: {', '.join(left)}"] if left else []
    outside = sum(OUTSIDE in values for values in said.values) if said.of_potential else 0
    if outside:
        kept.append(f"{outside} of {len(images)} are outside of what it was trained on ({OUTSIDE!r} says how)")
    return [*kept, *lost, f"wrote {len(images)} frames to {out}"]


def _said_of(model: str, images: Sequence[tuple[str, Atoms]], device: str) -> Said:
    bare = [structure_alone(atoms, source) for source, atoms in images]
    if holds_properties(model):
        loaded = load_properties(model, device=resolve_device(device))
        return Said(loaded.predict_all(bare), {target.name for target in loaded.targets if target.per == "atom"}, False)
    calculator, found = SEGNNCalculator(model, device=device, domain="ignore", allow_nonsmooth=True), []
    names = calculator.told_names
    structures = [with_told(alone, told_in(atoms, names)) for alone, (_, atoms) in zip(bare, images, strict=True)]
    wanted = (*OF_POTENTIALS, *(name for name in OF_SOME if name in calculator.implemented_properties))
    for results in calculator.evaluate(structures, wanted):
        ways = ", ".join(dict.fromkeys(way.kind for way in results.get("outside_domain", ())))
        known = {name: results[name] for name in wanted if name in results}
        found.append(known | ({OUTSIDE: ways} if ways else {}))
    return Said(found, PER_ATOM, True)


def _free_names(claimed: set[str], frames: Sequence[Atoms]) -> dict[str, str]:
    """New names for what frames have by the names that a model claims: REF_ before it, or what is free in all."""
    there: set[str] = set()
    for atoms in frames:
        there |= {*atoms.info, *atoms.arrays, *({} if atoms.calc is None else atoms.calc.results)}
    renamed = {}
    for name in sorted(claimed & there):
        new = f"{BEFORE}{name}" if name == OUTSIDE else f"REF_{name}"
        while new in there or new in claimed:
            new = f"{BEFORE}{name}" if new.startswith("REF_") else f"{BEFORE}{new}"
        renamed[name] = new
    return renamed


def _marked(atoms: Atoms, values: dict[str, Any], per_atom: set[str], renamed: dict[str, str]) -> Atoms:
    """The structure with these values beside all that it had, of which some is renamed."""
    marked, old = atoms.copy(), {} if atoms.calc is None else dict(atoms.calc.results)
    for name, new in renamed.items():
        for store, of_atoms in ((old, name in PER_ATOM), (marked.info, False), (marked.arrays, True)):
            if name in store:
                _put(marked, new, store.pop(name), of_atoms)
    own = {name for name in values if name in all_properties and (name in PER_ATOM) == (name in per_atom)}
    results = {**old, **{name: values[name] for name in own}}
    tensors = {name for name in results if name in PER_ATOM and np.ndim(results[name]) > 2}  # ASE's file has no place
    for name in values.keys() - own | tensors:
        _put(marked, name, results.get(name, values.get(name)), name in per_atom or name in tensors)
    marked.calc = SinglePointCalculator(marked, **{k: v for k, v in results.items() if k not in tensors})
    return marked


def _put(atoms: Atoms, name: str, value: Any, per_atom: bool) -> None:
    """As a column, of a matrix nine numbers a row, or as an entry."""
    if per_atom:
        rows = np.reshape(value, (len(atoms), -1))
        atoms.arrays[name] = rows[:, 0] if rows.shape[1] == 1 else rows
    else:
        atoms.info[name] = value
