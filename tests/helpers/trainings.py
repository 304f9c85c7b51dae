"""Tiny trainings in a folder, and what they leave there."""

import csv
from pathlib import Path

import ase.io
import pytest
from ase import Atoms
from torch import Tensor

from segnn_ase.base import figures
from segnn_ase.data.batches import Item, asked_for
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train import loop
from segnn_ase.train.loss import loss_of
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.train.start import train

TINY = {"hidden_irreps": "4x0e+4x1o", "lmax_attr": 1, "cutoff": 3.0, "n_radial": 4, "radial_hidden": [8]}
SETTINGS = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup_steps": 5,
    "ema_decay": 0.9,
    "energy_weight": 1.0,
    "stress_weight": 1.0,
    "device": "cpu",
    "rollout_steps": 0,
}


def configured(folder: Path, frames: list[Atoms] | None = None, *, data=None, model=None, **settings) -> TrainConfig:
    """Settings of a tiny training whose files are in the folder; frames are written to train.traj."""
    if frames is not None:
        ase.io.write(folder / "train.traj", frames)
    values = {
        "out": str(folder / "model.pt"),
        "data": {"train": str(folder / "train.traj"), "valid_fraction": 0.25, **(data or {})},
        "model": TINY if model is None else model,
        "training": {**SETTINGS, **settings},
    }
    return TrainConfig.parse(values)


def history(out: str | Path) -> list[dict]:
    with Path(out).with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def loss_on(batch: Item, potential: Potential, settings: OptimConfig | None = None) -> Tensor:
    """The loss of a potential as PyTorch has it."""
    prediction = predict(potential, batch.graph, **asked_for(batch.labels))
    return loss_of(prediction, batch.graph, batch.labels, settings or OptimConfig())


def weights(path: str | Path) -> dict:
    return load_tensors(path)["weights"]


def leave_out_plots(patch: pytest.MonkeyPatch) -> None:
    """They take as long as a tiny training."""
    for name in ("plot_parity", "plot_calibration", "plot_learning_curve"):
        patch.setattr(figures, name, lambda *_, **__: None)


def counted_training(folder: Path, count=lambda: None, *, epochs: int) -> None:
    """A training without plots, with a rollout after every fifth of it; `count` is called before each step."""

    def counted(*arguments, step=loop.next_step):
        count()
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "next_step", counted)
        leave_out_plots(patch)
        settings = {"epochs": epochs, "batch_size": 2, "save_minutes": 0.0005, "rollout_steps": 4}
        settings["rollout_every"] = max(epochs // 5, 1)
        train(configured(folder, **settings), progress=False)
