"""`OnTheFlyCalculator`: a potential that asks its reference where it is not sure, and learns the answers beside."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from segnn_ase.base.errors import AccelerationWarning, ConfigError, StructureError, expect
from segnn_ase.base.files import write_atomically
from segnn_ase.base.locks import only_writer
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.explore import largest_uncertainty
from segnn_ase.learn.labelled import LabelledFrames, asked_frame, write_frames
from segnn_ase.learn.pool import ReferenceLabel, kill
from segnn_ase.learn.references import resolve_reference
from segnn_ase.learn.rounds import epochs_within, settings_for_few, usable
from segnn_ase.learn.settings import AimConfig
from segnn_ase.learn.worker import end_with, energy_of, made
from segnn_ase.store.shipped import find_model
from segnn_ase.train.settings import DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.start import finetune, train

FEWEST = 8  # frames of a training
TRAIN = "import sys; from segnn_ase.learn.on_the_fly import train_beside; train_beside(*sys.argv[1:])"


class OnTheFlyCalculator(Calculator):
    """Answers with the potential where it is sure, with the reference where it is not, for drivers of the user's own.

    reference: an ASE calculator, or a name as of `segnn learn`. model: a potential to begin with, which is fine-tuned
    on the labels; None: trainings are from scratch. Where `out` is there already, that answers first. out: the
    potential so far, written after every training; the folder beside it keeps every labelled frame, and both are taken
    up again by the next calculator with this name. aim: meV/Å; it is not sure where a force component is uncertain by
    more than five times that (or the usual uncertainty, where that is larger), or the structure is outside what it was
    trained on. train_every: so many new labels begin a training, or a fifth of those that there are. minutes: of a
    training, roughly. beside: trainings run in a process of their own, and the potential is taken when it is ready;
    else each ends before the next answer. network, training: settings as of `segnn train`.

    `results` have "asked", whether this was the reference; `labels` and `answers` count. Raises what the reference
    raises, and ConfigError for arguments that cannot be used.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 - ASE's interface

    def __init__(
        self,
        reference: Any,
        model: "str | Path | None" = None,
        *,
        out: "str | Path" = "on_the_fly.pt",
        aim: float = 40.0,
        train_every: int = 10,
        minutes: float = 2.0,
        beside: bool = True,
        network: dict | None = None,
        training: dict | None = None,
    ):
        super().__init__()
        expect(aim > 0, "aim", aim, "meV/Å, above 0")
        expect(train_every >= 1, "train_every", train_every, "1 or more labels")
        expect(Path(out).suffix == ".pt", "out", str(out), "a name that ends in .pt")
        self.reference = _calculator_of(reference)
        self.out, self.train_every, self.minutes, self.beside = Path(out), train_every, minutes, beside
        self.aim = AimConfig(forces=aim)
        self.folder = self.out.with_suffix(".learn")
        self.network, self.training = network or {}, OptimConfig(**(training or {}))
        if self.training.committee > 1:
            raise ConfigError(f"training.committee is {self.training.committee}; expected one potential")
        if model is not None and network:
            raise ConfigError(f"network is {network}, but model is given, which has its own: omit one")
        self._start = None if model is None else str(find_model(model).absolute())
        self._settings_of(epochs=1)  # what cannot be is said now
        until_the_end = ExitStack()
        until_the_end.enter_context(only_writer([self.folder / "state.json"]))  # what `segnn learn` locks, too
        self._close = weakref.finalize(self, until_the_end.close)
        self.labelled = LabelledFrames(self.folder)
        if self.out.exists() and not self.labels:
            raise ConfigError(
                f"out is {str(out)!r}, which exists and has no labels beside it: give it as model, or rename it"
            )
        self.answers = 0  # of the potential
        self._trained_on = 0  # labels that the potential knows, or the one in training will
        self._process: tuple[subprocess.Popen, Path] | None = None
        self._potential: SEGNNCalculator | None = None
        if self.out.exists():
            self._take(self.out)
            self._trained_on = self.labels
        elif model is not None:
            self._take(model)

    @property
    def labels(self) -> int:
        """How many the reference has given."""
        return len(self.labelled.frames)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        if "stress" in properties and not self.atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs three periodic directions; pbc is {self.atoms.pbc.tolist()}"
            )
        self._take_what_is_trained()
        found = self._sure(properties)
        if found is None:
            found = {**self._asked(properties), "asked": True}
            self._train_where_due()
        else:
            self.answers += 1
        self.results = found

    def close(self) -> None:
        """Let another one have `out` and its labels; a training under way ends."""
        self._stop()
        self._close()

    def train(self) -> None:
        """Train on all labels now, and take the potential; raises DataError for what cannot be trained on."""
        self._stop()
        config = self._next_training()
        train_or_tune(config, self._start or "")
        self._trained_on = self.labels
        self._taken_over(Path(config.out))

    def _sure(self, properties: Sequence[str]) -> dict | None:
        """What the potential says; None where it is not sure."""
        if self._potential is None:
            return None
        alone, needed = self.atoms.copy(), ["energy", "forces"]
        needed += ["stress"] if self.atoms.pbc.all() else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccelerationWarning)
            try:
                self._potential.calculate(alone, needed, all_changes)
            except StructureError:  # elements, or distances, that it does not know
                return None
        results = self._potential.results
        limit, spread = largest_uncertainty(self._potential, self.aim), results.get("forces_std")
        if results.get("outside_domain") or (limit is not None and not np.max(spread) <= limit):
            return None
        return {**results, "asked": False}

    def _asked(self, properties: Sequence[str]) -> dict:
        """The label of the reference, which is kept first."""
        atoms = self.atoms.copy()
        atoms.set_constraint()  # whose forces would be zero
        atoms.calc, begin = self.reference, time.perf_counter()
        forces = atoms.get_forces()
        energy, stress = energy_of(atoms), None
        if atoms.pbc.all():
            try:
                stress = atoms.get_stress()
            except (PropertyNotImplementedError, NotImplementedError):
                if "stress" in properties:
                    raise
        label = ReferenceLabel(energy, forces, stress, time.perf_counter() - begin)
        frame = asked_frame(self.atoms, f"fly/{self.labels}", 0, "", "not sure")
        self.labelled.add(frame, label)
        results = {"energy": energy, "free_energy": energy, "forces": forces}
        return results if stress is None else {**results, "stress": stress}

    def _train_where_due(self) -> None:
        new = self.labels - self._trained_on
        if self._process is not None or self.labels < FEWEST or new < max(self.train_every, self._trained_on // 5):
            return
        if not self.beside:
            return self.train()
        config = self._next_training()
        settings = Path(config.out).with_name("settings.json")
        write_atomically(settings, config.model_dump_json(exclude_unset=True).encode())
        with open(settings.with_name("log.txt"), "wb") as log:
            command = [sys.executable, "-c", TRAIN, str(settings), self._start or ""]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ.copy())
        weakref.finalize(self, kill, process)
        self._process, self._trained_on = (process, Path(config.out)), self.labels

    def _next_training(self) -> TrainConfig:
        folder = self.folder / f"training-{self.labels:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("model.*"):  # of one that was stopped
            left.unlink()
        frames = usable(list(self.labelled.frames.values()))
        write_frames(folder / "train.xyz", frames)
        training = self._settings_of(epochs_within(self.minutes, frames, self.network, self.training))
        data = DataConfig(train=(str(folder / "train.xyz"),))
        return TrainConfig(out=str(folder / "model.pt"), data=data, model=self.network, training=training)

    def _settings_of(self, epochs: int) -> OptimConfig:
        """Of a training of so many epochs, where nothing else was given."""
        given = self.training.model_dump(exclude_unset=True)
        usual: dict[str, Any] = {} if given.keys() & {"epochs", "minutes"} else {"epochs": epochs}
        if self.training.select != "stability":
            usual["rollout_steps"] = 0
        if self._start is None:
            usual |= settings_for_few(self.training, fast=True)
        return OptimConfig(**{**usual, **given})

    def _take_what_is_trained(self) -> None:
        if self._process is None or self._process[0].poll() is None:
            return
        (process, model), self._process = self._process, None
        if process.returncode:
            log = model.with_name("log.txt")
            warnings.warn(f"the training on {self._trained_on} labels has failed, see {log}", stacklevel=2)
        else:
            self._taken_over(model)

    def _taken_over(self, model: Path) -> None:
        write_atomically(self.out, model.read_bytes())
        self._take(self.out)

    def _take(self, model: "str | Path") -> None:
        self._potential = SEGNNCalculator(model, device=self.training.device, domain="ignore")

    def _stop(self) -> None:
        if self._process is not None:
            kill(self._process[0])
            self._process = None


def train_beside(settings: str, start: str) -> None:
    """By the settings in this file, in a process that ends with the one that has begun it."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    train_or_tune(TrainConfig.parse(json.loads(Path(settings).read_text())), start)


def train_or_tune(config: TrainConfig, start: str) -> None:
    """From scratch, or from the potential `start`, if there is one."""
    if start:
        finetune(start, config, progress=False)
    else:
        train(config, progress=False)


def _calculator_of(reference: Any) -> Calculator:
    if not isinstance(reference, str):
        expect(hasattr(reference, "get_property"), "reference", reference, "an ASE calculator or a name")
        return reference
    known = resolve_reference(reference)
    try:
        return made(known.factory, dict(known.arguments))
    except ImportError as error:
        raise ConfigError(f"reference is {reference!r}: {error}; pip install {known.package or '...'}") from error
