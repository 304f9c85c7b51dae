"""What a training works on, what it changes, and the files that it writes."""

import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from segnn_ase.base.errors import ConfigError
from segnn_ase.data.batches import Item
from segnn_ase.data.frames import Frame
from segnn_ase.data.references import ReferenceEnergies
from segnn_ase.model.network import Operations
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import LossGradient
from segnn_ase.train.optimizers import Soap


class TrainingData(NamedTuple):
    """Labelled frames: read, checked and turned into graphs once, for all members of a committee."""

    frames: list[Frame]  # to train on
    train: list[Item]  # these as graphs
    valid: list[Item]
    test: dict[str, list[Item]]  # by path
    isolated: list[Frame] | None  # read for their energies only
    closest: dict[tuple[int, int], float]  # Å, see `smallest_distances`
    references: ReferenceEnergies | None  # None where those of a trained potential are shifted
    scale: float | None  # eV, of what the network adds to them; likewise
    checksum: str  # of the frames for training and validation

    @property
    def chosen_by(self) -> list[Item]:
        """The structures whose loss chooses the model: those for validation, where there are any."""
        return self.valid or self.train

    @property
    def smallest(self) -> Item:
        """The cheapest structure with pairs, on which compiled code is tried."""
        return min(self.train, key=lambda item: len(item.graph.edge_src) or math.inf)


class Training(NamedTuple):
    """One potential to be trained, and where it comes from."""

    potential: Potential
    data: TrainingData
    lone_atoms: bool  # whether E0 are energies of lone atoms
    before: Potential | None  # that is fine-tuned
    metadata: dict
    fingerprint: dict  # of settings, data and starting point


class Learner(NamedTuple):
    """What changes with every step."""

    potential: Potential
    averaged: Potential  # the moving average of its weights, which is what is kept
    weights: list[Tensor]  # those that are trained
    means: list[Tensor]  # the same in `averaged`
    optimizer: Soap
    loss_gradient: LossGradient
    operations: Operations | None  # of the layers, to evaluate `averaged`


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
