"""One step of a training, and what it changes."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError
from segnn_ase.base.processes import any_of
from segnn_ase.data.batches import Item, collate_items, edges_of, pack
from segnn_ase.train.job import Learner, Training
from segnn_ase.train.optimizers import Soap
from segnn_ase.train.pull import Pull, add_pull
from segnn_ase.train.resume import Progress
from segnn_ase.train.schedule import calm_down, is_spike, learning_rate
from segnn_ase.train.settings import LoopConfig
from segnn_ase.train.together import gradient_of_all

HARDLY_BETTER = 0.3  # the loss of averaged weights, times that of the present ones, where these are not to blame
MENDED = "the weights go back to their average, and the learning rate is halved"


def make_learner(job: Training, settings: LoopConfig) -> Learner:
    """What is to change of a model, with a new optimiser."""
    model = job.model.to(resolve_device(settings.device))
    averaged = copy.deepcopy(model).requires_grad_(False)
    weights, means = trainable(model, settings.freeze), dict(averaged.named_parameters())
    parameters, betas = list(weights.values()), (settings.beta1, settings.beta2)
    return Learner(
        model,
        averaged,
        weights=parameters,
        means=[means[name] for name in weights],
        trusted=[means[name].clone() for name in weights],
        optimizer=Soap(parameters, betas=betas, weight_decay=settings.weight_decay, every=settings.turn_every),
        gradient=job.goal.gradient(model, job.data.smallest, settings),
        measure=job.goal.measure(averaged, job.data.smallest, settings),
        pull=pull_of(job, list(weights)),
    )


def pull_of(job: Training, names: list[str]) -> Pull | None:
    """Towards the weights of these names with which a fine-tuning began."""
    if job.began is None or not job.pull:
        return None
    beginning = dict(job.began.to(job.model.device).named_parameters())
    return Pull(job.pull, [beginning[name].detach() for name in names])


def trainable(model: nn.Module, freeze: tuple[str, ...]) -> dict[str, Tensor]:
    """Named parameters that are not frozen. Raises ConfigError for a name that freezes nothing."""
    names = [name for name, _ in model.named_parameters()]
    frozen = {prefix: {n for n in names if n == prefix or n.startswith(prefix + ".")} for prefix in freeze}
    for prefix, found in frozen.items():
        if not found:
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ConfigError(f"freeze has {prefix!r}, which is no part of the model; parts are {', '.join(parts)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(name in found for found in frozen.values()))
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not kept:
        raise ConfigError(f"freeze is {list(freeze)}: nothing is left to train")
    return kept


def make_batches(items: list[Item], settings: LoopConfig, *, epoch: int) -> list[list[int]]:
    """Shuffled by seed and epoch, cut into batches of indices."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(items)).tolist()
    return pack(order, edges_of(items), settings.batch_size, settings.max_edges)


def next_step(
    learner: Learner,
    train: list[Item],
    batches: list[list[int]],
    settings: LoopConfig,
    done: Progress,
    report: Callable,
) -> None:
    """The step on the next batch of an epoch, at the learning rate of its place in the training."""
    done.rate = learning_rate(done, len(batches), settings)
    training_step(learner, [train[n] for n in batches[done.batch]], settings, done, report)
    done.step, done.batch = done.step + 1, done.batch + 1


def training_step(learner: Learner, items: list[Item], settings: LoopConfig, done: Progress, report: Callable) -> None:
    """Change the weights along the gradient of the loss on a batch; after a spike, back to their average before it."""
    for weight in learner.weights:
        weight.grad = None
    value = gradient_of_all(learner.gradient, learner.weights, items)
    add_pull(learner.weights, learner.pull)
    norm = torch.nn.utils.clip_grad_norm_(learner.weights, settings.clip_norm)
    if not math.isfinite(norm) or is_spike(value, done):
        forget_last_step(learner)
        if not math.isfinite(norm) or not any_of(is_odd(learner, items, value))[0]:
            report(f"epoch {done.epoch + 1}: the loss jumps to {value:.3g}: {MENDED}")
            go_back(learner)
            calm_down(done)
            return
        update_average(learner.means, learner.weights, done.step, settings.ema_decay)
    done.loss, done.rising = done.loss + value, max(done.rising, value)
    learner.optimizer.step(done.rate)
    with torch.no_grad():
        torch._foreach_copy_(learner.trusted, learner.means)
    update_average(learner.means, learner.weights, done.step + 1, settings.ema_decay)


def is_odd(learner: Learner, items: list[Item], value: float) -> bool:
    """Whether structures have a large loss whatever the weights are, so that no step is to blame.

    As old structures that are learned now and then, and frames unlike all others.
    """
    return HARDLY_BETTER * value < learner.measure.loss(collate_items(items)) < math.inf


@torch.no_grad()
def forget_last_step(learner: Learner) -> None:
    """Take the last step out of the mean of the weights."""
    torch._foreach_copy_(learner.means, learner.trusted)


@torch.no_grad()
def go_back(learner: Learner) -> None:
    """From where a step too large has led, to the mean of the weights before."""
    torch._foreach_copy_(learner.weights, learner.means)
    learner.optimizer.forget()


@torch.no_grad()
def update_average(means: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Exponential moving average of the weights, shorter at the start."""
    torch._foreach_lerp_(means, parameters, 1.0 - min(decay, (1 + step) / (10 + step)))
