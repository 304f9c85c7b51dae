"""Every frame that a reference has labelled, in one file, each written at once with where it comes from."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from segnn_ase.base.errors import DataError
from segnn_ase.base.extxyz import extxyz
from segnn_ase.base.files import append, write_atomically
from segnn_ase.data.frames import Frame, read_frames
from segnn_ase.learn.pool import ReferenceLabel
from segnn_ase.structure.told import with_told

KEY, ROUND, CONDITION, REASON, SECONDS = "key", "round", "condition", "reason", "label_seconds"  # in `Atoms.info`


def asked_frame(atoms: Atoms, key: str, round_: int, condition: str, reason: str) -> Atoms:
    """A structure to be labelled, without what a calculator said; key: its name, another one for each."""
    frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    for name in ("initial_charges", "initial_magmoms"):
        if name in atoms.arrays:
            frame.set_array(name, atoms.arrays[name])
    told = {name: value for name, value in atoms.info.items() if name in ("charge", "spin")}
    frame.info = {**told, KEY: key, ROUND: round_, CONDITION: condition, REASON: reason}
    return frame


class LabelledFrames:
    """`frames.xyz`, and `failed.xyz` with what had no label, in a folder; what a killed process left is repaired."""

    def __init__(self, folder: Path):
        self.path, self.failed_path, self.aside_path, self.given_path = (
            folder / f"{name}.xyz" for name in ("frames", "failed", "set_aside", "given")
        )
        self.given = {frame.info[KEY]: frame for frame in read_whole(self.given_path)}
        self.frames = {frame.info[KEY]: frame for frame in read_whole(self.path)}
        self.failed = {frame.info[KEY]: frame.info["error"] for frame in read_whole(self.failed_path)}

    def __contains__(self, key: str) -> bool:
        """Whether it was asked already, with or without success."""
        return key in self.frames or key in self.failed

    @property
    def count(self) -> int:
        """Labels that were asked for."""
        return len(self.frames) + len(self.failed)

    def add(self, frame: Atoms, label: ReferenceLabel) -> None:
        results = {"energy": label.energy, "forces": label.forces}
        if label.stress is not None:
            results["stress"] = label.stress
        out = frame.copy()
        out.info[SECONDS] = round(label.seconds, 6)
        out.calc = SinglePointCalculator(out, **results)
        content = extxyz(out)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, content)
        self.frames[frame.info[KEY]] = parse(content.decode())[0]

    def fail(self, frame: Atoms, reason: str) -> None:
        out = frame.copy()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        out.info["error"] = " ".join(reason.replace('"', "'").split())
        append(self.failed_path, extxyz(out))
        self.failed[frame.info[KEY]] = out.info["error"]

    def give(self, paths: Sequence[str]) -> None:
        """Take over frames that were labelled before; once, then they are here.

        Raises FileNotFoundError and DataError for files without frames that have energies and forces.
        """
        if paths and not self.given_path.exists():
            self.given_path.parent.mkdir(parents=True, exist_ok=True)
            found = [given_frame(frame, n) for n, frame in enumerate(read_frames(list(paths)))]
            write_frames(self.given_path, found)
            self.given = {frame.info[KEY]: frame for frame in read_whole(self.given_path)}

    def retry(self, keys: Iterable[str]) -> None:
        """Forget that these failed."""
        gone = [key for key in keys if key in self.failed]
        if gone:
            left = [frame for frame in read_whole(self.failed_path) if frame.info[KEY] not in gone]
            write_frames(self.failed_path, left)
            self.failed = {frame.info[KEY]: frame.info["error"] for frame in left}

    def set_aside(self, keys: Iterable[str]) -> None:
        """Take frames out, to be labelled again: of a reference that has changed."""
        gone = [key for key in keys if key in self.frames]
        append(self.aside_path, b"".join(extxyz(self.frames[key]) for key in gone))
        self.frames = {key: frame for key, frame in self.frames.items() if key not in gone}
        write_atomically(self.path, b"".join(map(extxyz, self.frames.values())))

    def of(self, keys: Sequence[str]) -> list[Atoms]:
        """The labelled ones among these, in this order."""
        known = {**self.given, **self.frames}
        return [known[key] for key in keys if key in known]


def given_frame(frame: Frame, number: int) -> Atoms:
    """One that was labelled before. Raises DataError where a label is missing."""
    told = ""
    if frame.energy is None or frame.forces is None:
        told = f"without {'energy' if frame.energy is None else 'forces'}"
    elif not np.isfinite(frame.forces).all():
        told = "with forces that a constraint has cut"
    if told:
        raise DataError(f"frames has {frame.source} {told}: expected the energy and the whole forces of each frame")
    out = asked_frame(with_told(frame.atoms, frame.told or {}), f"given/{number}", 0, "", "given")
    results: dict[str, Any] = {"energy": frame.energy, "forces": frame.forces}
    if frame.stress is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(frame.stress)
    out.calc = SinglePointCalculator(out, **results)
    return out


def parse(text: str) -> list[Atoms]:
    return list(ase.io.read(io.StringIO(text), ":", format="extxyz")) if text else []


def read_whole(path: Path) -> list[Atoms]:
    """The frames of a file; the last one is cut off where it was not written to its end."""
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")  # a letter may be torn, too
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]  # what follows the last line, as a rule nothing
    lines = lines if lines[-1] else lines[:-1]
    whole = 0
    while whole < len(lines):
        try:
            end = whole + 2 + int(lines[whole])
        except ValueError:
            raise DataError(f"{path} is damaged at line {whole + 1}: expected the number of atoms of a frame") from None
        if end > len(lines) or not lines[end - 1].endswith("\n"):
            break
        whole = end
    text = "".join(lines[:whole])
    if whole < len(lines):
        write_atomically(path, text.encode())
    return parse(text)


def decided(path: Path, decide: Callable[[], list[Atoms]]) -> list[Atoms]:
    """The frames of a file, as they are there; where it is not, they are decided and written first."""
    if not path.exists():
        write_frames(path, decide())
    return read_whole(path)


def write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    write_atomically(path, b"".join(map(extxyz, frames)))
