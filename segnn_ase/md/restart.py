"""The files of a simulation that grows: appended in whole records, cut back to where a restart file was written.

The restart file holds arrays and JSON, nothing that could be executed; what was tampered with or belongs to another run
is refused before anything is touched.
"""

import io
import json
import operator
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.io.extxyz import write_extxyz
from ase.io.trajectory import TrajectoryWriter
from ase.md.md import MolecularDynamics
from ase.spacegroup import Spacegroup

from segnn_ase.base.errors import ConfigError, MDError
from segnn_ase.base.files import append, writing
from segnn_ase.md.ensembles import state_names
from segnn_ase.md.settings import SUFFIXES, MDConfig

FORMAT = "segnn_ase md restart 2"
COLUMNS = (
    *("step", "time_fs", "potential", "kinetic", "total", "temperature", "volume", "pressure"),
    *("forces_std", "outside", "conserved"),
)
OUTPUTS = ("log", "trajectory")  # files that grow
LIMITS = ("max_minutes", "max_temperature", "max_energy_drift", "max_forces_std", "stop_outside_domain")
PROBE = 4096  # bytes at a mark that must be the same when a run goes on
ULM_BLOCK = 42  # the offset table of ASE's .traj grows by this factor: 1, 42, 42², ...


def append_row(path: str | None, row: Sequence[float]) -> None:
    if path is None:
        return
    # repr gives the digits that read back to the same bits
    line = ",".join([str(int(row[0])), *(repr(value) for value in row[1:])]) + "\n"
    empty = not Path(path).exists() or not Path(path).stat().st_size
    append(path, ((",".join(COLUMNS) + "\n" + line) if empty else line).encode())


def append_frame(path: str, frame: Atoms) -> None:
    if Path(path).suffix == ".traj":
        with writing(path), TrajectoryWriter(path, "a") as writer:
            writer.write(frame)
        return
    append(path, extxyz(frame))


def extxyz(frame: Atoms) -> bytes:
    """Without what has no form in this format, such as the nested notes that `ase.build` leaves on its slabs."""
    frame.info = {name: value for name, value in frame.info.items() if _fits_a_line(value)}
    buffer = io.StringIO()
    write_extxyz(buffer, frame)
    return buffer.getvalue().encode()


def _fits_a_line(value) -> bool:
    if isinstance(value, np.ndarray | np.generic | Spacegroup):
        return True
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class Mark(NamedTuple):
    """How far a file was written, to cut it back to."""

    size: int  # bytes
    items: int = 0  # of a .traj
    table: int = 0  # position of its table of offsets
    probe: int | None = None  # checksum of a part that stays as it is


def mark(path: str | None) -> Mark:
    """Flush a file to disk and return how far it is written."""
    if path is None or not Path(path).exists():
        return Mark(0)
    with writing(path), open(path, "r+b") as file:
        os.fsync(file.fileno())
        size = file.seek(0, os.SEEK_END)
        probe = probe_of(file, size)
        if Path(path).suffix != ".traj":
            return Mark(size, probe=probe)
        file.seek(32)
        return Mark(size, *struct.unpack("<2q", file.read(16)), probe)


def probe_of(file, size: int) -> int:
    """Checksum of the last kilobytes of a text; of a .traj, where offsets change, of its first bytes."""
    is_traj = Path(file.name).suffix == ".traj"
    file.seek(0 if is_traj else max(size - PROBE, 0))
    return zlib.crc32(file.read(32 if is_traj else min(size, PROBE)))


def check_marked(path: str | None, end: Mark) -> None:
    """Raise MDError for a file that is not the one that was marked."""
    if path is None or end.size == 0:
        return
    size = Path(path).stat().st_size if Path(path).exists() else 0
    if size < end.size:
        raise MDError(f"{path} has {size} bytes, but the restart file was written at {end.size}: it is another file")
    with open(path, "rb") as file:
        if end.probe is not None and probe_of(file, end.size) != end.probe:
            raise MDError(f"{path} is not as it was when the restart file was written: it is damaged or another file")


def cut(path: str | None, end: Mark) -> None:
    """Cut a file back to a mark."""
    if path is None or not Path(path).exists():
        return
    with writing(path), open(path, "r+b") as file:
        file.truncate(end.size)
        if end.items:
            # ASE keeps the number of frames and their offsets at fixed places of what is not cut off
            file.seek(32)
            file.write(struct.pack("<2q", end.items, end.table))
            capacity = 1
            while capacity < end.items:
                capacity *= ULM_BLOCK
            file.seek(end.table + 8 * end.items)
            file.write(bytes(8 * (capacity - end.items)))


def read_restart(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays. Raises MDError for what is damaged, foreign or makes no sense."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
    except Exception as error:  # zip and array readers raise anything on foreign or torn files
        raise unreadable(path, str(error) or type(error).__name__) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise MDError(
            f"restart is {path!r}, of format {found!r}; expected {FORMAT!r}. Finish that run with the version "
            "that wrote it, or remove the file to start anew."
        )
    try:
        wrong = check_state(header, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None
    if wrong:
        raise unreadable(path, f"{', '.join(wrong)} of an unexpected type, shape or value")
    return header, arrays


def unreadable(path: str, reason: str) -> MDError:
    return MDError(f"restart is {path!r}, which cannot be read: {' '.join(reason.split())}. Remove it to start anew.")


def check_state(header: dict, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of what cannot be the state of a run; raises for what is missing."""
    n, columns = len(arrays["numbers"]), len(COLUMNS) if header["step"] else 0
    shapes = {"positions": (n, 3), "momenta": (n, 3), "masses": (n,), "cell": (3, 3), "first_row": (columns,)}
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape or arrays[name].dtype.kind != "f"]
    state = [name for name in arrays if name != "first_row"]
    wrong += [name for name in state if not np.isfinite(arrays[name]).all()]
    wrong += [name for name, least in (("step", 0), ("dof", 1)) if not _is_count(header[name], least)]
    wrong += [name for name in ("config", "rng", "marks") if not isinstance(header[name], dict)]
    wrong += ["pbc"] * (len(header["pbc"]) != 3)
    for name in OUTPUTS:
        if not all(value is None or _is_count(value) for value in Mark(*header["marks"][name])):
            wrong.append(f"mark of {name}")
    return wrong + sorted({*state_names(MDConfig(**header["config"]))} - arrays.keys())


def _is_count(value, least: int = 0) -> bool:
    return type(value) is int and value >= least


def generator(state: dict, config: MDConfig) -> np.random.Generator:
    rng = np.random.default_rng()
    try:
        rng.bit_generator.state = state
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise unreadable(config.restart, f"random numbers: {error}") from None
    return rng


def set_state(dynamics: MolecularDynamics, config: MDConfig, arrays: dict[str, np.ndarray]) -> None:
    """Give an integrator what it remembered. Raises MDError for arrays that are not of its shapes."""
    for name in state_names(config):
        *owner, attribute = name.split(".")
        owner = operator.attrgetter(*owner)(dynamics) if owner else dynamics
        if np.shape(getattr(owner, attribute)) != arrays[name].shape:
            raise unreadable(config.restart, f"{name} has shape {arrays[name].shape}")
        setattr(owner, attribute, arrays[name][()])


def check_same_run(header: dict, arrays: dict, atoms: Atoms, config: MDConfig) -> None:
    """Raise ConfigError saying what is not as in the run that wrote the restart file."""
    old, new = dict(header["config"]), config.model_dump()
    old.update({name: new[name] for name in LIMITS})
    for name in SUFFIXES:  # files may have been moved: what they hold is compared with the marks
        if old[name] is not None and new[name] is not None and Path(old[name]).suffix == Path(new[name]).suffix:
            old[name] = new[name]
    if new["steps"] > old["steps"]:
        old["steps"] = new["steps"]
    differing = [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]]
    here = {"numbers": atoms.numbers, "masses": atoms.get_masses(), "pbc": atoms.pbc}
    there = {**arrays, "pbc": np.array(header["pbc"])}
    differing += [f"the {name} of the atoms are others" for name in here if not np.array_equal(here[name], there[name])]
    if differing:
        raise ConfigError(
            f"restart is {config.restart!r}, written by another run: {'; '.join(differing)}. Only steps may be "
            "raised, and limits changed: go back to the old settings, or start anew with other file names."
        )


def read_rows(config: MDConfig, step: int, end: Mark, first_row: np.ndarray) -> array:
    """Return the log so far; without a file only its first row, the reference of the energy guard."""
    if config.log is None or step == 0:
        return array("d", first_row)
    with open(config.log, "rb") as file:
        text = io.BytesIO(file.read(end.size))
    try:
        rows = np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise MDError(f"log is {config.log!r}, which is damaged: {error}. Restore it, or start anew.") from None
    expected = np.arange(0, step + 1, config.log_every)
    if rows.shape != (len(expected), len(COLUMNS)) or not np.array_equal(rows[:, 0], expected):
        raise MDError(
            f"log is {config.log!r}, which is damaged: expected {len(COLUMNS)} columns and a row for every "
            f"{config.log_every} of {step} steps. Restore it, or start anew."
        )
    return array("d", rows.ravel())
