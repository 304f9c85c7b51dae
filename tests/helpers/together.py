"""Trainings of every kind by several processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from helpers.frames import emt_atoms, water_frames
from helpers.trainings import configured
from segnn_ase.dynamics import StepperTraining, simulate, train_stepper, write_motion
from segnn_ase.properties import PropertyTraining, train_properties
from segnn_ase.train import trial
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import finetune, train

TESTS = Path(__file__).parents[1]
FEW = {"epochs": 5, "batch_size": 3, "dtype": "float64", "rollout_steps": 3, "rollout_every": 3}


def run_together(folder: Path, count: int, *words: str) -> subprocess.CompletedProcess:
    """A command of Python, run by so many processes in a folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*torchrun, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def labelled_in_part() -> list[Atoms]:
    """Molecules and crystals, some without forces, energy, stress or neighbours, so that no two batches are alike."""
    frames = [*water_frames(8), *emt_atoms(5, lambda: bulk("Cu", cubic=True))]
    for n, left_out in {1: "forces", 4: "energy", 9: "stress"}.items():
        known = {name: value for name, value in frames[n].calc.results.items() if name != left_out}
        frames[n].calc = SinglePointCalculator(frames[n], **known)
    lone = Atoms("Cu")
    lone.calc = SinglePointCalculator(lone, energy=1.0, forces=np.zeros((1, 3)))
    return [*frames, lone]


def train_potential(folder: Path) -> None:
    train(configured(folder, **FEW), progress=False)


def train_some(folder: Path) -> None:
    """A potential, a model of two properties of which many frames have one, and a time-stepper."""
    train_potential(folder)
    data = {"train": str(folder / "properties.xyz"), "target": ["gap", "q"], "valid_fraction": 0.3}
    training = {"epochs": 3, "batch_size": 3, "learning_rate": 0.01, "dtype": "float64"}
    common = {"model": {"preset": "fast", "hidden_irreps": "4x0e+4x1o"}, "training": training}
    train_properties(PropertyTraining.parse({"out": str(folder / "p.pt"), "data": data, **common}), progress=False)
    motion = {"motion": str(folder / "motion.npz"), "train": 10, "valid": 4, "test": 2}
    values = {
        "out": str(folder / "s.pt"),
        "data": motion,
        "training": training,
        "model": {"hidden_irreps": "4x0e+4x1o"},
    }
    train_stepper(StepperTraining.parse(values), progress=False)


def train_all(folder: Path) -> None:
    """These, and a potential that is fine-tuned, a committee, one with teachers, a learning rate that is looked for."""
    train_some(folder)

    def named(name: str, **settings) -> TrainConfig:
        config = configured(folder, **{**FEW, "rollout_steps": 0, **settings})
        return config.model_copy(update={"out": str(folder / name)})

    tuned = named("t.pt", epochs=2).model_copy(update={"model": {}})
    finetune(str(folder / "model.pt"), tuned, progress=False)
    train(named("c.pt", epochs=2, committee=2), progress=False)
    train(named("taught.pt", epochs=2, teachers=2), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "LEAST", 2)
        train(named("rate.pt", epochs=5, learning_rate=None, warmup_steps=0, ema_decay=0.5), progress=False)


def write_data(folder: Path) -> None:
    ase.io.write(folder / "train.traj", labelled_in_part())
    frames = []
    for n in range(12):
        atoms = molecule("H2O" if n % 2 else "CH4")
        atoms.rattle(0.1, seed=n)
        if n % 3:
            atoms.info["gap"] = float(n)
        if n % 4:
            atoms.arrays["q"] = np.sin(atoms.numbers + n)
        frames.append(atoms)
    ase.io.write(folder / "properties.xyz", frames)
    write_motion(folder / "motion.npz", simulate("charged", 16, 0))


KINDS = {"potential": train_potential, "some": train_some, "all": train_all}

if __name__ == "__main__":
    torch.set_num_threads(1)
    KINDS[sys.argv[1]](Path(sys.argv[2]))
