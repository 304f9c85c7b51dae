"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base import figures
from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, DataError, OutOfTime
from segnn_ase.base.files import clear_leftovers, progress_bar, stop_on_signal
from segnn_ase.compiled.choose import accelerate_training
from segnn_ase.compiled.cpu_training import TrainingEngine
from segnn_ase.data.batches import Item, asked_for, collate_items
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import assemble
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.structure.graph import edge_vectors
from segnn_ase.train.characterize import characterize
from segnn_ase.train.evaluation import errors_of, evaluate, residuals, speed_up
from segnn_ase.train.job import Training, output_files
from segnn_ase.train.loss import loss_and_prediction, loss_of
from segnn_ase.train.report import (
    error_table,
    log_scalars,
    plot_parities,
    printer,
    summary,
    tensorboard_writer,
    write_history,
)
from segnn_ase.train.resume import Progress, load_state, save_state
from segnn_ase.train.rollouts import rollouts
from segnn_ase.train.settings import OptimConfig, TrainConfig

BAR = "{percentage:3.0f}%|{bar}| epoch {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


def run_training(config: TrainConfig, job: Training, deadline: float, *, progress: bool) -> dict:
    settings, files = config.training, output_files(config.out)
    clear_leftovers([config.out, *files.values()])
    potential = job.potential.to(resolve_device(settings.device))
    smallest = min(job.train, key=lambda item: len(item.graph.edge_src) or math.inf)
    engine = accelerate_training(potential, smallest.graph.to(potential.device), settings.accelerate)
    averaged = copy.deepcopy(potential).requires_grad_(False)
    weights = trainable(potential, settings.freeze)
    parameters, means = list(weights.values()), [dict(averaged.named_parameters())[name] for name in weights]
    optimizer = make_optimizer(parameters, settings)
    done = Progress()
    if files["resume"].is_file():
        done = load_state(files["resume"], job, potential, averaged, optimizer)
    else:  # first of all files: wherever it is killed, there is a training to go on with
        save_state(files["resume"], job, potential, averaged, optimizer, done)
    writer = tensorboard_writer(files["tensorboard"]) if settings.tensorboard else None

    bar = progress_bar(shown=progress, total=settings.epochs, bar_format=BAR)
    with stop_on_signal() as stopped, bar:
        bar.update(done.epoch)
        last_save = time.monotonic()
        while done.epoch < settings.epochs and not out_of_patience(done.history, settings.patience):
            batches = make_batches(job.train, settings, epoch=done.epoch)
            potential.train()
            while done.batch < len(batches):
                fraction = (done.epoch + done.batch / len(batches)) / settings.epochs
                done.rate = learning_rate(done.step, fraction, settings)
                batch = collate_items([job.train[n] for n in batches[done.batch]])
                loss = training_step(potential, engine, parameters, optimizer, batch, settings, done.rate)
                done.step, done.batch, done.loss = done.step + 1, done.batch + 1, done.loss + loss
                update_average(means, parameters, done.step, settings.ema_decay)
                bar.update(done.epoch + done.batch / len(batches) - bar.n)
                late = time.monotonic() > deadline
                if stopped or late or time.monotonic() - last_save > 60 * settings.save_minutes:
                    save_state(files["resume"], job, potential, averaged, optimizer, done)
                    last_save = time.monotonic()
                if stopped or late:
                    reason = KeyboardInterrupt if stopped else OutOfTime
                    raise reason(f"stopped in epoch {done.epoch + 1}; the same command goes on from {files['resume']}")
            check_finite(done, len(batches), settings)
            done.epoch, done.batch = done.epoch + 1, 0
            if done.epoch % settings.validate_every == 0 or done.epoch == settings.epochs:
                row = validate(averaged, job, settings, done, len(batches))
                done.history.append(row)
                bar.set_postfix_str(summary(row))
                if better(row, done, settings):
                    done.best, done.survived = row["valid_loss"], row["survived"] or 0.0
                    save_potential(config.out, averaged, metadata={**job.metadata, "epoch": done.epoch})
                write_history(files["csv"], done.history)
                log_scalars(writer, row)
            done.loss = 0.0
            if time.monotonic() - last_save > 60 * settings.save_minutes:
                save_state(files["resume"], job, potential, averaged, optimizer, done)
                last_save = time.monotonic()
        save_state(files["resume"], job, potential, averaged, optimizer, done)
        if stopped:  # in the last validation
            raise KeyboardInterrupt(f"stopped; the same command goes on from {files['resume']}")
    save_potential(files["last"], averaged, metadata={**job.metadata, "epoch": done.epoch})
    return finish(config, job, done.history, files, progress=progress)


def training_step(
    potential: Potential,
    engine: TrainingEngine | None,
    parameters: list,
    optimizer,
    batch: Item,
    settings: OptimConfig,
    rate: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    if engine is not None and any(asked_for(batch.labels).values()):
        loss = loss_by_engine(engine, batch, settings)
    else:
        loss = loss_and_prediction(potential, batch, settings)[0]
        loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    optimizer.step()
    return float(loss.detach())


def loss_by_engine(engine: TrainingEngine, batch: Item, settings: OptimConfig) -> Tensor:
    """The loss, with its gradient left in the parameters' `grad`."""
    graph, labels = batch.graph, batch.labels
    asked, vectors = asked_for(labels), edge_vectors(graph)

    def loss(energies: Tensor, g: Tensor) -> Tensor:
        return loss_of(assemble(graph, vectors, energies, g, None, **asked), graph, labels, settings)

    return engine.step(graph, loss)


def learning_rate(step: int, fraction: float, settings: OptimConfig) -> float:
    """Linear warm-up over steps, times a linear decay to zero over the whole training."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    return settings.learning_rate * warmup * (1.0 - fraction)


@torch.no_grad()
def update_average(means: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Exponential moving average of the weights, shorter at the start."""
    torch._foreach_lerp_(means, parameters, 1.0 - min(decay, (1 + step) / (10 + step)))


def make_optimizer(parameters: list, settings: OptimConfig) -> torch.optim.Optimizer:
    options = {"lr": settings.learning_rate, "betas": (0.9, settings.beta2), "fused": True}
    if settings.weight_decay > 0:
        return torch.optim.AdamW(parameters, **options, weight_decay=settings.weight_decay)
    return torch.optim.Adam(parameters, **options)


def trainable(potential: Potential, freeze: tuple[str, ...]) -> dict[str, Tensor]:
    """Named parameters that are not frozen. Raises ConfigError for a name that freezes nothing."""
    names = [name for name, _ in potential.named_parameters()]
    for prefix in freeze:
        if not any(name == prefix or name.startswith(prefix + ".") for name in names):
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ConfigError(f"freeze has {prefix!r}, which is no part of the model; parts are {', '.join(parts)}")
    frozen = {n for n in names if any(n == prefix or n.startswith(prefix + ".") for prefix in freeze)}
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(name not in frozen)
    kept = {name: p for name, p in potential.named_parameters() if name not in frozen}
    if not kept:
        raise ConfigError(f"freeze is {list(freeze)}: nothing is left to train")
    return kept


def make_batches(items: list[Item], settings: OptimConfig, *, epoch: int) -> list[list[int]]:
    """Shuffle by seed and epoch, then cut into batches of indices by structures or by a budget of edges."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(items)).tolist()
    if settings.max_edges is not None:
        return pack_by_edges(order, [len(item.graph.edge_src) for item in items], settings.max_edges)
    return [order[n : n + settings.batch_size] for n in range(0, len(order), settings.batch_size)]


def pack_by_edges(order: list[int], edges: list[int], budget: int) -> list[list[int]]:
    """Fill each batch until the next structure would exceed the budget; a larger structure is a batch of its own."""
    groups: list[list[int]] = [[]]
    total = 0
    for n in order:
        if groups[-1] and total + edges[n] > budget:
            groups.append([])
            total = 0
        groups[-1].append(n)
        total += edges[n]
    return groups


def validate(averaged: Potential, job: Training, settings: OptimConfig, done: Progress, n: int) -> dict:
    errors = evaluate(averaged, job.valid or job.train, settings)
    row = {"epoch": done.epoch, "step": done.step, "lr": done.rate, "train_loss": done.loss / n}
    row |= {f"valid_{name}": value for name, value in errors.items()}
    return row | rollouts(averaged, job, settings, done)


def better(row: dict, done: Progress, settings: OptimConfig) -> bool:
    """Whether a model is to be kept instead of the one before."""
    if settings.select == "loss":
        return row["valid_loss"] < done.best
    if row["survived"] is None:  # only until a rollout has been
        return not done.survived and done.best == math.inf
    return (-row["survived"], row["valid_loss"]) < (-done.survived, done.best)


def out_of_patience(history: list[dict], patience: int | None) -> bool:
    """True when none of the last `patience` epochs improved the validation loss."""
    if patience is None or not history:
        return False
    best = min(history, key=lambda row: row["valid_loss"])
    return history[-1]["epoch"] - best["epoch"] >= patience


def check_finite(done: Progress, n: int, settings: OptimConfig) -> None:
    if not math.isfinite(done.loss):
        raise DataError(
            f"the loss is {done.loss / n} in epoch {done.epoch + 1}: lower learning_rate "
            f"(now {settings.learning_rate}), or look for frames with huge forces"
        )


def finish(config: TrainConfig, job: Training, history: list[dict], files: dict, *, progress: bool) -> dict:
    """Evaluate the best model on every set, store its errors in the file, write plots, print the table."""
    potential, metadata = load_with_metadata(config.out)
    potential = potential.to(resolve_device(config.training.device))
    speed_up(potential, job.train, config.training.accelerate)
    characterize(potential, job.train, job.valid, job.closest, lone_atoms=job.lone_atoms, before=job.before)
    sets = {"train": job.train, "valid": job.valid, **job.test}
    errors = {}
    for name, items in sets.items():
        if not items:
            continue
        values = residuals(potential, items, config.training)
        errors[name] = {k: v for k, v in errors_of(values).items() if k != "loss"}
        if name != "train":
            stem = Path(name).stem
            alone = sum(Path(other).stem == stem for other in sets) == 1
            plot_parities(Path(config.out), stem if alone else "_".join(Path(name).parts[-2:]), values)
    save_potential(config.out, potential, metadata={**metadata, "errors": errors})
    if len(history) > 1:
        figures.plot_learning_curve(files["curve"], history)
    printer(progress)(f"{error_table(errors)}\nwrote {config.out}")
    return errors
