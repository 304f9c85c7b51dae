"""A committee: potentials that differ in their seeds, in one file with the factors of their spread."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from segnn_ase.base import processes
from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import COMMITTEE, Committee, load_with_metadata, save_committee
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train.evaluation import QUANTITIES, Evaluate, committee_residuals, errors_of, evaluator_of
from segnn_ase.train.job import Training, TrainingData, output_files, refuse_overwriting
from segnn_ase.train.loop import run_training
from segnn_ase.train.old_frames import DRIFT, errors_before
from segnn_ase.train.prepare import from_scratch, read_data
from segnn_ase.train.report import error_table, measure_sets, printer
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.train.together import begun_by_first, only_training

Begin = Callable[[TrainConfig, int, TrainingData], Training]  # the training of a member, numbered from 1


def train_committee(config: TrainConfig, deadline: float, *, progress: bool, data: TrainingData | None = None) -> dict:
    """Train potentials that differ in their seeds on the same frames, and put them into one file.

    The frames for validation are drawn by the first seed. The spread is too small by a factor that is measured on them
    and kept with the members. data: where it has been read.
    """
    report = printer(progress)

    def begin(member: TrainConfig, k: int, data: TrainingData) -> Training:
        return from_scratch(member, data, report)

    return train_members(config, None, begin, deadline, progress=progress, data=data)


def train_members(
    config: TrainConfig,
    known: Potential | None,
    begin: Begin,
    deadline: float,
    *,
    progress: bool,
    data: TrainingData | None = None,
) -> dict:
    """Train the members, each as it begins, and put them into one file; known, data: see `read_data`."""
    progress &= processes.is_first()
    report, members = printer(progress), [member_config(config, k) for k in range(1, config.training.committee + 1)]

    def read() -> TrainingData:
        refuse_all_but_committees(config.out, members)
        for member in members:
            refuse_overwriting(member.out)
        return data or read_data(config, report, known)

    shared, jobs = processes.on_first(read), []
    for k, member in enumerate(members, 1):
        report(f"member {k} of {len(members)}")
        with only_training(member.out):
            jobs.append(begun_by_first(partial(begin, member, k, shared), shared))
            run_training(member, jobs[-1], deadline, progress=progress)
    return processes.on_first(partial(finish_committee, config, members, jobs, progress=progress))


def member_config(config: TrainConfig, k: int) -> TrainConfig:
    """The settings of the k-th member, from 1: a seed and a file of its own."""
    settings = config.training.model_copy(update={"committee": 1, "seed": config.training.seed + k - 1})
    return config.model_copy(update={"out": str(Path(config.out).with_suffix(f".{k}.pt")), "training": settings})


def refuse_all_but_committees(out: str, members: list[TrainConfig]) -> None:
    """Raise ConfigError for a name that no model has, and for a file that is there and is none of a committee whose
    training can go on."""
    output_files(out)
    if not Path(out).exists():
        return
    try:
        known = load_tensors(out).get("format") == COMMITTEE
    except ModelFileError:
        known = False
    if not known or not any(output_files(member.out)["resume"].exists() for member in members):
        raise ConfigError(f"out is {out!r}, which exists and is no committee to go on with: rename or remove it")


def finish_committee(config: TrainConfig, members: list[TrainConfig], jobs: list[Training], *, progress: bool) -> dict:
    """Measure the spread of the members against their errors, and write the committee's file."""
    settings, data = config.training, jobs[0].data
    potentials = [load_with_metadata(member.out)[0] for member in members]
    evaluators = evaluators_of(potentials, data, settings)
    report, factors = printer(progress), dict.fromkeys(QUANTITIES, 1.0)
    if data.valid:
        values = committee_residuals(evaluators, data.valid, settings)
        factors = {name: spread_factor(values, name) for name in QUANTITIES}
    else:  # on frames that all have learned the errors are far too small
        report("no validation set: the spread of the members is told as it is, which is too small as a rule")
    sets = {"valid": data.valid} if data.valid or data.test else {"train": data.train}
    sets |= {**data.test, **{some.name: some.held for some in data.beside if some.name != DRIFT}}
    errors = measure_sets(config.out, sets, lambda items: committee_residuals(evaluators, items, settings, factors))
    if jobs[0].began is not None:
        starts = evaluators_of([job.began for job in jobs], data, settings)
        errors = errors_before(errors, sets, lambda items: errors_of(committee_residuals(starts, items, settings)))
    metadata = {"training": config.model_dump(mode="json"), "errors": errors}
    save_committee(config.out, Committee(potentials, factors, metadata))
    report(f"{error_table(errors)}\nwrote {config.out}")
    return errors


def evaluators_of(potentials: list[Potential], data: TrainingData, settings: OptimConfig) -> list[Evaluate]:
    device = resolve_device(settings.device)
    return [evaluator_of(potential.to(device), data.train, settings.accelerate) for potential in potentials]


def spread_factor(values: dict[str, np.ndarray], name: str) -> float:
    """What the spread must be multiplied by to have the size of the errors; 1 where nothing is known."""
    errors, spread = values[f"{name}_predicted"] - values[f"{name}_reference"], values[f"{name}_std"]
    if not len(errors) or not spread.any():
        return 1.0
    return float(np.sqrt(np.mean(errors**2) / np.mean(spread**2)))
