"""Folders of DeePMD, of arrays (set.000/coord.npy) or texts (coord.raw).

They are in eV and Å; a virial is minus stress times volume.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from segnn_ase.base.errors import DataError

LABELS = {"energy": "energy", "force": "forces", "virial": "virial"}  # its names and ours
SIZES = {"energy": 1, "virial": 9, "box": 9}  # numbers of a frame; of all others three an atom
OF_TYPES = "real_atom_types"  # of each frame, where compositions are mixed; -1 fills up


def systems_in(place: Path) -> list[Path]:
    """Folders of frames: this one, or those in it."""
    depths = ("type.raw", "*/type.raw", "*/*/type.raw")
    return sorted(path.parent for pattern in depths for path in place.glob(pattern)) if os.path.isdir(place) else []


def read_deepmd(place: Path) -> list[Atoms]:
    """All frames, with their labels under usual names. Raises DataError for what is missing or of the wrong shape."""
    return [atoms for folder in systems_in(place) for atoms in read_system(folder)]


def read_system(folder: Path) -> Iterator[Atoms]:
    types = np.loadtxt(folder / "type.raw", dtype=int, ndmin=1)
    numbers = numbers_of_types(folder, int(types.max(initial=0)) + 1)
    periodic = not (folder / "nopbc").exists()
    for part in sorted(folder.glob("set.*")) or [folder]:
        arrays = read_part(part, len(types))
        if "coord" not in arrays or (periodic and "box" not in arrays):
            missing = "box" if "coord" in arrays else "coord"
            note = "; a file `nopbc` says that there is none" if missing == "box" else ""
            raise DataError(f"data folder {str(part)!r} has no {missing}.npy or {missing}.raw{note}")
        for n in range(len(arrays["coord"])):
            yield frame_of({name: values[n] for name, values in arrays.items()}, types, numbers, periodic, str(part))


def numbers_of_types(folder: Path, count: int) -> np.ndarray:
    """Atomic numbers by type."""
    path = folder / "type_map.raw"
    names = path.read_text().split() if path.is_file() else []
    if len(names) < count:
        raise DataError(
            f"data folder {str(folder)!r} has {count} types of atoms, but {len(names)} names in type_map.raw: write "
            "their symbols there, one a line, in the order of the types"
        )
    unknown = [name for name in names if name not in atomic_numbers]
    if unknown:
        raise DataError(f"data folder {str(folder)!r} has {unknown} in type_map.raw; expected symbols of elements")
    return np.array([atomic_numbers[name] for name in names])


def read_part(part: Path, atoms: int) -> dict[str, np.ndarray]:
    """The arrays of a set by name, a row a frame."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("coord", "box", *LABELS, OF_TYPES):
        path = part / f"{name}.npy"
        if path.is_file():
            values = np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # makes no room for what is not there
        elif (path := part / f"{name}.raw").is_file():
            values = np.loadtxt(path, ndmin=2)
        else:
            continue
        width = atoms if name == OF_TYPES else SIZES.get(name, 3 * atoms)
        frames = len(arrays.get("coord", values))
        if values.size != frames * width:
            raise DataError(f"{str(path)!r} has shape {values.shape}; expected {frames} frames of {width} numbers")
        arrays[name] = values.reshape(frames, width)
    return arrays


def frame_of(row: dict, types: np.ndarray, numbers: np.ndarray, periodic: bool, where: str) -> Atoms:
    kinds = row.get(OF_TYPES, types).astype(int)
    real = kinds >= 0
    if kinds.max(initial=-1) >= len(numbers):
        raise DataError(f"data folder {where!r} has atoms of type {kinds.max()}, but {len(numbers)} names of types")
    cell = row["box"].reshape(3, 3).astype(float) if periodic else None
    atoms = Atoms(numbers[kinds[real]], row["coord"].reshape(-1, 3)[real].astype(float), cell=cell, pbc=periodic)
    if "energy" in row:
        atoms.info["energy"] = float(row["energy"][0])
    if "virial" in row:
        atoms.info["virial"] = row["virial"].reshape(3, 3).astype(float)
    if "force" in row:
        atoms.arrays["forces"] = row["force"].reshape(-1, 3)[real].astype(float)
    return atoms
