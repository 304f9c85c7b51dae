"""How large the steps of a training are, when it comes to rest, and what happens when one was too large."""

import math
import statistics

from segnn_ase.base.errors import DataError
from segnn_ase.train.resume import Progress
from segnn_ase.train.settings import LoopConfig

SPIKE = 10.0  # times the largest loss of a batch in the epoch before
FIRST_SPIKE = 1000.0  # times the largest loss so far, in the first
SETTLED = 1e-4  # of the mean loss of the first epoch: with less it may jump as it likes
CALMER = 0.5  # what it leaves of the learning rate
CALMEST = 1e-3  # with less, nothing is learnt any more
LONG = 10  # a validation loss is given this part of all epochs to fall,
LEAST_EPOCHS, LEAST_ROWS = 10, 5  # at least so many epochs, and validations


def learning_rate(done: Progress, n_batches: int, settings: LoopConfig) -> float:
    """Linear warm-up over steps, times a linear decay to zero, times what spikes have left."""
    warmup = min(1.0, (done.step + 1) / max(settings.warmup_steps, 1))
    return done.learning_rate * warmup * share_left(done, done.epoch + done.batch / n_batches) * done.calm


def share_left(done: Progress, epoch: float) -> float:
    """What the decay leaves of the learning rate after so many epochs; nothing beyond the end, where a trial may be as
    epochs differ in their batches.
    """
    return done.share * max(done.epochs - epoch, 0.0) / (done.epochs - done.turned)


def has_stalled(done: Progress, patience: int) -> bool:
    """Whether the validation loss of the last `patience` epochs, in the median, is no lower than of as many before.

    Single ones say little where steps are large or frames are few.
    """
    ages = [(done.epoch - row["epoch"], row["valid_loss"]) for row in done.history]
    last = [loss for age, loss in ages if age < patience]
    before = [loss for age, loss in ages if patience <= age < 2 * patience]
    if done.epoch < 2 * patience or not (last and before):
        return False
    return 0.0 < statistics.median(before) <= statistics.median(last) < math.inf


def patience_of(done: Progress, settings: LoopConfig) -> int:
    """In epochs; never less than a validation."""
    if settings.patience:
        return max(settings.patience, settings.validate_every)
    return max(int(done.epochs) // LONG, LEAST_EPOCHS, LEAST_ROWS * settings.validate_every)


def come_to_rest(done: Progress, settings: LoopConfig) -> bool:
    """Let the learning rate fall to zero soon, once, where the validation loss does not fall any more; tells whether.

    Frames are then being learned by heart, which longer training makes worse.
    """
    patience = patience_of(done, settings)
    if done.turned or done.epoch + patience >= done.epochs or not has_stalled(done, patience):
        return False
    done.share, done.turned, done.epochs = share_left(done, done.epoch), done.epoch, done.epoch + patience
    return True


def is_spike(loss: float, done: Progress) -> bool:
    """Whether a step led to where the loss is many times what it was, or no number."""
    first = done.highest == math.inf
    most = FIRST_SPIKE * (done.rising or math.inf) if first else SPIKE * done.highest
    return not (loss < most or is_settled(loss, done))


def is_settled(loss: float, done: Progress) -> bool:
    """Whether a loss is so small beside the first that it does no harm when it wavers, as that of one frame does."""
    return bool(done.history) and loss < SETTLED * done.history[0]["train_loss"]


def calm_down(done: Progress) -> None:
    """Lower the learning rate for the rest of the training. Raises DataError when that has not helped.

    What was the usual loss is forgotten: the average of the weights may be worse than they were.
    """
    done.calm, done.spikes, done.highest, done.rising = CALMER * done.calm, done.spikes + 1, math.inf, 0.0
    if done.calm < CALMEST:
        raise DataError(
            f"the loss rose many times its size, or was no number, {done.spikes} times, the last in epoch "
            f"{done.epoch + 1}, also with a {1 / done.calm:.0f}th of the learning rate: begin a training with a lower "
            f"learning_rate (now {done.learning_rate}), or look for frames with huge forces by segnn check"
        )


def end_epoch(done: Progress) -> None:
    done.highest, done.rising = done.rising or done.highest, 0.0
    done.epoch, done.batch = done.epoch + 1, 0
