"""With few frames: some potentials first, whose mean the last one learns beside the frames.

Trainings on few frames learn them by heart in a small part of the usual time, and more of it makes them worse. They
differ in their seeds alone by more than most settings change, and their mean is better than most: the time that is
left is well spent on that, and one potential learns it at the cost of one (`teacher`).
"""

import math
from pathlib import Path

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError
from segnn_ase.base.locks import only_writer
from segnn_ase.data.batches import edges_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.train.committee import train_committee
from segnn_ase.train.job import TrainingData, output_files
from segnn_ase.train.settings import USUAL_MINUTES, OptimConfig, TrainConfig
from segnn_ase.train.step import make_batches
from segnn_ase.train.teacher import with_teacher
from segnn_ase.train.trial import FEWEST_EPOCHS

MOST, LEAST = 4, 2  # teachers
TAUGHT = 1.7  # times the time of a teacher for the one that they teach
PER_PAIR = {"cpu": 2.9e-5, "cuda": 1.2e-6}  # s a pair of neighbours and epoch, of USUAL_SIZE; no clock is read, so that
PER_STEP = {"cpu": 5e-3, "cuda": 2e-2}  # the same command always does the same
USUAL_SIZE = 230_000  # weights


def number_of_teachers(config: TrainConfig, data: TrainingData) -> int:
    """That the settings ask for, or that the minutes allow after which the frames would be known by heart."""
    settings = config.training
    if settings.teachers is not None:
        return settings.teachers
    if settings.epochs is not None or config.data.teacher is not None or not model_config(**config.model).smooth:
        return 0
    seconds = FEWEST_EPOCHS * seconds_of_epoch(config, data)
    found = math.floor(60 * minutes_of(settings) / seconds - TAUGHT)
    return min(found, MOST) if found >= LEAST else 0


def seconds_of_epoch(config: TrainConfig, data: TrainingData) -> float:
    """Roughly."""
    device = resolve_device(config.training.device).type
    size = sum(p.numel() for p in Potential(model_config(**config.model), list(data.references.values)).parameters())
    batches = len(make_batches(data.train, config.training, epoch=0))
    return PER_PAIR[device] * sum(edges_of(data.train)) * max(size / USUAL_SIZE, 1.0) + PER_STEP[device] * batches


def minutes_of(settings: OptimConfig) -> float:
    return settings.minutes or USUAL_MINUTES


def taught_by_own(
    config: TrainConfig, data: TrainingData, teachers: int, deadline: float, report, *, progress: bool
) -> tuple[TrainConfig, TrainingData]:
    """Train so many teachers; returns the settings of the one that they teach, and its data.

    All have shares of the minutes. Teachers are not tested. Where nobody has asked for them, and they cannot teach, as
    with frames of single atoms or labels that nothing explains, that is told, and they are left out.
    """
    report(f"{teachers} potentials are trained first, whose mean is learned beside the frames (--teachers 0: none)")
    settings, out = config.training, str(Path(config.out).with_suffix(".teachers.pt"))
    shares = {"teachers": 0}, {"teachers": 0, "committee": teachers}
    if settings.epochs is None:
        part = minutes_of(settings) / (teachers + TAUGHT)
        shares[0]["minutes"], shares[1]["minutes"] = TAUGHT * part, part
    last, first = (settings.model_copy(update=share) for share in shares)
    with only_writer([out, *output_files(out).values()]):
        own = config.model_copy(update={"out": out, "training": first})
        train_committee(own, deadline, progress=progress, data=data._replace(test={}))
    config = config.model_copy(update={"training": last})
    taught = config.model_copy(update={"data": config.data.model_copy(update={"teacher": out})})
    try:
        return taught, with_teacher(data, taught, model_config(**config.model).cutoff, report)
    except ConfigError as error:
        if settings.teachers is not None:
            raise
        report(f"the teachers are left out: {error}")
        return config, data
