"""Which of the models that a training passes through is kept."""

import numpy as np

from segnn_ase.train.resume import Progress
from segnn_ase.train.settings import LoopConfig

SURE = 2.0  # standard errors by which a mean loss must be higher for a model to be worse
MUCH = 2.0  # times the lowest loss is too much, whatever the standard error is


def better(row: dict, losses: np.ndarray, done: Progress, settings: LoopConfig) -> bool:
    """Whether a model is to be kept instead of the one before: where it is no worse than the best so far.

    losses: of each structure for validation. Later models made smaller steps, and are better on frames that chose
    nothing; which of two has the lower loss on a few frames is chance, or decided by the oddest of them.
    """
    if settings.by_stability and row["survived"] != done.survived:
        if None not in (row["survived"], done.survived):
            return row["survived"] > done.survived
        return done.survived is None  # the first rollout; what had none is no rival of what had one
    return bool(np.isfinite(losses).all()) and (not done.losses or no_worse(losses, np.array(done.losses)))


def no_worse(losses: np.ndarray, lowest: np.ndarray) -> bool:
    """Whether losses of structures are as low as others of the same ones: in the mean, for all that so few can tell."""
    difference = losses - lowest
    error = np.sqrt(np.sum(difference**2)) / len(difference)  # of its mean, if that is zero
    return bool(difference.mean() <= SURE * error and losses.mean() <= MUCH * lowest.mean())


def keep(row: dict, losses: np.ndarray, done: Progress, settings: LoopConfig) -> None:
    """Note the lowest losses among models that are as stable."""
    survived = row.get("survived")
    alike = not settings.by_stability or survived == done.survived
    if not (alike and done.losses) or losses.mean() < np.mean(done.losses):
        done.losses = losses.tolist()
    done.survived = survived
