"""What a training finds out by steps that are thrown away: how long it can be, and how large its steps are to be.

Which learning rate is best differs between data by more than a factor of three, and already short trainings tell.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from segnn_ase.base import processes
from segnn_ase.base.errors import DataError
from segnn_ase.base.files import progress_bar
from segnn_ase.data.batches import Item, edges_of
from segnn_ase.train.job import Learner, Training, TrainingData
from segnn_ase.train.resume import Progress
from segnn_ase.train.rollouts import TIMES, start_of_rollouts
from segnn_ase.train.schedule import end_epoch
from segnn_ase.train.settings import USUAL_MINUTES, LoopConfig, OptimConfig
from segnn_ase.train.step import make_batches, make_learner, next_step
from segnn_ase.train.together import residuals_of_all, tell_of_idle

MEASURED_STEPS = 25  # that tell how long all others take
FIRST = 5  # one in so many of these, the first, fill caches and are left out
ALIKE = 0.05  # rms part by which their sizes differ, where these tell nothing of others
LEAST_FIRST = {"cpu": 1, "cuda": 25}  # as are so many, which are there besides; on a GPU recordings are made
MOST_MEASURED = 0.03  # of the time, for these steps
EVALUATION = 0.35  # of the time of a training step on the same structures; forward and one gradient of three passes
PART_MOVED = 0.1  # of the time, above which short dynamics are told
FEWEST_EPOCHS, PER_FRAME, MOST_EPOCHS = 400, 4, 2000  # as many as minutes allow, but no more than so many a frame
RATES = (0.03, 0.01, 0.003)  # learning rates, tried from the largest on
AS_GOOD = 1.1  # times the lowest loss; of rates that do so well the smallest is taken, as it overfits later
PART, MOST_PART = 20, 8  # a trial has this part of the epochs, and up to the latter, where it would be too short
LEAST, MOST = 200, 2000  # steps of a trial: fewer tell nothing, more are not needed
BAR = "{percentage:3.0f}%|{bar}| trial of learning rate {desc} [{elapsed}<{remaining}]"


def find_out(
    job: Training,
    settings: LoopConfig,
    done: Progress,
    report: Callable,
    *,
    save: Callable[[], None],
    stop: Callable[[], None],
    progress: bool,
) -> None:
    """Set the number of epochs and the learning rate; what is known of them already is kept.

    save: writes what is known; stop: raises an error when it is time to end, as it does after each step.
    """
    train = job.data.learned_in(0, settings.seed)
    first = make_batches(train, settings, epoch=0)
    batches = len(first)
    tell_of_idle(train, first, report)
    if done.planned is None:
        done.planned = settings.epochs or plan(job, settings, train, batches, report)
        save()
    length = steps_of_trials(settings, done.planned * batches)
    if settings.learning_rate is None and length:
        while rate := next_rate(done.trials):
            done.trials.append((rate, loss_of_trial(job, settings, rate, length, batches, stop, progress)))
            save()
    done.learning_rate = settings.learning_rate or smallest_good(done.trials)
    spent = 0 if settings.epochs else len(done.trials) * length / batches
    done.epochs = max(round(done.planned - spent), 1)
    losses = ", ".join(f"{loss:.3g} with {rate:g}" for rate, loss in done.trials)
    tried = f", as the validation loss is {losses} after {length} steps" if losses else ""
    report(f"{done.epochs} epochs with a learning rate of {done.learning_rate:g}{tried}")
    save()


def plan(job: Training, settings: LoopConfig, train: list[Item], batches: int, report: Callable) -> int:
    """The number of epochs that the minutes allow, told."""
    minutes, seconds = settings.minutes or USUAL_MINUTES, seconds_of_step(job, settings)
    moved = minutes_of_rollouts(job, settings, seconds * batches / max(sum(edges_of(train)), 1))
    left = max(minutes - moved, minutes / 2)
    epochs = min(epochs_in(left, seconds, batches, train, job.data.chosen_by), most_epochs(len(job.data.train)))
    told = f"{1e3 * seconds:.0f} ms a step, {batches} steps an epoch: {epochs} epochs for {minutes:g} minutes"
    if moved > PART_MOVED * minutes:
        told += f", of which short dynamics take {moved:.1f} (--rollout-steps 0: none)"
    if seconds * batches > 60 * left:
        told += f"\nwarning: one epoch takes {seconds * batches / 60:.1f} minutes: fewer frames, or more minutes"
    report(told)
    return epochs


def minutes_of_rollouts(job: Training, settings: LoopConfig, seconds: float) -> float:
    """Of all short dynamics; seconds: of a training step, for each pair of neighbours in it."""
    steps = settings.rollout_steps if isinstance(settings, OptimConfig) else 0
    start = start_of_rollouts(job.data, settings.seed) if steps and job.model.config.smooth else None
    if start is None:
        return 0.0
    return TIMES * 2 * steps * EVALUATION * seconds * sum(edges_of([start])) / 60


def steps_of_trials(settings: LoopConfig, steps: int) -> int:
    """The length of a trial in a training of so many steps; 0 where it would be too short to tell anything."""
    least = max(LEAST, 4 * settings.warmup_steps, round(2 / (1 - settings.ema_decay)))
    return min(max(steps // PART, least), max(MOST, least)) if steps // MOST_PART >= least else 0


def epochs_in(minutes: float, seconds: float, n_batches: int, train: list[Item], valid: list[Item]) -> int:
    """The passes over `train`, with a validation after each, that a time allows; seconds: of a step."""
    validation = EVALUATION * sum(edges_of(valid)) / max(sum(edges_of(train)), 1)
    return int(max(60 * minutes / (seconds * n_batches * (1 + validation)), 1))


def most_epochs(frames: int) -> int:
    """After which so many frames are known by heart."""
    return min(max(PER_FRAME * frames, FEWEST_EPOCHS), MOST_EPOCHS)


def seconds_of_step(job: Training, settings: LoopConfig, clock: Callable[[], float] = time.monotonic) -> float:
    """Of the mean of all batches, measured on so many steps, on fewer where they are slow."""
    most, spent, sizes = MOST_MEASURED * 60 * (settings.minutes or USUAL_MINUTES), [], []
    done = Progress(epochs=MEASURED_STEPS, learning_rate=settings.learning_rate or RATES[-1])
    learner = learner_of_trial(job, settings)
    least, began = LEAST_FIRST[learner.model.device.type], clock()
    with contextlib.suppress(DataError):  # if it explodes, that is told when it does so in earnest
        for size in steps_of_trial(learner, done, job.data, settings, MEASURED_STEPS - 1 + least):
            spent.append(clock() - began)
            sizes.append(size)
            if processes.any_of(len(spent) > least and sum(spent[least - 1 :]) > most)[0]:
                break
            began = clock()
    first = min(max(len(spent) // FIRST, least), len(spent) - 1)
    train = job.data.learned_in(0, settings.seed)
    mean = sum(edges_of(train)) / len(make_batches(train, settings, epoch=0))
    return processes.on_first(lambda: seconds_at(mean, sizes[first:], spent[first:]))


def seconds_at(size: float, sizes: list[int], seconds: list[float]) -> float:
    """Of a step with so many pairs of neighbours, by a straight line through others that does not fall, and begins at
    zero at least; in proportion, where these are all alike."""
    x, y = np.array(sizes, dtype=float), np.array(seconds)
    middle, spread = x.mean(), x - x.mean()
    steepest = y.mean() / max(middle, 1.0)
    known = np.sqrt(np.mean(spread**2)) > ALIKE * middle
    slope = float(np.clip(spread @ y / (spread @ spread), 0.0, steepest)) if known else steepest
    return float(y.mean() + slope * (size - middle))


def next_rate(trials: list[tuple[float, float]]) -> float | None:
    """The next smaller one, as long as the last was not worse than others."""
    left = RATES[len(trials) :]
    return left[0] if left and (not trials or smallest_good(trials) == trials[-1][0]) else None


def smallest_good(trials: list[tuple[float, float]]) -> float:
    """The smallest learning rate whose loss is near the lowest; the largest where they tell nothing."""
    lowest = min((loss for _, loss in trials), default=0.0)
    return min((rate for rate, loss in trials if loss <= AS_GOOD * lowest), default=RATES[0]) if lowest else RATES[0]


def loss_of_trial(
    job: Training,
    settings: LoopConfig,
    rate: float,
    length: int,
    batches: int,
    stop: Callable[[], None],
    progress: bool,
) -> float:
    """The validation loss after so many steps, infinite where it explodes; batches: of an epoch."""
    learner, done = learner_of_trial(job, settings), Progress(epochs=length / batches, learning_rate=rate)
    with progress_bar(shown=progress, total=length, desc=f"{rate:g}", bar_format=BAR, leave=False) as bar:
        try:
            for _ in steps_of_trial(learner, done, job.data, settings, length):
                bar.update()
                stop()
        except DataError:
            return math.inf
    loss = float(residuals_of_all(learner.measure, job.data.chosen_by)["loss"].mean())
    return loss if math.isfinite(loss) else math.inf


def learner_of_trial(job: Training, settings: LoopConfig) -> Learner:
    return make_learner(job._replace(model=copy.deepcopy(job.model)), settings)


def steps_of_trial(
    learner: Learner, done: Progress, data: TrainingData, settings: LoopConfig, most: int
) -> Iterator[int]:
    """Make so many steps; yields after each how many pairs of neighbours it had."""
    while True:
        train = data.learned_in(done.epoch, settings.seed)
        batches, pairs = make_batches(train, settings, epoch=done.epoch), edges_of(train)
        while done.batch < len(batches):
            next_step(learner, train, batches, settings, done, lambda *_: None)
            yield sum(pairs[n] for n in batches[done.batch - 1])
            if done.step == most:
                return
        done.history = done.history or [{"train_loss": done.loss / len(batches)}]
        end_epoch(done)
