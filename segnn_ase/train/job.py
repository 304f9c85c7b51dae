"""What a training works on, what it is for, what it changes, and the files that it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from segnn_ase.base.errors import ConfigError
from segnn_ase.data.batches import Item, cheapest
from segnn_ase.data.frames import Frame
from segnn_ase.data.references import ReferenceEnergies
from segnn_ase.model.potential import Potential
from segnn_ase.store.shipped import find_model
from segnn_ase.structure.stored import evenly
from segnn_ase.train.beside import Beside
from segnn_ase.train.optimizers import Soap
from segnn_ase.train.pull import Pull

OF_RUN = ("epoch", "epochs", "learning_rate")  # what the settings leave open

# the loss of a batch; leaves its gradient in the weights. Of a part of a batch those that add up to the whole's, where
# how many numbers of each kind of labels (`known_values`) that has is given
Gradient = Callable[[Item, tuple[int, ...] | None], float]


class Measure(NamedTuple):
    """Of a model, by the weights that it has at each call."""

    residuals: Callable[[list[Item]], dict[str, np.ndarray]]  # "loss" of each, and what `Goal.errors` is made of
    loss: Callable[[Item], float]  # of a batch, as `Gradient` has that of the whole


class Goal(NamedTuple):
    """What is to be learned: how it is made better, measured and kept. The loop knows nothing else of it.

    Both functions that are made for a model and the cheapest structure use the weights that it has at each call.
    """

    gradient: Callable[[Any, Item, Any], Gradient]  # for a model, a structure and the settings of the loop
    measure: Callable[[Any, Item, Any], Measure]  # likewise
    errors: Callable[[dict[str, np.ndarray]], dict]  # columns of the log, from what is measured on the validation set
    summary: Callable[[dict], str]  # of a row of the log, for the progress bar
    log: Callable[..., dict]  # further columns: (model, data, settings, history, epoch, epochs); "survived" is one
    save: Callable[..., None]  # (path, model, metadata=)
    finish: Callable[..., dict]  # (config, training, history, progress=): measures the kept model; its errors


def nothing_more(*_, **__) -> dict:
    """The log of a goal that has nothing to add."""
    return {}


class TrainingData(NamedTuple):
    """Labelled structures: read, checked and turned into graphs once, for all members of a committee."""

    train: list[Item]
    valid: list[Item]
    test: dict[str, list[Item]]  # by path
    checksum: str  # of the structures for training and validation
    frames: list[Frame]  # as they were read, of `train`
    closest: dict[tuple[int, int], float]  # Å, see `smallest_distances`
    isolated: list[Frame] | None = None  # read for their energies only
    references: ReferenceEnergies | None = None  # None where those of a trained potential are shifted
    scale: float | None = None  # eV, of what the network adds to them; likewise
    beside: tuple[Beside, ...] = ()  # what a potential that is fine-tuned knew, or what a teacher says

    def learned_in(self, epoch: int, seed: int) -> list[Item]:
        """The structures of the loss: those to train on, and some of those beside, others in each epoch."""
        found = list(self.train)
        for k, some in enumerate(self.beside):
            chosen = np.random.default_rng([seed, epoch, k]).permutation(len(some.replayed))[: some.each_epoch]
            found += [some.replayed[n] for n in chosen.tolist()]
        return found

    @property
    def held_out(self) -> list[Item]:
        """The structures for validation, where there are any."""
        return self.valid or self.train

    @property
    def chosen_by(self) -> list[Item]:
        """The structures whose loss chooses the model: as many old ones, where these are learned."""
        new = self.held_out
        return [
            *new,
            *(item for some in self.beside if some.replayed and some.chooses for item in evenly(some.held, len(new))),
        ]

    @property
    def smallest(self) -> Item:
        """The cheapest structure with pairs, on which compiled code is tried."""
        return cheapest(self.train)


class Training(NamedTuple):
    """One model to be trained, and where it comes from."""

    model: Any  # an `nn.Module` with a device
    data: TrainingData
    goal: Goal
    metadata: dict
    fingerprint: dict  # of settings, data and starting point
    lone_atoms: bool = False  # whether E0 are energies of lone atoms
    before: Potential | None = None  # that is fine-tuned
    began: Potential | None = None  # the same with the elements, cores and E0 with which the training begins
    pull: float = 0.0  # strength of the penalty on the distance from the weights of that


class Learner(NamedTuple):
    """What changes with every step."""

    model: Any
    averaged: nn.Module  # the moving average of its weights, which is what is kept
    weights: list[Tensor]  # those that are trained
    means: list[Tensor]  # the same in `averaged`
    trusted: list[Tensor]  # `means` without the last step, which may have led to a spike
    optimizer: Soap
    gradient: Gradient
    measure: Measure  # of `averaged`
    pull: Pull | None = None  # towards the starting weights


def output_files(out: str) -> dict[str, Path]:
    """Every file that a training writes, by what it is."""
    path = Path(out)
    if path.suffix != ".pt":
        raise ConfigError(f"out is {out!r}; expected a name that ends in .pt")
    endings = {"last": "last.pt", "resume": "resume.pt", "csv": "csv", "curve": "learning_curve.png"}
    return {kind: path.with_suffix(f".{end}") for kind, end in (endings | {"tensorboard": "tensorboard"}).items()}


def refuse_overwriting(out: str) -> None:
    """Raise ConfigError for a model that is there without the resume file of its training."""
    if Path(out).exists() and not output_files(out)["resume"].exists():
        raise ConfigError(f"out is {out!r}, which exists and is no training to go on with: rename or remove it")


def refuse_overwriting_input(told: str, model: str, out: str, members: int) -> None:
    """Raise ConfigError where the training of so many members would write the model that it reads."""
    outs = [out, *(str(Path(out).with_suffix(f".{k}.pt")) for k in range(1, members + 1) if members > 1)]
    written = {path.resolve() for one in outs for path in (Path(one), output_files(one)["last"])}
    if find_model(model).resolve() in written:
        raise ConfigError(
            f"{told} is {model!r}, which this training would overwrite; expected another out than {out!r}"
        )
