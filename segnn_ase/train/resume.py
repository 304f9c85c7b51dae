"""A training that was stopped goes on from its resume file, if it is still the same training.

Everything random is a function of the seed and the epoch, so that it ends with the same bits (on one CPU thread) as if
nothing had stopped it. It is the same training if what decides about the weights that are kept is the same: the frames
for training and validation, the model or the potential that it starts from, and the settings of the loop but those in
`INDIFFERENT` and, as long as rollouts only fill columns of the log, `ONLY_LOGGED`. Where the frames lie, what labels
are called and which test sets are measured in the end may change.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from segnn_ase.base import processes
from segnn_ase.base.errors import ConfigError, ModelFileError, SEGNNError
from segnn_ase.data.batches import Item
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import settings_of
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors
from segnn_ase.train.job import Learner, Training, TrainingData
from segnn_ase.train.settings import Looped, TrainConfig

STATE_FORMAT = "segnn_ase training state"
OF_CUES = ("cue_gradients", "dipole", "polarizability", "born")  # labels that came later
OF_FIELDS = ("dipole_weight", "polarizability_weight", "born_weight")  # decide nothing without a field
# settings that are left out where they are so: their defaults in the version in which they came
LATER = {"response_weight": 1.0, "dipole_weight": 1.0, "polarizability_weight": 1.0, "born_weight": 10.0}
INDIFFERENT = {  # settings of the loop that may change, and why
    "save_minutes": "when files are written",
    "max_minutes": "when it stops, to go on the same way",
    "tensorboard": "another log of the same numbers",
    "teachers": "how many trainings come first: their number is looked up, and what they teach is among the structures",
    "committee": "how many trainings, each with a resume file of its own",
    "device": "where it runs: the last digits, as on another computer or with another number of threads",
    "accelerate": "how it is evaluated: the last digits",
}
ONLY_LOGGED = {  # and these unless `select` is "stability"
    "rollout_steps": "how long rollouts are",
    "rollout_every": "when they are made",
    "rollout_temperature": "how hot they are",
}
OF_FRAMES = (
    *("train", "valid", "valid_fraction", "teacher", "taught", "target"),
    *("energy_key", "forces_key", "stress_key", "virial_key", "forces_mask_key", "dispersion"),
)
OF_START = ("isolated_atoms", "reference_energies", "irreps", "pooling")


@dataclass
class Progress:
    """Where a training stands; with the seed it determines everything that follows."""

    epoch: int = 0
    batch: int = 0  # within the epoch
    step: int = 0
    loss: float = 0.0  # summed over the epoch's batches
    rate: float = 0.0  # learning rate of the last step
    planned: int | None = None  # epochs that are given or that the time allows, trials among them
    trials: list[tuple[float, float]] = field(default_factory=list)  # learning rate and validation loss of each
    epochs: float | None = None  # in all; None before that and the learning rate are known
    learning_rate: float | None = None  # the largest, after the warm-up
    turned: int = 0  # epoch from which the rate falls linearly to zero, earlier than planned where it is not 0
    share: float = 1.0  # what was left of the rate then
    highest: float = math.inf  # loss of a batch in the epoch before
    rising: float = 0.0  # and in this one
    calm: float = 1.0  # what spikes have left of the learning rate
    spikes: int = 0
    losses: list[float] = field(default_factory=list)  # of validation structures, lowest of the models that were kept
    survived: float | None = None  # and of its rollouts, once there were any
    history: list[dict] = field(default_factory=list)


def fingerprint(config: TrainConfig, data: TrainingData, before: Potential | None) -> dict:
    """What must be the same for a training to go on; no number in it depends on how sums are rounded."""
    if before is None:
        isolated = [[*frame.atoms.numbers.tolist(), frame.energy] for frame in data.isolated or ()]
        start = [settings_of(model_config(**config.model)), config.data.reference_energies, isolated]
    else:
        constants = [settings_of(before.config), before.species, before.reference_energies, before.scales]
        start = [*constants, dict(before.state_dict())]
    settings = decisive_settings(config, fields=any(item.graph.field is not None for item in data.train[:1]))
    return {"settings": settings, "data": data.checksum, "start": checksum(start)}


def decisive_settings(config: Looped, *, fields: bool = False) -> dict:
    """The settings of the loop that decide about the weights that are kept; fields: of a potential that knows one."""
    settings = config.training.model_dump(mode="json")
    others = {*INDIFFERENT, *(() if config.training.by_stability else ONLY_LOGGED), *(() if fields else OF_FIELDS)}
    settings = {name: value for name, value in settings.items() if LATER.get(name, ...) != value}
    return {name: value for name, value in settings.items() if name not in others}


def checksum_of_items(sets: list[list[Item]]) -> str:
    """Of structures and labels as they were read."""
    return checksum([[_of_item(item) for item in items] for items in sets])


def _of_item(item: Item) -> list:
    """What is known of a structure; what there is only with cues is left out without them."""
    told = [x for x in (getattr(item.graph, "cues", None), getattr(item.graph, "field", None)) if x is not None]
    pairs = zip(getattr(item.labels, "_fields", [""] * len(item.labels)), item.labels, strict=True)
    labels = [x for name, x in pairs if name not in OF_CUES or (x.numel() and bool(x.isfinite().any()))]
    return [*map(torch.tensor, arrays_of(item.atoms)), *labels, *told]


def arrays_of(atoms: Atoms) -> tuple[np.ndarray, ...]:
    return atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc


def save_state(path: Path, job: Training, learner: Learner, done: Progress) -> None:
    """Of the first of several processes, which are all alike."""
    if not processes.is_first():
        return
    state = {
        "format": STATE_FORMAT,
        "fingerprint": job.fingerprint,
        "config": job.metadata["training"],
        "weights": learner.model.state_dict(),
        "averaged": learner.averaged.state_dict(),
        "trusted": learner.trusted,
        "optimizer": learner.optimizer.state_dict(),
        "progress": asdict(done),
    }
    save_tensors(path, state)


def load_state(path: Path, job: Training, learner: Learner) -> Progress:
    """Restore a training. Raises ConfigError when the file belongs to another one, ModelFileError when it is bad."""
    state = processes.on_first(lambda: load_tensors(path, "resume file"))
    if state.get("format") != STATE_FORMAT:
        raise ModelFileError(f"{path} is a {state.get('format')!r}, not a {STATE_FORMAT!r}")
    try:
        refuse_another_training(path, state, job)
        return restore_state(state, learner)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SEGNNError):
            raise
        raise ModelFileError(
            f"{path} is damaged or was written by another version: {' '.join(str(error).split())}. "
            f"Delete it and {job.metadata['training']['out']} to start again."
        ) from error


def restore_state(state: dict, learner: Learner) -> Progress:
    done = Progress(**state["progress"])
    if min(done.epoch, done.batch, done.step) < 0:
        raise ValueError(f"progress is {done}")
    learner.model.load_state_dict(state["weights"])
    learner.averaged.load_state_dict(state["averaged"])
    torch._foreach_copy_(learner.trusted, state.get("trusted", [mean.detach() for mean in learner.means]))
    learner.optimizer.load_state_dict(state["optimizer"])
    return done


def refuse_another_training(path: Path, state: dict, job: Training) -> None:
    """Raise ConfigError that names what is different."""
    if state["fingerprint"] != job.fingerprint:
        raise ConfigError(
            f"{path} belongs to a training with {what_differs(state, job)}: choose another out, or delete that file "
            f"and {job.metadata['training']['out']} to start again"
        )


def what_differs(state: dict, job: Training) -> str:
    """The settings that were changed, each under the part of the fingerprint that it changes; else that part."""
    there, here, old, new = state["fingerprint"], job.fingerprint, state["config"], job.metadata["training"]
    found = changed("training", {**there["settings"], **here["settings"]}, old, new)
    if there["data"] != here["data"]:
        found += changed("data", OF_FRAMES, old, new)
    if there["start"] != here["start"]:
        found += changed("model", {**old["model"], **new["model"]}, old, new) + changed("data", OF_START, old, new)
    if there.get("finetune") != here.get("finetune"):
        found += changed("finetune", here.get("finetune", ()), old, new)
    if found:
        return ", ".join(found)
    if there["data"] != here["data"]:
        return "other data"
    return "another model to start from" if job.before else "other isolated atoms, or a model to start from"


def changed(section: str, names: Iterable[str], old: dict, new: dict) -> list[str]:
    pairs = [(name, old[section].get(name), new[section].get(name)) for name in names]
    return [f"{section}.{name} = {before!r} (now {now!r})" for name, before, now in pairs if before != now]
