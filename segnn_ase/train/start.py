"""Where a training begins: from scratch, from a trained model, or as a committee."""

import math
import time
from functools import partial

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.base.processes import is_first, on_first
from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import Committee, load_committee
from segnn_ase.train.committee import train_committee
from segnn_ase.train.few_frames import number_of_teachers, taught_by_own
from segnn_ase.train.job import Training, TrainingData, refuse_overwriting, refuse_overwriting_input
from segnn_ase.train.loop import run_training
from segnn_ase.train.prepare import from_scratch, read_data
from segnn_ase.train.report import printer
from segnn_ase.train.settings import FINETUNE_DEFAULTS, DataConfig, LoopConfig, OptimConfig, TrainConfig
from segnn_ase.train.together import begun_by_first, join_for, only_training
from segnn_ase.train.tuned_committee import finetune_committee
from segnn_ase.train.tuning import from_trained
from segnn_ase.train.tuning_settings import FinetuneConfig


def train(config: TrainConfig, *, progress: bool = True) -> dict:
    """Train a potential from scratch and write it to config.out. Returns the errors on every set.

    Beside out = model.pt are written model.last.pt, model.csv, model.resume.pt and plots; a committee's members are
    model.1.pt, model.2.pt and so on, and teachers that are trained first have the folder model.teachers. Raises
    DataError, ConfigError and FileNotFoundError for what cannot be trained on, OutOfTime when `max_minutes` are over.
    """
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    if config.finetune != FinetuneConfig():
        raise ConfigError(
            f"setting 'finetune' is {config.finetune}: a training from scratch keeps nothing; leave it out"
        )
    deadline = deadline_of(config.training)
    join_for(config)
    if config.data.teacher is not None:
        told, members = "setting 'data.teacher'", config.training.committee
        on_first(partial(refuse_overwriting_input, told, config.data.teacher, config.out, members))
    with only_training(config.out):
        if config.training.committee > 1:
            return train_committee(config, deadline, progress=progress)
        progress &= is_first()
        report = printer(progress)
        data, teachers = on_first(partial(read_with_teachers, config, report))
        if teachers:
            config, data = taught_by_own(config, data, teachers, deadline, report, progress=progress)
        job = begun_by_first(partial(from_scratch, config, data, report), data)
        return run_training(config, job, deadline, progress=progress)


def read_with_teachers(config: TrainConfig, report) -> tuple[TrainingData, int]:
    """The data, and how many potentials are to be trained on them first."""
    refuse_overwriting(config.out)
    data = read_data(config, report)
    return data, number_of_teachers(config, data)


def finetune(model: str, config: TrainConfig, *, progress: bool = True) -> dict:
    """Go on from a trained model or a committee on new frames: the elements of the frames are added to its own, and E0
    are shifted to the new level of theory; the rest is `train`.

    Settings that are not given take `FINETUNE_DEFAULTS`, and the precision that of the model. Its dispersion is taken
    off the new labels, too. config.finetune says what becomes of what it knew.
    """
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    join_for(config)
    progress &= is_first()
    report, starts = printer(progress), on_first(partial(load_committee, model))
    first, members = starts.potentials[0], len(starts.potentials)
    refuse_for_finetuning(model, config, members)
    on_first(partial(refuse_overwriting_input, "model", model, config.out, members))
    settings = finetune_settings(config.training, first, report).model_copy(update={"committee": members})
    data = with_dispersion_of(model, first, config.data)
    config = config.model_copy(update={"training": settings, "data": data})
    deadline = deadline_of(config.training)
    with only_training(config.out):
        if members > 1:
            return finetune_committee(config, starts, deadline, progress=progress)
        job = on_first(partial(begin, config, starts, report))
        return run_training(config, job, deadline, progress=progress)


def begin(config: TrainConfig, starts: Committee, report) -> Training:
    """The training of the one potential to start from."""
    refuse_overwriting(config.out)
    first = starts.potentials[0]
    return from_trained(config, read_data(config, report, first), first, starts.metadata, report)


def deadline_of(settings: LoopConfig) -> float:
    return math.inf if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes


def refuse_for_finetuning(model: str, config: TrainConfig, members: int) -> None:
    """Raise ConfigError for settings that fine-tuning a file of so many members could only leave aside."""
    data, committee = config.data, config.training.committee
    if "committee" in config.training.model_fields_set and committee not in (1, members):
        raise ConfigError(
            f"setting 'training.committee' is {committee}, but {model} has {members} "
            f"{'potentials' if members > 1 else 'potential'}, each of which is fine-tuned; leave it out, or train a "
            "committee to start from: members that begin alike hardly differ"
        )
    if config.model:
        raise ConfigError(f"setting 'model' is {config.model}: fine-tuning keeps the architecture of {model}")
    given = {"data.teacher": data.teacher, "data.taught": data.taught, "training.teachers": config.training.teachers}
    for name, value in given.items():
        if not value:
            continue
        raise ConfigError(
            f"setting {name!r} is {value!r}: fine-tuning has no teacher, as it keeps what "
            f"{model} knows; leave it out, or give structures to learn beside the frames as finetune.structures"
        )
    for name in ("isolated_atoms", "reference_energies"):
        if getattr(data, name) is not None:
            raise ConfigError(
                f"setting 'data.{name}' is {getattr(data, name)!r}: fine-tuning shifts the E0 of {model} to the "
                "energies of its frames; leave it out, or add isolated atoms to data.train"
            )


def with_dispersion_of(model: str, start: Potential, data: DataConfig) -> DataConfig:
    """The settings with the dispersion of the model to start from. Raises ConfigError where another is asked for."""
    if data.dispersion not in (None, start.dispersion):
        known = "no dispersion was" if start.dispersion is None else f"{start.dispersion!r} was"
        raise ConfigError(
            f"setting 'data.dispersion' is {data.dispersion!r}, but {known} taken off the labels of {model}: "
            "fine-tuning keeps that; leave it out, or train a new potential"
        )
    return data.model_copy(update={"dispersion": start.dispersion})


def finetune_settings(settings: OptimConfig, start: Potential, report) -> OptimConfig:
    """The settings given, and the defaults of fine-tuning; told is a precision below that of the start."""
    known = str(start.dtype).removeprefix("torch.")
    given = settings.model_dump(exclude_unset=True)
    settings = OptimConfig(**{**FINETUNE_DEFAULTS, "dtype": known, **given})
    if (known, settings.dtype) == ("float64", "float32"):
        report("the starting model is in float64, dtype is 'float32': its weights are rounded")
    return settings
