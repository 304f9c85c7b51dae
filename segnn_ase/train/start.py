"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

import math
import time

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.train.committee import train_committee
from segnn_ase.train.loop import run_training
from segnn_ase.train.prepare import prepare
from segnn_ase.train.report import printer
from segnn_ase.train.settings import FINETUNE_DEFAULTS, OptimConfig, TrainConfig


def train(config: TrainConfig, *, progress: bool = True) -> dict:
    """Train a potential from scratch and write it to config.out. Returns the errors on every set.

    Beside out = model.pt are written model.last.pt, model.csv, model.resume.pt and plots; a committee's members are
    model.1.pt, model.2.pt and so on. Raises DataError, ConfigError and FileNotFoundError for what cannot be trained
    on, OutOfTime when `max_minutes` are over.
    """
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    deadline = deadline_of(config.training)
    if config.training.committee > 1:
        return train_committee(config, deadline, progress=progress)
    return run_training(config, prepare(config, report=printer(progress)), deadline, progress=progress)


def deadline_of(settings: OptimConfig) -> float:
    return math.inf if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes


def finetune(model: str, config: TrainConfig, *, progress: bool = True) -> dict:
    """Go on from a trained model on new frames: E0 are shifted to the new level of theory, the rest is `train`."""
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    if config.training.committee > 1:
        raise ConfigError(
            f"setting 'training.committee' is {config.training.committee}: fine-tune the members one by one"
        )
    if config.model:
        raise ConfigError(f"setting 'model' is {config.model}: fine-tuning keeps the architecture of {model}")
    given = config.training.model_dump(exclude_unset=True)
    config = config.model_copy(update={"training": OptimConfig(**{**FINETUNE_DEFAULTS, **given})})
    start = load_with_metadata(model)
    deadline = deadline_of(config.training)
    return run_training(config, prepare(config, start=start, report=printer(progress)), deadline, progress=progress)
