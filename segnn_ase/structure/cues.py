"""What a structure says of the cues that a potential is told: read, checked and scaled; and their conjugates."""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.structure.cue_settings import CONJUGATES, FIELD, OF_FIELD, Cue
from segnn_ase.structure.graph import Graph, refuse_wire
from segnn_ase.structure.ions import charged_by, is_charged, net_charge
from segnn_ase.structure.told import Told

BY_FIELD = ("dipole", "polarizability", "born_effective_charges")  # results of who knows fields
WHOLE = 0.05  # e, by which the sum of partial charges is off a whole number
PLACES = {"node": "arrays", "graph": "info"}


def width_of(cues: Sequence[Cue]) -> int:
    """Numbers that an atom has of all cues."""
    return sum(cue.size for cue in cues)


def told(graph: Graph, atoms: Atoms, cues: tuple[Cue, ...]) -> Graph:
    """The graph with the cues of its structure. Raises StructureError for those that are missing or wrong."""
    if not cues:
        return graph
    steering, device = cues_of(atoms, cues), graph.positions.device
    field = field_of(atoms, cues)
    return graph._replace(
        cues=steering.to(device) if steering.shape[1] else None, field=None if field is None else field.to(device)
    )


def refuse_sums(atoms: Atoms, cues: Sequence[Cue], electrostatics: str) -> None:
    """Raise StructureError where charges that act at any distance cannot be summed up: in wires, and in slabs that are
    told a net charge, or given charges that have one."""
    refuse_wire(atoms.pbc.tolist())
    known = {cue.name: cue for cue in cues}
    cue = known.get("initial_charges") if electrostatics == "given" else charged_by(cues)
    if cue is None or sum(atoms.pbc) != 2:
        return
    told = _value(atoms, cue)
    if net := round(float(told.sum() if cue.per == "node" else told.ravel()[0]), 6):
        raise StructureError(
            f"the slab has a net charge of {net:g} e, whose energy is infinite: expected a neutral one, or a crystal "
            "with vacuum (pbc in three directions), where a net charge has a uniform background"
        )


def field_of(atoms: Atoms, cues: Sequence[Cue]) -> Tensor | None:
    """The uniform field, (1, 3) V/Å; None where none is declared. Raises StructureError as `cues_of`."""
    declared = next((cue for cue in cues if cue.name == FIELD), None)
    if declared is None:
        return None
    value = atoms.info.get(FIELD)
    if value is None and declared.default == "error":
        raise StructureError(f"atoms.info[{FIELD!r}] is missing, and has no default: expected three numbers, V/Å")
    value = declared.default if value is None else value
    try:
        field = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        field = np.zeros(0)
    if field.shape != (3,) or not np.isfinite(field).all():
        raise StructureError(f"atoms.info[{FIELD!r}] is {value!r}; expected three finite numbers, V/Å")
    if field.any() and atoms.pbc.any() and is_charged(atoms, cues):
        raise StructureError(
            f"the structure has a net charge of {net_charge(atoms, cues):g} e in a field and is periodic (pbc is "
            f"{atoms.pbc.tolist()}): its energy depends on the choice of the cell. Expected a neutral one, no field, "
            "or a molecule (pbc False)"
        )
    return torch.from_numpy(field.copy())[None]


def cues_of(atoms: Atoms, cues: Sequence[Cue]) -> Tensor:
    """The cues of a structure in their scales, (N, width) in float64, components of vectors times sqrt(3).

    Raises StructureError for what is missing, of another shape, not finite, or no integer where one is needed.
    """
    rows = [np.zeros((len(atoms), 0)), *(_in_scale(cue, _value(atoms, cue)) for cue in cues if cue.size)]
    if any(cue.name == "spin" for cue in cues):
        _check_electrons(atoms, cues)
    return torch.from_numpy(np.concatenate(rows, axis=1))


def gradient_of(atoms: Atoms, cue: Cue, value: np.ndarray) -> np.ndarray:
    """A label of a cue's conjugate (N, size) as dE/d of what `cues_of` gives; along z where moments are along no axis.

    Raises StructureError for another shape.
    """
    name, sign = CONJUGATES[cue.name]
    value = np.asarray(value, dtype=float)
    if cue.size == 3 and value.shape == (len(atoms),) and np.ndim(atoms.arrays.get(cue.name)) == 1:
        value = np.stack([np.full_like(value, np.nan), np.full_like(value, np.nan), value], axis=1)
    if value.size != len(atoms) * cue.size:
        raise StructureError(f"{name} have shape {value.shape}; expected {(len(atoms), cue.size)}")
    return sign * value.reshape(len(atoms), cue.size) * cue.unit


def names_of_responses(cues: Sequence[Cue]) -> tuple[str, ...]:
    """What `responses_of` gives."""
    names = [response_of(cue)[0] for cue in cues if cue.size]
    return (*names, *(BY_FIELD if any(cue.name == FIELD for cue in cues) else ()))


def response_of(cue: Cue) -> tuple[str, float]:
    """The name of a cue's conjugate, and the sign with which dE/dcue is it."""
    return CONJUGATES.get(cue.name, (f"d_energy_d_{cue.name}", 1.0))


def responses_of(atoms: Atoms, gradient: np.ndarray, cues: Sequence[Cue]) -> dict[str, np.ndarray | float]:
    """The cues' conjugates from dE/d of what `cues_of` gives (N, width), in the shape of the cues: magnetic forces
    -dE/dm, eV/μB, electronegativities dE/dq, eV/e, and of others dE/dcue, called "d_energy_d_" and their name."""
    found, first = {}, 0
    for cue in (cue for cue in cues if cue.size):
        name, sign = response_of(cue)
        slope = sign * gradient[:, first : first + cue.size] / cue.unit
        first += cue.size
        if cue.per == "graph":
            found[name] = float(slope.sum())
        elif cue.size == 1 or np.ndim(atoms.arrays.get(cue.name)) == 1:
            found[name] = slope[:, -1]  # along no axis is along z
        else:
            found[name] = slope
    return found


def field_labels(told_of: Told, size: int) -> dict[str, np.ndarray]:
    """Labels of a dipole (1, 3), a polarizability (1, 3, 3) and Born charges (N, 3, 3), NaN where there are none.

    Raises StructureError for other shapes.
    """
    shapes = {"dipole": (1, 3), "polarizability": (1, 3, 3), "born": (size, 3, 3)}
    found = {}
    for kind, shape in shapes.items():
        values = [v for (_, name), v in told_of.items() if name == OF_FIELD[kind][0]]
        value = np.full(shape, np.nan) if not values else np.asarray(values[0], dtype=float)
        if kind == "polarizability" and value.shape == (6,):
            value = voigt_6_to_full_3x3_stress(value)
        rows_of_atoms = kind != "born" or value.shape[:1] in ((size,), (9 * size,))
        if value.size != np.prod(shape) or not rows_of_atoms:
            raise StructureError(f"{OF_FIELD[kind][0]} has shape {value.shape}; expected {shape}")
        found[kind] = value.reshape(shape)
    return found


def _in_scale(cue: Cue, value: np.ndarray) -> np.ndarray:
    """In units in which one is usual, and zero says nothing."""
    return (value - (cue.name == "spin")) / cue.unit


def _value(atoms: Atoms, cue: Cue) -> np.ndarray:
    """(N, size), in the cue's own unit."""
    place, n = f"atoms.{PLACES[cue.per]}[{cue.name!r}]", len(atoms)
    value = (atoms.arrays if cue.per == "node" else atoms.info).get(cue.name)
    if value is None:
        if cue.default == "error":
            raise StructureError(
                f"{place} is missing: this potential was told it of every structure that it learned, and has no default"
            )
        return np.broadcast_to(np.array(cue.default, dtype=float), (n, cue.size))
    shape = (n, cue.size) if cue.per == "node" else (cue.size,)
    try:
        value = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise StructureError(f"{place} is {value!r}; expected numbers of shape {shape}") from None
    if cue.kind == "axial" and value.shape == (n,):
        if cue.spin_orbit:
            raise StructureError(
                f"{place} has shape {(n,)}, moments along no axis in particular, and this potential couples them to "
                f"the directions of space: expected vectors of shape {shape}"
            )
        value = value[:, None] * np.array([0.0, 0.0, 1.0])  # along any axis: only their angles count
    if value.size != np.prod(shape) or (value.ndim > 1 and value.shape != shape):
        raise StructureError(f"{place} has shape {value.shape}; expected {shape}")
    if not np.isfinite(value).all():
        raise StructureError(f"{place} has NaN or infinite values; expected finite numbers")
    if cue.kind == "integer" and (value != np.round(value)).any():
        raise StructureError(f"{place} is {value.tolist()}; expected an integer")
    if cue.name == "spin" and (value < 1).any():
        raise StructureError(f"{place} is {value.tolist()}; expected a multiplicity 2S + 1, 1 or more")
    return np.broadcast_to(value.reshape(-1, cue.size), (n, cue.size))


def _check_electrons(atoms: Atoms, cues: Sequence[Cue]) -> None:
    known = {cue.name: cue for cue in cues}
    spin, charge = float(_value(atoms, known["spin"])[0, 0]), net_charge(atoms, cues)
    if abs(charge - round(charge)) > WHOLE:  # partial charges that do not say it
        return
    electrons = int(atoms.numbers.sum()) - round(charge)
    if (electrons + spin) % 2 == 0:
        raise StructureError(
            f"atoms.info['spin'] is {spin:g} with {electrons} electrons; an even number of electrons has an odd "
            "multiplicity 2S + 1, an odd number an even one"
        )
