"""Frames as ASE reads them back: what a format cannot hold is written otherwise or left out."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict, write_extxyz
from ase.io.jsonio import decode, encode

OWN_COLUMNS = {"symbols", "species", "positions", "pos", "numbers", "z", "move_mask"}
HELD = FixAtoms, FixCartesian
OWN_ENTRIES = {"lattice", "properties", "pbc"}


def for_file(path: str, frame: Atoms) -> tuple[Atoms, list[str]]:
    """A frame without what the trajectory of this name cannot hold, and the names of that."""
    if Path(path).suffix != ".traj":
        return writable(frame)
    left = [name for name, value in frame.info.items() if not encodes({name: value})]
    out = frame.copy()
    out.calc = frame.calc
    out.info = {name: value for name, value in frame.info.items() if name not in left}
    return out, [str(name) for name in left]


def encodes(entry: dict) -> bool:
    """Can it be written in ASE's JSON, and be read?"""
    try:
        decode(encode(entry))
    except Exception:  # whatever lies in there
        return False
    return True


def extxyz(frame: Atoms) -> bytes:
    """One frame of the trajectory."""
    buffer = io.StringIO()
    write_extxyz(buffer, writable(frame)[0])
    return buffer.getvalue().encode()


def writable(frame: Atoms) -> tuple[Atoms, list[str]]:
    """A copy that can be read back, and the names of what is left out, such as nested notes of `ase.build`.

    Blanks in words become "_", line breaks in texts blanks, and names of columns lose what would end them.
    """
    out, left = frame.copy(), [f"constraint {type(c).__name__}" for c in frame.constraints if not isinstance(c, HELD)]
    out.calc = frame.calc
    out.info = {}
    for name, value in frame.info.items():
        form = next((form for form in _forms(value) if survives(name, form)), None)
        if form is None:
            left.append(str(name))
        else:
            out.info[name] = form
    for name in set(frame.arrays) - {"numbers", "positions"}:
        del out.arrays[name]
    for name, value in frame.arrays.items():
        if name in ("numbers", "positions"):
            continue
        column, values = re.sub(r"[^\w.+-]+", "_", str(name)), _writable_column(value)
        if values is None or not column or column.lower() in OWN_COLUMNS or column in out.arrays:
            left.append(str(name))
        else:
            out.arrays[column] = values
    return out, left


def _forms(value) -> list:
    """The value, and for a text what may stand for it."""
    if not isinstance(value, str):
        return [value]
    escaped = value.replace("\\", "\\\\")  # ASE takes one away when it reads
    return [escaped, " ".join(escaped.split())]


def survives(name, value) -> bool:
    """Does an entry come back, and leave those behind it alone?"""
    if not isinstance(name, str) or name.lower() in OWN_ENTRIES:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what ASE would skip
            line = key_val_dict_to_str({name: value, "end_": 1})
        found = key_val_str_to_dict(line)
    except Exception:  # ASE and its JSON raise what they like
        return False
    return len(line.splitlines()) == 1 and list(found) == [name, "end_"] and found["end_"] == 1


def _writable_column(values: np.ndarray) -> np.ndarray | None:
    """An array (N,) or (N, k) as the format can hold it, None where it cannot."""
    if values.ndim not in (1, 2) or 0 in values.shape:
        return None
    if values.dtype.kind in "SUO":
        return np.vectorize(_word, otypes=[object])(values).astype(str)
    if values.dtype.kind == "u":
        return values.astype(np.int64)
    return values if values.dtype.kind in "fib" else None


def _word(value) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return "_".join(text.split()) or "_"
