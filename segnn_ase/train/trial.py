"""What a training finds out by steps that are thrown away: how long it can be, and how large its steps are to be.

Which learning rate is best differs between data by more than a factor of three, and already short trainings tell.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import progress_bar
from segnn_ase.data.batches import Item, edges_of
from segnn_ase.train.job import Learner, Training, TrainingData
from segnn_ase.train.resume import Progress
from segnn_ase.train.schedule import end_epoch
from segnn_ase.train.settings import USUAL_MINUTES, OptimConfig
from segnn_ase.train.step import make_batches, make_learner, next_step, residuals_of_average

MEASURED_STEPS = 25  # that tell how long all others take
FIRST = 5  # one in so many of these, the first, fill caches and are left out
MOST_MEASURED = 0.03  # of the time, for these steps
EVALUATION = 0.35  # of the time of a training step on the same structures; forward and one gradient of three passes
MOST_EPOCHS = 2000  # more only learn the frames by heart
RATES = (0.03, 0.01, 0.003)  # learning rates, tried from the largest on
AS_GOOD = 1.1  # times the lowest loss; of rates that do so well the smallest is taken, as it overfits later
PART = 20  # a trial has this part of the epochs
LEAST, MOST = 200, 2000  # steps of a trial: fewer tell nothing, more are not needed
BAR = "{percentage:3.0f}%|{bar}| trial of learning rate {desc} [{elapsed}<{remaining}]"


def find_out(
    job: Training, settings: OptimConfig, report: Callable, *, stop: Callable[[], bool], progress: bool
) -> Progress:
    """The start of a training of known length and learning rate; stop: whether there is no time for trials."""
    epochs, made, rate = settings.epochs, 0, settings.learning_rate
    batches = len(make_batches(job.data.learned_in(0, settings.seed), settings, epoch=0))
    if epochs is None:
        minutes, seconds = settings.minutes or USUAL_MINUTES, seconds_of_step(job, settings)
        epochs = epochs_in(minutes, seconds, batches, job.data.train, job.data.chosen_by)
        report(f"{1e3 * seconds:.0f} ms a step, {batches} steps an epoch: {epochs} epochs for {minutes:g} minutes")
    if rate is None:
        length = min(epochs // PART, max(MOST // batches, 1))
        trials = try_rates(job, settings, length, stop, progress) if length * batches >= LEAST else {}
        rate, made = smallest_good(trials), length * len(trials)
        losses = ", ".join(f"{loss:.3g} with {tried:g}" for tried, loss in trials.items())
        if trials:
            report(f"learning rate {rate:g}: after {length} epochs the validation loss is {losses}")
    if settings.epochs is None:
        epochs = max(epochs - made, 1)
    return Progress(epochs=epochs, learning_rate=rate)


def epochs_in(minutes: float, seconds: float, n_batches: int, train: list[Item], valid: list[Item]) -> int:
    """The passes over `train`, with a validation after each, that a time allows; seconds: of a step."""
    validation = EVALUATION * sum(edges_of(valid)) / max(sum(edges_of(train)), 1)
    return int(min(max(60 * minutes / (seconds * n_batches * (1 + validation)), 1), MOST_EPOCHS))


def seconds_of_step(job: Training, settings: OptimConfig, clock: Callable[[], float] = time.monotonic) -> float:
    """Measured on so many steps, on fewer where they are slow."""
    most, spent = MOST_MEASURED * 60 * (settings.minutes or USUAL_MINUTES), []
    done = Progress(epochs=MEASURED_STEPS, learning_rate=RATES[-1])
    steps = steps_of_trial(learner_of_trial(job, settings), done, job.data, settings)
    began = clock()
    for _ in steps:
        spent.append(clock() - began)
        if len(spent) == MEASURED_STEPS or (len(spent) > 1 and sum(spent) > most):
            break
        began = clock()
    told = spent[max(len(spent) // FIRST, 1) :] or spent
    return sum(told) / len(told)


def try_rates(
    job: Training, settings: OptimConfig, epochs: int, stop: Callable[[], bool], progress: bool
) -> dict[float, float]:
    """Validation losses by learning rate, after short trainings in which it falls to zero."""
    losses = {}
    for rate in RATES:
        loss = loss_of_trial(job, settings, rate, epochs, stop, progress)
        if loss is None:
            break
        losses[rate] = loss
        if smallest_good(losses) > rate:
            break
    return losses


def smallest_good(losses: dict[float, float]) -> float:
    """The smallest learning rate whose loss is near the lowest."""
    lowest = min(losses.values(), default=math.inf)
    return min((rate for rate, loss in losses.items() if loss <= AS_GOOD * lowest), default=RATES[0])


def loss_of_trial(
    job: Training, settings: OptimConfig, rate: float, epochs: int, stop: Callable[[], bool], progress: bool
) -> float | None:
    """The validation loss after so many epochs, infinite where it explodes; None when it is stopped."""
    learner, done = learner_of_trial(job, settings), Progress(epochs=epochs, learning_rate=rate)
    with progress_bar(shown=progress, total=epochs, desc=f"{rate:g}", bar_format=BAR, leave=False) as bar:
        try:
            for _ in steps_of_trial(learner, done, job.data, settings):
                bar.update(done.epoch - bar.n)
                if stop():
                    return None
        except DataError:
            return math.inf
    loss = float(residuals_of_average(learner, job.data, settings)["loss"].mean())
    return loss if math.isfinite(loss) else math.inf


def learner_of_trial(job: Training, settings: OptimConfig) -> Learner:
    return make_learner(job._replace(potential=copy.deepcopy(job.potential)), settings)


def steps_of_trial(learner: Learner, done: Progress, data: TrainingData, settings: OptimConfig) -> Iterator[None]:
    """Train to the end; yields after each step."""
    while done.epoch < done.epochs:
        train = data.learned_in(done.epoch, settings.seed)
        batches = make_batches(train, settings, epoch=done.epoch)
        while done.batch < len(batches):
            yield next_step(learner, train, batches, settings, done, lambda *_: None)
        end_epoch(done)
