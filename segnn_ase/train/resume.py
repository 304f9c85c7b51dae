"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from segnn_ase.base.errors import ConfigError, ModelFileError, SEGNNError
from segnn_ase.data.batches import Item
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors
from segnn_ase.train.job import Training
from segnn_ase.train.settings import TrainConfig

STATE_FORMAT = "segnn_ase training state"


@dataclass
class Progress:
    """Where a training stands; with the seed it determines everything that follows."""

    epoch: int = 0
    batch: int = 0  # within the epoch
    step: int = 0
    loss: float = 0.0  # summed over the epoch's batches
    rate: float = 0.0  # learning rate of the last step
    best: float = math.inf  # validation loss of the model that is kept
    survived: float = 0.0  # and of its rollouts
    history: list[dict] = field(default_factory=list)


def fingerprint(config: TrainConfig, sets: list[list[Item]], origin: dict | None) -> dict:
    """What must be the same for a training to go on: settings, data and the model that it started from."""
    data = [[list(item.graph) + list(item.labels) for item in items] for items in sets]
    return {"settings": decisive_settings(config), "data": checksum(data), "start": checksum(origin)}


def decisive_settings(config: TrainConfig) -> dict:
    """The settings without those that change no bit of the outcome."""
    settings = config.model_dump(mode="json")
    for section, name in (("training", "save_minutes"), ("training", "max_minutes"), ("data", "refuse_flaws")):
        settings[section].pop(name)
    return settings


def save_state(path: Path, job: Training, potential, averaged, optimizer, done: Progress) -> None:
    state = {
        "format": STATE_FORMAT,
        "fingerprint": job.fingerprint,
        "weights": potential.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(done),
    }
    save_tensors(path, state)


def load_state(path: Path, job: Training, potential, averaged, optimizer) -> Progress:
    """Restore a training. Raises ConfigError when the file belongs to other settings or data."""
    state = load_tensors(path, "resume file")
    if state.get("format") != STATE_FORMAT:
        raise ModelFileError(f"{path} is a {state.get('format')!r}, not a {STATE_FORMAT!r}")
    try:
        return restore_state(path, state, job, potential, averaged, optimizer)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SEGNNError):
            raise
        raise ModelFileError(
            f"{path} is damaged or was written by another version: {' '.join(str(error).split())}. "
            "Delete it to start again."
        ) from error


def restore_state(path: Path, state: dict, job: Training, potential, averaged, optimizer) -> Progress:
    here, there = job.fingerprint, state.get("fingerprint")
    if there != here:
        same = there["settings"] == here["settings"]
        what = "other data or another model to start from" if same else ", ".join(_differing(there, here))
        raise ConfigError(
            f"{path} belongs to a training with {what}: choose another out, or delete that file to start again"
        )
    done = Progress(**state["progress"])
    if min(done.epoch, done.batch, done.step) < 0 or done.step > 0 == len(state["optimizer"]["state"]):
        raise ValueError(f"progress is {done}")
    potential.load_state_dict(state["weights"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in optimizer.state.items():
        if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimizer's moments have other shapes than the weights")
    return done


def _differing(there: dict, here: dict) -> list[str]:
    old, new = there["settings"], here["settings"]
    flat = [(f"{s}.{k}", old[s].get(k), v) for s in ("data", "model", "training") for k, v in new[s].items()]
    return [f"{name} = {before!r} (now {now!r})" for name, before, now in flat if before != now] or ["other settings"]
