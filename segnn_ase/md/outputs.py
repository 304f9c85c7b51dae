"""Log and trajectory: files that grow in whole records, and are cut back to where a restart file was written."""

import gc
import os
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import TrajectoryWriter

from segnn_ase.base.errors import MDError
from segnn_ase.base.extxyz import extxyz, for_file
from segnn_ase.base.files import append, writing
from segnn_ase.base.label_names import is_result
from segnn_ase.md.settings import MDConfig
from segnn_ase.md.subject import summands
from segnn_ase.structure.cue_settings import LABELS_OF_CUES

COLUMNS = (
    *("step", "time_fs", "potential", "kinetic", "total", "temperature", "volume", "pressure"),
    *("forces_std", "outside", "conserved"),
)
KELVIN = "temperature_K"  # of a frame's velocities, by all that moves: files do not hold every constraint
OUTPUTS = ("log", "trajectory")  # files that grow
SAVED = ("energy", "free_energy", "forces", "stress")  # in the trajectory, where the calculator has them at hand
PROBE = 4096  # bytes at a mark that must be the same when a run goes on
ULM_BLOCK = 42  # the offset table of ASE's .traj grows by this factor: 1, 42, 42², ...


class MDResult(NamedTuple):
    """What a run gave; the final structure is in the `atoms` that were passed."""

    steps: int  # in total
    n_atoms: int
    ms_per_step: float  # of this call; NaN if there was nothing left to do
    ns_per_day: float
    mean_temperature: float  # K, over the log
    energy_slope: float  # eV/atom/ps of the conserved energy, NaN without one
    log: dict[str, np.ndarray]  # by `COLUMNS`; from this call only if it resumed without a log file
    trajectory: Path | None
    log_path: Path | None
    restart: Path | None


def append_row(path: str | None, row: Sequence[float]) -> None:
    if path is None:
        return
    # repr gives the digits that read back to the same bits
    line = ",".join([str(int(row[0])), *(repr(value) for value in row[1:])]) + "\n"
    empty = not Path(path).exists() or not Path(path).stat().st_size
    append(path, ((",".join(COLUMNS) + "\n" + line) if empty else line).encode())


def make_frame(
    atoms: Atoms, step: int, timestep: float, *, results: bool = True, temperature: float | None = None
) -> Atoms:
    """Return a copy of the atoms with step, time, temperature (K), where it is given, and the results that the
    calculator has at hand; timestep in fs."""
    frame = atoms.copy()
    told = {name for calc, _ in summands(atoms.calc) for name in getattr(calc, "told_names", ())}
    for store in (frame.info, frame.arrays):  # labels of the file that the atoms came from
        for name in [name for name, value in store.items() if is_label(name, value, len(frame)) and name not in told]:
            del store[name]
    frame.info.pop(KELVIN, None)
    frame.info |= {} if temperature is None else {KELVIN: temperature}
    frame.info.update(step=step, time_fs=step * timestep)
    if results:
        atoms.get_potential_energy()
        known = atoms.calc.results
        frame.calc = SinglePointCalculator(frame, **{name: known[name] for name in SAVED if name in known})
        # where ASE gives a calculator a method of itself, its arrays would stay until the next collection of garbage
        vars(frame.calc).pop("get_spin_polarized", None)
    return frame


def is_label(name: str, value, size: int) -> bool:
    """What some calculation gave for a structure of `size` atoms, also of what belongs to cues."""
    lower = str(name).lower()
    return is_result(name, value, size) or any(lower == one or lower.endswith(f"_{one}") for one in LABELS_OF_CUES)


def tell_left_out(atoms: Atoms, config: MDConfig) -> None:
    """Say on standard error what the format of the trajectory cannot hold."""
    if config.trajectory is None or sys.stderr is None:
        return
    _, left = for_file(config.trajectory, make_frame(atoms, 0, config.timestep, results=False))
    if left:
        print(f"{config.trajectory} is without {', '.join(left)}: its format cannot hold them", file=sys.stderr)


def append_frame(path: str, frame: Atoms) -> None:
    if Path(path).suffix == ".traj":
        with writing(path), TrajectoryWriter(path, "a") as writer:
            writer.write(for_file(path, frame)[0])
        gc.collect(1)  # the first frame, which ASE reads each time and leaves in a cycle
        return
    append(path, extxyz(frame))


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
        items, table = struct.unpack("<2q", file.read(16))
        return Mark(size, items, table, probe)


def probe_of(file, size: int) -> int:
    """Checksum of the last kilobytes of a text; of a .traj, where offsets change, of its first bytes."""
    is_traj = Path(file.name).suffix == ".traj"
    file.seek(0 if is_traj else max(size - PROBE, 0))
    return zlib.crc32(file.read(32 if is_traj else min(size, PROBE)))


def check_marked(path: str | None, end: Mark) -> None:
    """Raise MDError for a file that is not the one that was marked."""
    if path is None or end.size == 0:
        return
    size = Path(path).stat().st_size if Path(path).is_file() else 0
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
