"""How long a training is, how large its steps are, and what happens when one was too large."""

import math
import time
from collections.abc import Callable

from segnn_ase.base.errors import DataError
from segnn_ase.data.batches import Item, edges_of
from segnn_ase.train.resume import Progress
from segnn_ase.train.settings import OptimConfig

FIRST_STEPS = 5  # in which caches fill and the optimizer starts
MEASURED_STEPS = 20  # that tell how long all others take
EVALUATION = 0.35  # of the time of a training step on the same structures; forward and one gradient of three passes
MOST_EPOCHS = 2000  # more only learn the frames by heart
SPIKE = 10.0  # times the largest loss of a batch in the epoch before
FIRST_SPIKE = 1000.0  # times the largest loss so far, in the first
SETTLED = 1e-4  # of the mean loss of the first epoch: with less it may jump as it likes
CALMER = 0.5  # what it leaves of the learning rate
CALMEST = 1e-3  # with less, nothing is learnt any more


def learning_rate(done: Progress, n_batches: int, settings: OptimConfig) -> float:
    """Linear warm-up over steps, times a linear decay to zero over the whole training, times what spikes have left."""
    warmup = min(1.0, (done.step + 1) / max(settings.warmup_steps, 1))
    past = 0.0 if done.epochs is None else (done.epoch + done.batch / n_batches) / done.epochs
    return settings.learning_rate * warmup * (1.0 - past) * done.calm


class Pace:
    """Measures the steps that are made within it, after the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._steps, self._spent, self._began = clock, 0, 0.0, 0.0

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        self._steps += 1
        if self._steps > FIRST_STEPS:
            self._spent += self._clock() - self._began

    @property
    def seconds(self) -> float | None:
        """Of a step; None as long as too few have been made."""
        measured = self._steps - FIRST_STEPS
        return None if measured < MEASURED_STEPS else self._spent / measured


def epochs_in(minutes: float, seconds: float, n_batches: int, train: list[Item], valid: list[Item]) -> int:
    """The passes over `train`, with a validation after each, that a time allows; seconds: of a step."""
    validation = EVALUATION * sum(edges_of(valid)) / max(sum(edges_of(train)), 1)
    return int(min(max(60 * minutes / (seconds * n_batches * (1 + validation)), 1), MOST_EPOCHS))


def is_over(done: Progress, patience: int | None) -> bool:
    return (done.epochs is not None and done.epoch >= done.epochs) or out_of_patience(done.history, patience)


def out_of_patience(history: list[dict], patience: int | None) -> bool:
    """True when none of the last `patience` epochs improved the validation loss."""
    if patience is None or not history:
        return False
    best = min(history, key=lambda row: row["valid_loss"])
    return history[-1]["epoch"] - best["epoch"] >= patience


def is_spike(loss: float, done: Progress) -> bool:
    """Whether a step led to where the loss is many times what it was, or no number."""
    first = done.highest == math.inf
    most = FIRST_SPIKE * (done.rising or math.inf) if first else SPIKE * done.highest
    return not (loss < most or is_settled(loss, done))


def is_settled(loss: float, done: Progress) -> bool:
    """Whether a loss is so small beside the first that it does no harm when it wavers, as that of one frame does."""
    return bool(done.history) and loss < SETTLED * done.history[0]["train_loss"]


def calm_down(done: Progress, settings: OptimConfig) -> None:
    """Lower the learning rate for the rest of the training. Raises DataError when that has not helped.

    What was the usual loss is forgotten: the average of the weights may be worse than they were.
    """
    done.calm, done.spikes, done.highest, done.rising = CALMER * done.calm, done.spikes + 1, math.inf, 0.0
    if done.calm < CALMEST:
        raise DataError(
            f"the loss rose many times its size, or was no number, {done.spikes} times, the last in epoch "
            f"{done.epoch + 1}, also with a {1 / done.calm:.0f}th of the learning rate: lower learning_rate (now "
            f"{settings.learning_rate}), or look for frames with huge forces by segnn check"
        )


def end_epoch(done: Progress) -> None:
    done.highest, done.rising = done.rising or done.highest, 0.0
    done.epoch, done.batch = done.epoch + 1, 0
