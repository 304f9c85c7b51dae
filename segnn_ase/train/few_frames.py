"""With few frames: some potentials first, whose mean the last one learns beside the frames.

Trainings on few frames learn them by heart in a small part of the usual time, and more of it makes them worse. They
differ in their seeds alone by more than most settings change, and their mean is better than most: the time that is
left is well spent on that, and one potential learns it at the cost of one (`teacher`).
"""

import contextlib
import math
from functools import partial
from pathlib import Path

import numpy as np

from segnn_ase.base import processes
from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, DataError, OutputError, StructureError
from segnn_ase.data.batches import edges_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_committee
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train.committee import train_committee
from segnn_ase.train.job import TrainingData, output_files
from segnn_ase.train.settings import USUAL_MINUTES, OptimConfig, TrainConfig
from segnn_ase.train.step import make_batches
from segnn_ase.train.teacher import starts_of, with_teacher
from segnn_ase.train.together import only_training, widened_by_first
from segnn_ase.train.trial import most_epochs

MOST, LEAST = 4, 2  # teachers
TAUGHT = 1.7  # times the time of a teacher for the one that they teach
PER_PAIR = {"cpu": 2.9e-5, "cuda": 1.2e-6}  # s a pair of neighbours and epoch, of USUAL_SIZE; no clock is read, so that
PER_STEP = {"cpu": 5e-3, "cuda": 2e-2}  # the same command always does the same
USUAL_SIZE = 230_000  # weights
CANNOT_TEACH = ConfigError, DataError, StructureError, np.linalg.LinAlgError


def number_of_teachers(config: TrainConfig, data: TrainingData) -> int:
    """That a training has which was begun; else that the settings ask for, or that the minutes allow.

    Raises ConfigError where the settings ask for another number than a training has that was begun.
    """
    settings, known = config.training, teachers_that_are_there(config)
    if known is not None:
        if settings.teachers not in (None, known):
            raise ConfigError(
                f"setting 'training.teachers' is {settings.teachers}, but the training of {config.out} was begun with "
                f"{known}: leave it out to go on, or choose another name of out"
            )
        return known
    if settings.teachers is not None:
        return settings.teachers
    alone = settings.epochs is not None or config.data.teacher is not None or not model_config(**config.model).smooth
    if alone or not starts_of(data):
        return 0
    seconds = most_epochs(len(data.train)) * seconds_of_epoch(config, data)
    found = math.floor(60 * minutes_of(settings) / seconds - TAUGHT)
    return min(found, MOST) if found >= LEAST else 0


def teachers_that_are_there(config: TrainConfig) -> int | None:
    """How many the training has that was begun, as its resume file says; None where none was."""
    resume, own = output_files(config.out)["resume"], Path(file_of_teachers(config))
    if not resume.is_file():
        return None
    begun = load_tensors(resume, "resume file").get("config", {})
    teacher = Path(begun.get("data", {}).get("teacher") or "")
    taught = teacher.name == own.name and teacher.parent.suffix == own.parent.suffix  # whatever it was called then
    return len(load_committee(own).potentials) if taught and own.is_file() else 0


def file_of_teachers(config: TrainConfig) -> str:
    return str(Path(config.out).with_suffix(".teachers") / "committee.pt")


def seconds_of_epoch(config: TrainConfig, data: TrainingData) -> float:
    """Roughly."""
    batches = len(make_batches(data.train, config.training, epoch=0))
    elements = list(data.references.values)
    return seconds_by_size(config.model, elements, sum(edges_of(data.train)), batches, config.training.device)


def seconds_by_size(model: dict, elements: list[int], pairs: int, batches: float, device: str) -> float:
    """Of an epoch with so many pairs of neighbours in so many batches, roughly."""
    kind = resolve_device(device).type
    size = sum(p.numel() for p in Potential(model_config(**model), elements).parameters())
    return PER_PAIR[kind] * pairs * max(size / USUAL_SIZE, 1.0) + PER_STEP[kind] * batches


def minutes_of(settings: OptimConfig) -> float:
    return settings.minutes or USUAL_MINUTES


def taught_by_own(
    config: TrainConfig, data: TrainingData, teachers: int, deadline: float, report, *, progress: bool
) -> tuple[TrainConfig, TrainingData]:
    """Train so many teachers, if they are not there; returns the settings of the one that they teach, and its data.

    All have shares of the minutes. Teachers are not tested. Where nobody has asked for them, and they cannot teach, as
    of labels that nothing explains, that is told, and what was given is returned, with all its minutes.
    """
    report(f"{teachers} potentials come first, whose mean is learned beside the frames (a new training: --teachers 0)")
    first, last = shares(config.training, teachers)
    own = config.model_copy(update={"out": file_of_teachers(config), "training": first})
    sources = config.data.model_copy(update={"teacher": own.out})
    taught = config.model_copy(update={"data": sources, "training": last})
    try:
        if not processes.on_first(partial(teachers_that_are_there, config)):
            train_teachers(own, data, deadline, progress=progress)
        cutoff = model_config(**config.model).cutoff
        return taught, widened_by_first(partial(with_teacher, data, taught, cutoff, report), data)
    except CANNOT_TEACH as error:
        if config.training.teachers is not None:
            raise ConfigError(f"the teachers of this training cannot teach (training.teachers): {error}") from error
        report(f"the teachers are left out: {error}")
        return config, data


def shares(settings: OptimConfig, teachers: int) -> tuple[OptimConfig, OptimConfig]:
    """The settings of the teachers, and of the one that they teach."""
    first: dict[str, object] = {"teachers": None, "committee": teachers}
    last: dict[str, object] = {"teachers": None}
    if settings.epochs is None:
        part = minutes_of(settings) / (teachers + TAUGHT)
        first, last = {**first, "minutes": part}, {**last, "minutes": TAUGHT * part}
    return settings.model_copy(update=first), settings.model_copy(update=last)


def train_teachers(own: TrainConfig, data: TrainingData, deadline: float, *, progress: bool) -> None:
    """Raises OutputError where files of other teachers are there."""
    folder = Path(own.out).parent
    there = processes.on_first(lambda: any(folder.glob(f"{Path(own.out).stem}.*")))
    try:
        with only_training(own.out):
            train_committee(own, deadline, progress=progress, data=data._replace(test={}))
    except ConfigError as error:
        if not there:
            raise
        raise OutputError(
            f"{folder} has teachers of another training: remove it, or choose another name of out ({error})"
        ) from error
    finally:
        if processes.is_first():
            with contextlib.suppress(OSError):  # unless it is empty
                folder.rmdir()
