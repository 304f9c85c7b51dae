"""Arrays of one molecule in an .npz file, as sGDML and rMD17 have them: read where they say their units."""

import zipfile
from pathlib import Path

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import DataError

NAMES = {"sGDML": ("R", "z", "E", "F"), "rMD17": ("coords", "nuclear_charges", "energies", "forces")}
OF_RMD17 = "old_energies"  # only the published sets, in kcal/mol and Å, have it
MOST_PACKED = 100  # times; numbers of real sets shrink to a half or a tenth


def form_of(names: set[str]) -> str | None:
    return next((form for form, known in NAMES.items() if set(known) <= names), None)


def units_of(form: str | None, data: dict[str, np.ndarray]) -> tuple[str, str] | None:
    """Units of energy and length; None where nothing says them."""
    if form == "rMD17" and OF_RMD17 in data:
        return "kcal/mol", "Å"
    if form == "sGDML" and {"e_unit", "r_unit"} <= data.keys():
        return text_of(data["e_unit"]), text_of(data["r_unit"])
    return None


def text_of(value: np.ndarray) -> str:
    text = value.item()
    return text.decode() if isinstance(text, bytes) else str(text)


def arrays_in(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file; None for what is none. Raises DataError for what would unfold to fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_PACKED * path.stat().st_size:
            raise DataError(f"data file {str(path)!r} has {path.stat().st_size} bytes that claim to be {size}")
        with np.load(path, allow_pickle=False) as data:
            return {name: values for name in data.files if (values := _plain(data, name)) is not None}
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        return None


def _plain(data, name: str) -> np.ndarray | None:
    """Numbers or text; objects are never unpacked."""
    try:
        return data[name]
    except ValueError:
        return None


def molecules_of(path: Path, data: dict[str, np.ndarray]) -> list[Atoms] | None:
    """One structure for each geometry, with its labels and their units; None where it is not known what they are."""
    form = form_of(set(data))
    units = units_of(form, data)
    if form is None or units is None:
        return None
    R, z, E, F = (data[name] for name in NAMES[form])
    expected = (len(R), len(z), 3)
    if R.shape != expected or F.shape != expected or E.size != len(R):
        shapes = ", ".join(f"{name} {data[name].shape}" for name in NAMES[form])
        raise DataError(f"data file {str(path)!r} has the shapes {shapes}; expected a molecule of {len(z)} atoms")
    cell = data["lattice"].T if form == "sGDML" and "lattice" in data else None  # vectors are columns there
    stated = {"energy_unit": units[0], "forces_unit": f"{units[0]}/{units[1]}", "distance_unit": units[1]}
    images = []
    for positions, energy, forces in zip(R, E.ravel(), F, strict=True):
        info = {"energy": float(energy), **stated}
        images.append(Atoms(z.astype(int), positions, cell=cell, pbc=cell is not None, info=info))
        images[-1].arrays["forces"] = forces.astype(float)
    return images
