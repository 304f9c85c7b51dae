"""Asking the reference: every answer is kept at once, none is asked for twice, a reference that changes is noticed."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from segnn_ase.base.errors import ConfigError, LabelError
from segnn_ase.base.files import progress_bar
from segnn_ase.learn.labelled import KEY, REASON, ROUND, LabelledFrames, asked_frame
from segnn_ase.learn.pool import LabelPool, ReferenceLabel

CONTROL, NUDGE = "control", 2e-5  # Å, rms: so near, forces of the stiffest bonds are those of the first time
ENERGY, FORCES, STRESS = 5e-4, 0.03, 1e-3  # eV/atom, eV/Å and eV/Å^3 by which a reference may answer otherwise
SAME = 1e-4  # Å
TOO_MANY, LEAST = 0.5, 3  # of a batch may fail, and so many may fail anyway


class Labeller:
    """A pool and what it has labelled; not for more than one thread."""

    def __init__(self, pool: LabelPool, labelled: LabelledFrames, *, progress: bool = False):
        self.pool, self.labelled, self.progress = pool, labelled, progress
        self._lock = threading.Lock()
        for key in labelled.frames:  # heard, but not yet removed
            self._answer_file(key).unlink(missing_ok=True)
        self._open: list[Future] = []

    def _answer_file(self, key: str) -> Path:
        return self.pool.folder / "answers" / f"{key.replace('/', '_')}.json"

    def ask(self, frames: Sequence[Atoms]) -> None:
        """Have them labelled, those that are not yet."""
        for frame in frames:
            if frame.info[KEY] not in self.labelled:
                answer = self._answer_file(frame.info[KEY])
                self._open.append(self.pool.submit(frame, answer, partial(self._keep, frame)))

    def _keep(self, frame: Atoms, found: ReferenceLabel | LabelError) -> None:
        with self._lock:
            if isinstance(found, ReferenceLabel):
                self.labelled.add(frame, found)
            else:
                self.labelled.fail(frame, str(found))

    def wait(self) -> None:
        """Until all that was asked for is there. Raises what is no failure of a label."""
        asked, self._open = self._open, []
        with progress_bar(shown=self.progress and len(asked) > 1, total=len(asked), unit="label") as bar:
            for future in asked:
                future.result()
                bar.update()

    def label(self, frames: Sequence[Atoms]) -> list[Atoms]:
        """The labelled ones. Raises LabelError where most fail."""
        self.ask(frames)
        self.wait()
        self.refuse_failing([frame.info[KEY] for frame in frames])
        return self.labelled.of([frame.info[KEY] for frame in frames])

    def refuse_failing(self, keys: Sequence[str]) -> None:
        failed = [key for key in keys if key in self.labelled.failed]
        if len(failed) > max(LEAST, TOO_MANY * len(keys)):
            told = self.labelled.failed[failed[0]]
            raise LabelError(
                f"{len(failed)} of {len(keys)} labels failed, the first with: {told}. Mend the reference, remove "
                f"{self.labelled.failed_path}, and run the same command: these are asked for again, and no others"
            )

    def control(self, round_: int, keys: Sequence[str], place: str = "") -> None:
        """Ask again what is known, hardly moved: the first frame, from the first round on the one of the first labels
        with the largest forces, as those of a crystal at rest say nothing. place: of its key, where that is no round.

        Raises LabelError where the answer does not belong to the first; then the labels of `keys` are set aside.
        """
        first = next(f for f in self.labelled.frames.values() if f.info[REASON] != CONTROL)
        if round_:
            begun = [f for f in self.labelled.frames.values() if f.info[ROUND] == 0 and f.info[REASON] != CONTROL]
            first = max(begun, key=lambda frame: float(np.abs(frame.get_forces()).max()))
        key = f"{place or round_}/{CONTROL}"
        told = self._otherwise(first, nudged(first, key, round_))
        if told:
            self.labelled.set_aside([*keys, key])
            whose = "the end" if place else f"round {round_}" if round_ else "the beginning"
            raise LabelError(
                f"the reference answers otherwise than in the beginning: {told} for one of the first structures. The "
                f"labels of {whose} are set aside in {self.labelled.aside_path}. Give it its old settings, units and "
                "version and run the same command: they are asked for again; or begin anew under another name of out"
            )

    def control_given(self) -> None:
        """Ask for one of the frames that were given: a small one with large forces. Raises LabelError where its labels
        are of another reference."""
        several = [frame for frame in self.labelled.given.values() if len(frame) > 1]
        if not several:
            return
        first = min(several, key=lambda frame: (len(frame), -np.abs(frame.get_forces()).max()))
        key = f"{first.info[KEY]}/{CONTROL}"
        told = self._otherwise(first, nudged(first, key, 0))
        if told:
            self.labelled.set_aside([key])
            raise LabelError(
                f"setting 'frames' has labels of another reference than {self.pool.settings.calculator!r}: {told} for "
                f"frame {first.info[KEY].rpartition('/')[2]}. Leave them out, or give the reference the settings that "
                "they were made with, under another name of out"
            )

    def _otherwise(self, first: Atoms, again: Atoms) -> str:
        """How the reference answers otherwise than it did, for what hardly moved; "" where it does not, or cannot."""
        self.ask([again])
        self.wait()
        key = again.info[KEY]
        if key in self.labelled.failed:
            self.labelled.retry([key])
            return ""
        return other_answer(first, self.labelled.frames[key])


def same_structure(a: Atoms, b: Atoms) -> bool:
    return np.array_equal(a.numbers, b.numbers) and bool(np.abs(a.positions - b.positions).max() < SAME)


def nudged(first: Atoms, key: str, round_: int) -> Atoms:
    frame = asked_frame(first, key, round_, "", CONTROL)
    frame.positions += NUDGE * np.random.default_rng(round_).normal(size=frame.positions.shape) / np.sqrt(3)
    frame.positions = frame.positions.round(8)  # as the file has them
    return frame


def other_answer(first: Atoms, again: Atoms) -> str:
    """How the labels of two structures that hardly differ are of two references; empty where they are not."""
    moved = again.positions - first.positions
    forces, then = again.get_forces(), first.get_forces()
    work = -0.5 * float(np.sum((forces + then) * moved))
    energy = abs(again.get_potential_energy() - first.get_potential_energy() - work) / len(first)
    off = float(np.sqrt(np.mean((forces - then) ** 2)))
    found = [f"energy {1e3 * energy:.3g} meV/atom off"] if not energy <= ENERGY else []
    found += [f"forces {1e3 * off:.3g} meV/Å off"] if not off <= FORCES else []
    if "stress" in first.calc.results and "stress" in again.calc.results:
        stress = float(np.abs(again.get_stress() - first.get_stress()).max())
        found += [f"stress {1e3 * stress:.3g} meV/Å^3 off"] if not stress <= STRESS else []
    return " and ".join(found)


class AskingCalculator(Calculator):
    """Energy, forces and stress of the reference for ASE's optimisers and dynamics; each step is a label that is kept,
    and read where it is there."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 - ASE's interface

    def __init__(self, labeller: Labeller, prefix: str, reason: str):
        super().__init__()
        self.labeller, self.prefix, self.reason = labeller, prefix, reason
        self.keys: list[str] = []

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        frame = asked_frame(self.atoms, f"{self.prefix}/{len(self.keys)}", 0, "", self.reason)
        frame.positions = frame.positions.round(8)
        self.labeller.ask([frame])
        self.labeller.wait()
        key = frame.info[KEY]
        if key in self.labeller.labelled.failed:
            raise LabelError(self.labeller.labelled.failed[key])
        self.keys.append(key)
        known = self.labeller.labelled.frames[key]
        if not same_structure(known, frame):
            raise ConfigError(
                f"the label {key} in {self.labeller.labelled.path} is of another structure than now: take the old one, "
                "or another name of out"
            )
        self.results = dict(known.calc.results)
