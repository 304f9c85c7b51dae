"""Bodies at two times, as arrays and as a file."""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import existing_file, write_atomically


class Motion(NamedTuple):
    """Bodies at one time, and where they are later: (T, n, 3), and charges or masses (T, n)."""

    positions: np.ndarray
    velocities: np.ndarray
    charges: np.ndarray
    later: np.ndarray  # positions
    later_velocities: np.ndarray


def write_motion(path: "str | Path", motion: Motion) -> None:
    """As an npz archive, which NumPy reads anywhere."""
    buffer = io.BytesIO()
    np.savez(buffer, **motion._asdict())
    write_atomically(path, buffer.getvalue())


def read_motion(path: "str | Path") -> Motion:
    """What `write_motion` wrote. Raises FileNotFoundError, and DataError for files or shapes of another kind."""
    path = existing_file(path, "motion")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            motion = Motion(*(np.asarray(stored[name], dtype=float) for name in Motion._fields))
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no file of motion, an npz archive with {', '.join(Motion._fields)}: {error}"
        ) from None
    shape = motion.charges.shape
    if len(shape) != 2 or shape[1] < 2 or any(x.shape != (*shape, 3) for x in motion if x is not motion.charges):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in motion._asdict().items())
        raise DataError(f"{path} has {shapes}; expected charges (T, n), n > 1, and all others (T, n, 3)")
    if not all(np.isfinite(x).all() for x in motion):
        raise DataError(f"{path} has numbers that are not finite; leave these systems out")
    return motion
