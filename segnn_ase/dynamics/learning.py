"""Training of a time-stepper, by the loop of all trainings: mean squares of positions, as published."""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.errors import DataError, expect
from segnn_ase.base.figures import plot_learning_curve
from segnn_ase.base.processes import is_first, on_first
from segnn_ase.data.batches import Item, collate_items, edges_of, known_values, pack
from segnn_ase.dynamics.files import load_stepper, save_stepper
from segnn_ase.dynamics.motion import Motion, read_motion
from segnn_ase.dynamics.settings import StepperTraining, stepper_config
from segnn_ase.dynamics.stepper import Scales, TimeStepper, bodies, centre_of
from segnn_ase.store.tensors import checksum
from segnn_ase.structure.graph import collate, sum_over_atoms
from segnn_ase.train.job import (
    OF_RUN,
    Goal,
    Gradient,
    Measure,
    Training,
    TrainingData,
    nothing_more,
    output_files,
    refuse_overwriting,
)
from segnn_ase.train.loop import run_training
from segnn_ase.train.report import printer
from segnn_ase.train.resume import decisive_settings
from segnn_ase.train.settings import LoopConfig
from segnn_ase.train.start import deadline_of
from segnn_ase.train.together import join_for, only_training

CALIBRATION = 64  # systems
SINCE = {"steps": 1}  # settings that came later, as the networks before had them


class After(NamedTuple):
    """Labels: where the bodies are later, and how fast."""

    positions: Tensor  # (N, 3)
    velocities: Tensor  # (N, 3)

    def beside(self, predicted: Tensor) -> Tensor:
        """(N, 3), or (N, 6) where velocities are predicted, too."""
        return torch.cat(self, dim=1)[:, : predicted.shape[1]].to(predicted.device)


def train_stepper(config: StepperTraining, *, progress: bool = True) -> dict:
    """Train a time-stepper and write it to config.out. Returns mean squared errors, {"test": {"mse": …}, …}.

    Raises ConfigError for settings that do not fit, OutOfTime when `max_minutes` are over; the same call goes on.
    """
    expect(isinstance(config, StepperTraining), "config", config, "a StepperTraining")
    join_for(config)
    with only_training(config.out):
        progress &= is_first()
        job = on_first(partial(training_of_stepper, config, printer(progress)))
        return run_training(config, job, deadline_of(config.training), progress=progress)


def training_of_stepper(config: StepperTraining, report) -> Training:
    """A training of a time-stepper with random weights."""
    refuse_overwriting(config.out)
    data = read_sets_of_motion(config)
    job = Training(fresh_stepper(config, data), data, STEPPER, *known_of(config, data))
    size = sum(p.numel() for p in job.model.parameters())
    report(f"{len(data.train)} systems to learn from, sha256 {data.checksum[:12]}; {size} parameters")
    return job


def read_sets_of_motion(config: StepperTraining) -> TrainingData:
    """Systems for training, validation and tests, one after the other. Raises DataError where there are fewer."""
    data, neighbors, motion = config.data, stepper_config(**config.model).neighbors, read_motion(config.data.motion)
    ends = np.cumsum([data.train, data.valid, data.test])
    if len(motion.charges) < ends[-1]:
        asked = f"{data.train} + {data.valid} + {data.test} (data.train, data.valid, data.test)"
        raise DataError(f"{data.motion} has {len(motion.charges)} systems; expected {asked}")
    motion = Motion(*(x[: ends[-1]] for x in motion))
    parts = [Motion(*part) for part in zip(*(np.split(x, ends[:-1]) for x in motion), strict=True)]
    train, valid, test = (items_of(part, neighbors) for part in parts)
    if data.backwards:
        train += items_of(backwards(parts[0]), neighbors)
    learned = checksum([[*item.graph[:-1], *item.labels] for items in (train, valid) for item in items] + [data.train])
    return TrainingData(train, valid, {"test": test}, learned, [], {})


def items_of(motion: Motion, neighbors: int | None) -> list[Item]:
    return [
        Item(bodies(x, v, q, neighbors), After(torch.from_numpy(later), torch.from_numpy(w)))
        for x, v, q, later, w in zip(*motion, strict=True)
    ]


def backwards(motion: Motion) -> Motion:
    """From where the bodies are later to where they were."""
    return Motion(motion.later, -motion.later_velocities, motion.charges, motion.positions, -motion.velocities)


def fresh_stepper(config: StepperTraining, data: TrainingData) -> TimeStepper:
    stepper = TimeStepper(stepper_config(**config.model), scales=scales_of(data.train), seed=config.training.seed)
    stepper.to(resolve_dtype(config.training.dtype))
    stepper.calibrate(collate([item.graph for item in data.train[:CALIBRATION]]))
    return stepper


def scales_of(items: list[Item]) -> Scales:
    graph = collate([item.graph for item in items])
    moved = torch.cat([item.labels.positions for item in items]) - graph.positions
    values = graph.positions - centre_of(graph), graph.velocities, moved
    return Scales(*(float(x.square().mean().sqrt()) or 1.0 for x in values))


def known_of(config: StepperTraining, data: TrainingData) -> tuple[dict, dict]:
    """What the model file tells of its training, and what must be the same for it to go on."""
    settings = stepper_config(**config.model)
    came_later = {name for name, value in SINCE.items() if getattr(settings, name) == value}
    start = settings.model_dump(mode="json", exclude=came_later)
    same = {"settings": decisive_settings(config), "data": data.checksum, "start": checksum(start)}
    return {"training": config.model_dump(mode="json")}, same


def gradient_of_squares(stepper: TimeStepper, example: Item, settings: LoopConfig) -> Gradient:
    def gradient(batch: Item, whole: tuple[int, ...] | None = None) -> float:
        later = stepper(batch.graph.to(stepper.device))
        loss = (later - batch.labels.beside(later)).square().mean()
        loss = loss if whole is None else loss * (known_values([batch])[0] / whole[0])
        loss.backward()
        return float(loss.detach())

    return gradient


def squares_of(stepper: TimeStepper, example: Item | None, settings: LoopConfig) -> Measure:
    """Mean squared errors of each system, by the weights that the stepper has; "positions" are those of positions."""

    @torch.no_grad()
    def squares(batch: Item) -> Tensor:
        later = stepper(batch.graph.to(stepper.device)).cpu()
        return (later - batch.labels.beside(later)).square()

    def residuals(items: list[Item]) -> dict[str, np.ndarray]:
        found = []
        for numbers in pack(list(range(len(items))), edges_of(items), settings.batch_size, settings.max_edges):
            batch = collate_items([items[n] for n in numbers])
            each = squares(batch)
            means = torch.stack([each.mean(dim=1), each[:, :3].mean(dim=1)], dim=1)
            count = torch.bincount(batch.graph.batch, minlength=batch.graph.n_graphs)
            found.append((sum_over_atoms(means, batch.graph) / count[:, None]).numpy())
        loss, positions = np.concatenate(found).T
        return {"loss": loss, "positions": positions}

    return Measure(residuals, lambda batch: float(squares(batch).mean()))


def means_of(found: dict[str, np.ndarray]) -> dict:
    """Of all systems."""
    return {name: float(values.mean()) for name, values in found.items()}


def losses_told(row: dict) -> str:
    return f"loss {row['train_loss']:.3g}/{row['valid_loss']:.3g}"


def finish_stepper(config: StepperTraining, job: Training, history: list[dict], *, progress: bool) -> dict:
    """Measure the kept model on every set, store its errors in the file, print them."""
    stepper, kept = load_stepper(config.out)
    measure = squares_of(stepper.to(resolve_device(config.training.device)), None, config.training)
    sets = {"train": job.data.train, "valid": job.data.valid, **job.data.test}
    errors = {name: {"mse": means_of(measure.residuals(items))["positions"]} for name, items in sets.items()}
    metadata = {**job.metadata, **{name: kept[name] for name in OF_RUN}, "errors": errors}
    save_stepper(config.out, stepper, metadata=metadata)
    plot_learning_curve(output_files(config.out)["curve"], history)
    told = ", ".join(f"{name} {values['mse']:.5f}" for name, values in errors.items())
    printer(progress)(f"mean squared errors: {told}\nwrote {config.out}")
    return errors


STEPPER = Goal(gradient_of_squares, squares_of, means_of, losses_told, nothing_more, save_stepper, finish_stepper)
