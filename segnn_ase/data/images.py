"""Structures of a file as ASE reads them, with all that stands beside them, in Å."""

import os
from pathlib import Path

import ase.db
import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, string2index

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import existing_file, home_expanded, is_file
from segnn_ase.base.label_names import LENGTHS
from segnn_ase.data.counts import refuse_impossible_counts
from segnn_ase.data.extxyz import is_extxyz, open_extxyz
from segnn_ase.data.foreign import BY_DPDATA, is_foreign_folder, read_foreign
from segnn_ase.data.units import length_unit, stated_units


def read_images(path: str) -> list[tuple[str, Atoms]]:
    """Every frame of a file, as ASE gives it but in Å, after its source; raises as `frames.read_frames` does."""
    name, index = split_index(path)
    try:
        images = _read_any(name, index)
    except DataError:
        raise
    except Exception as error:  # ASE raises anything from StopIteration to KeyError on a bad file
        raise DataError(f"data file {name!r} cannot be read by ASE: {described(error, name)}") from error
    images = images if isinstance(images, list) else [images]
    if not images:
        raise DataError(f"data file {name!r} has no frames")
    return [(f"{path}, frame {n}", in_angstrom(atoms, f"{path}, frame {n}")) for n, atoms in enumerate(images)]


def _read_any(name: str, index: str) -> "list[Atoms] | Atoms":
    if (images := read_foreign(name)) is not None:
        return images[string2index(index)]
    if Path(name).suffix in (".db", ".json"):
        return _read_database(name, index)
    file, options = readable_by_ase(name)
    return ase.io.read(file, index, **options)


def described(error: Exception, name: str) -> str:
    """What ASE says; of a format that it does not know, who may."""
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, UnknownFileTypeError) or not os.path.getsize(name):
        return text
    return f"{text}. If dpdata knows its format, these lines convert it:\n{BY_DPDATA.format(name=name, form='...')}"


def readable_by_ase(name: str) -> tuple:
    """What ASE is to read, and its options."""
    refuse_impossible_counts(name)
    if is_extxyz(name):
        return open_extxyz(name), {"format": "extxyz"}
    return name, {"do_not_split_by_at_sign": True}


def in_angstrom(atoms: Atoms, where: str) -> Atoms:
    """The structure in Å, where its file states another unit."""
    factor = length_unit(atoms.info, where)
    if factor != 1.0:
        atoms.set_cell(factor * atoms.cell.array)
        atoms.positions *= factor
        lengths = [name for name in atoms.info if set(stated_units({name: atoms.info[name]})) & LENGTHS]
        for name in lengths:
            del atoms.info[name]
    return atoms


def split_index(path: str) -> tuple[str, str]:
    """File, or folder of DeePMD, and ASE's index; an @ in a folder's name or in that of what exists is no index."""
    name, _, index = path.rpartition("@")
    if "@" not in Path(path).name or _is_readable(path):
        name, index = path, ":"
    place = home_expanded(name, "data file")
    return str(place if is_foreign_folder(place) else existing_file(name, "data file")), index


def _is_readable(path: str) -> bool:
    place = home_expanded(path, "data file")
    return is_file(place) or is_foreign_folder(place)


def _read_database(name: str, index: str) -> "list[Atoms] | Atoms":
    """Rows of an ASE database with their key-value pairs and data, where labels may be: `ase.io.read` drops them."""
    try:
        query, part = None, string2index(index)
    except ValueError:
        query, part = index, slice(None)
    images = []
    with ase.db.connect(name, serial=True) as database:
        units = _units_of_database(database.metadata)
        for row in database.select(query):
            images.append(row.toatoms())
            images[-1].info.update({**row.data, **row.key_value_pairs, **units})
    return images[part]


def _units_of_database(metadata: dict) -> dict[str, str]:
    """What SchNetPack notes in its databases, as entries of a structure."""
    properties = metadata.get("_property_unit_dict") or metadata.get("property_unit_dict") or {}
    units = {f"{name}_unit": unit for name, unit in properties.items() if isinstance(unit, str)}
    distance = metadata.get("_distance_unit") or metadata.get("distance_unit")
    return {**units, "distance_unit": distance} if distance else units
