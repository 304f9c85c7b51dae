"""The training loop, to be read from top to bottom in `run_training`.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same command and, on
one CPU thread, ends with the same bits.
"""

import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base import figures
from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, OutOfTime
from segnn_ase.base.files import clear_leftovers, progress_bar, stop_on_signal
from segnn_ase.compiled.choose import choose_loss_gradient, choose_operations
from segnn_ase.data.batches import Item, Labels, asked_for, collate_items, edges_of, pack
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.train.characterize import characterize
from segnn_ase.train.evaluation import errors_of, evaluator_of, on_cpu, residuals
from segnn_ase.train.job import Learner, Training, TrainingData, output_files
from segnn_ase.train.loss import loss_of
from segnn_ase.train.old_frames import errors_before, told_of_drift
from segnn_ase.train.optimizers import Soap
from segnn_ase.train.pull import Pull, add_pull
from segnn_ase.train.report import error_table, measure_sets, printer, summary, tensorboard, write_history
from segnn_ase.train.resume import Progress, load_state, save_state
from segnn_ase.train.rollouts import rollouts
from segnn_ase.train.schedule import Pace, calm_down, end_epoch, epochs_in, is_over, is_spike, learning_rate
from segnn_ase.train.settings import USUAL_MINUTES, OptimConfig, TrainConfig

MENDED = "the weights go back to their average, and the learning rate is halved"
BAR = "{percentage:3.0f}%|{bar}| epoch {n:.2f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def run_training(config: TrainConfig, job: Training, deadline: float, *, progress: bool) -> dict:
    """Train from where the resume file stands to the end; returns the errors on every set.

    deadline: of `time.monotonic`, s. Raises OutOfTime after it and KeyboardInterrupt on a signal, when all is saved.
    """
    settings, files = config.training, output_files(config.out)
    clear_leftovers([config.out, *files.values()])
    learner, done, report = make_learner(job, settings), Progress(epochs=settings.epochs), printer(progress)
    if files["resume"].is_file():
        done = load_state(files["resume"], job, learner)
    else:  # first of all files: wherever it is killed, there is a training to go on with
        save_state(files["resume"], job, learner, done)

    bar, pace = progress_bar(shown=progress, total=done.epochs, bar_format=BAR), Pace()
    with stop_on_signal() as stopped, bar, tensorboard(files["tensorboard"], settings.tensorboard) as log_scalars:
        bar.update(done.epoch)
        saved = time.monotonic()
        while not is_over(done, settings.patience):
            train = job.data.learned_in(done.epoch, settings.seed)
            batches = make_batches(train, settings, epoch=done.epoch)
            while done.batch < len(batches):
                done.rate = learning_rate(done, len(batches), settings)
                with pace:
                    batch = collate_items([train[n] for n in batches[done.batch]])
                    training_step(learner, batch, settings, done, report)
                done.step, done.batch = done.step + 1, done.batch + 1
                if done.epochs is None and pace.seconds is not None:
                    bar.total = done.epochs = plan(settings, pace.seconds, len(batches), job.data, done.epoch, report)
                bar.update(done.epoch + done.batch / len(batches) - bar.n)
                late = time.monotonic() > deadline
                if stopped or late or is_due(saved, settings):
                    save_state(files["resume"], job, learner, done)
                    saved = time.monotonic()
                if stopped or late:
                    reason = KeyboardInterrupt if stopped else OutOfTime
                    raise reason(f"stopped in epoch {done.epoch + 1}; the same command goes on from {files['resume']}")
            end_epoch(done)
            if done.epoch % settings.validate_every == 0 or done.epoch == done.epochs:
                row = validate(learner, job.data, settings, done, len(batches))
                done.history.append(row)
                bar.set_postfix_str(summary(row), refresh=False)
                if better(row, done, settings, len(job.data.chosen_by)):
                    keep(row, done, settings)
                    save_potential(config.out, learner.averaged, metadata={**job.metadata, "epoch": done.epoch})
                write_history(files["csv"], done.history)
                log_scalars(row)
            done.loss = 0.0
            if is_due(saved, settings):
                save_state(files["resume"], job, learner, done)
                saved = time.monotonic()
        save_state(files["resume"], job, learner, done)
        if stopped:  # in the last validation
            raise KeyboardInterrupt(f"stopped; the same command goes on from {files['resume']}")
    save_potential(files["last"], learner.averaged, metadata={**job.metadata, "epoch": done.epoch})
    return finish(config, job, done.history, progress=progress)


def is_due(saved: float, settings: OptimConfig) -> bool:
    """Whether it is long ago that a resume file was written."""
    return time.monotonic() - saved > 60 * settings.save_minutes


def make_learner(job: Training, settings: OptimConfig) -> Learner:
    potential = job.potential.to(resolve_device(settings.device))
    averaged = copy.deepcopy(potential).requires_grad_(False)
    weights, means = trainable(potential, settings.freeze), dict(averaged.named_parameters())
    example = job.data.smallest.graph.to(potential.device)
    parameters, betas = list(weights.values()), (settings.beta1, settings.beta2)
    return Learner(
        potential,
        averaged,
        weights=parameters,
        means=[means[name] for name in weights],
        optimizer=Soap(parameters, betas=betas, weight_decay=settings.weight_decay, every=settings.turn_every),
        loss_gradient=choose_loss_gradient(potential, example, settings.accelerate),
        operations=choose_operations(averaged, example, settings.accelerate),
        pull=pull_of(job, list(weights)),
    )


def pull_of(job: Training, names: list[str]) -> Pull | None:
    """Towards the weights of these names with which a fine-tuning began."""
    if job.began is None or not job.pull:
        return None
    beginning = dict(job.began.to(job.potential.device).named_parameters())
    return Pull(job.pull, [beginning[name].detach() for name in names])


def plan(
    settings: OptimConfig, seconds: float, n_batches: int, data: TrainingData, epoch: int, report: Callable
) -> int:
    """The number of epochs that the minutes allow, told, at least to the end of the present one; seconds: of a step."""
    minutes = settings.minutes or USUAL_MINUTES
    train = data.learned_in(0, settings.seed)
    epochs = max(epochs_in(minutes, seconds, n_batches, train, data.chosen_by), epoch + 1)
    report(f"{1e3 * seconds:.0f} ms a step, {n_batches} steps an epoch: {epochs} epochs for {minutes:g} minutes")
    return epochs


def training_step(learner: Learner, batch: Item, settings: OptimConfig, done: Progress, report: Callable) -> None:
    """Change the weights along the gradient of the loss on a batch; after a spike, back to their average."""
    for weight in learner.weights:
        weight.grad = None
    device = learner.potential.device
    graph, labels = batch.graph.to(device), Labels(*(x.to(device) for x in batch.labels))
    loss = learner.loss_gradient(graph, lambda p: loss_of(p, graph, labels, settings), **asked_for(batch.labels))
    add_pull(learner.weights, learner.pull)
    norm = torch.nn.utils.clip_grad_norm_(learner.weights, settings.clip_norm)
    if is_spike(value := float(loss), done) or not math.isfinite(norm):
        report(f"epoch {done.epoch + 1}: the loss jumps to {value:.3g}: {MENDED}")
        go_back(learner)
        calm_down(done, settings)
        return
    done.loss, done.rising = done.loss + value, max(done.rising, value)
    learner.optimizer.step(done.rate)
    update_average(learner.means, learner.weights, done.step + 1, settings.ema_decay)


@torch.no_grad()
def go_back(learner: Learner) -> None:
    """From where a step too large has led, to the mean of the weights before."""
    torch._foreach_copy_(learner.weights, learner.means)
    learner.optimizer.forget()


@torch.no_grad()
def update_average(means: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Exponential moving average of the weights, shorter at the start."""
    torch._foreach_lerp_(means, parameters, 1.0 - min(decay, (1 + step) / (10 + step)))


def trainable(potential: Potential, freeze: tuple[str, ...]) -> dict[str, Tensor]:
    """Named parameters that are not frozen. Raises ConfigError for a name that freezes nothing."""
    names = [name for name, _ in potential.named_parameters()]
    frozen = {prefix: {n for n in names if n == prefix or n.startswith(prefix + ".")} for prefix in freeze}
    for prefix, found in frozen.items():
        if not found:
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ConfigError(f"freeze has {prefix!r}, which is no part of the model; parts are {', '.join(parts)}")
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(not any(name in found for found in frozen.values()))
    kept = {name: p for name, p in potential.named_parameters() if p.requires_grad}
    if not kept:
        raise ConfigError(f"freeze is {list(freeze)}: nothing is left to train")
    return kept


def make_batches(items: list[Item], settings: OptimConfig, *, epoch: int) -> list[list[int]]:
    """Shuffled by seed and epoch, cut into batches of indices."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(items)).tolist()
    return pack(order, edges_of(items), settings.batch_size, settings.max_edges)


def validate(learner: Learner, data: TrainingData, settings: OptimConfig, done: Progress, n: int) -> dict:
    """A row of the history: where the training stands, errors on the validation set, rollouts where they are due."""
    row = {"epoch": done.epoch, "step": done.step, "lr": done.rate, "train_loss": done.loss / n, "spikes": done.spikes}
    averaged = learner.averaged
    evaluate = on_cpu(PlainEvaluator(averaged, learner.operations), averaged.device)
    errors = errors_of(residuals(evaluate, data.chosen_by, settings))
    row |= {f"valid_{name}": value for name, value in errors.items()}
    return row | rollouts(averaged, data, settings, done)


def better(row: dict, done: Progress, settings: OptimConfig, frames: int) -> bool:
    """Whether a model is to be kept instead of the one before: also where its loss is not lower, but as good as the
    lowest for all that this number of validation frames can tell. Later ones made smaller steps, and are better on
    frames that chose nothing.
    """
    if settings.select == "stability":
        if row["survived"] is None:  # only until a rollout has been
            return not done.survived and done.best == math.inf
        if row["survived"] != done.survived:
            return row["survived"] > done.survived
    return row["valid_loss"] < (1 + frames**-0.5) * done.best


def keep(row: dict, done: Progress, settings: OptimConfig) -> None:
    """Note the lowest loss among models that are as stable."""
    survived = row["survived"] or 0.0
    alike = settings.select == "loss" or survived == done.survived
    done.best, done.survived = min(row["valid_loss"], done.best if alike else math.inf), survived


def finish(config: TrainConfig, job: Training, history: list[dict], *, progress: bool) -> dict:
    """Evaluate the kept model on every set, store its errors in the file, write plots, print the table."""
    settings, data = config.training, job.data
    potential, kept = load_with_metadata(config.out)
    evaluate = evaluator_of(potential.to(resolve_device(settings.device)), data.train, settings.accelerate)
    known = {"closest": data.closest, "lone_atoms": job.lone_atoms, "before": job.before}
    characterize(potential, data.train, data.valid, **known, evaluate=evaluate)
    sets = {"train": data.train, "valid": data.valid, **data.test, **{old.name: old.held for old in data.old}}
    errors = measure_sets(config.out, sets, lambda items: residuals(evaluate, items, settings, potential.uncertainty))
    if job.began is not None:
        start = evaluator_of(job.began.to(potential.device), data.train, settings.accelerate)
        errors = errors_before(errors, sets, lambda items: errors_of(residuals(start, items, settings)))
    save_potential(config.out, potential, metadata={**job.metadata, "epoch": kept["epoch"], "errors": errors})
    if len(history) > 1:
        figures.plot_learning_curve(output_files(config.out)["curve"], history)
    epoch = f"kept is epoch {kept['epoch']} of {history[-1]['epoch']}"
    told = [error_table(errors), *(told_of_drift(old, errors) for old in data.old), epoch, f"wrote {config.out}"]
    printer(progress)("\n".join(line for line in told if line))
    return errors
