"""Errors of potentials trained with the defaults, per set, preset, time of training and seed, beside published ones.

python benchmarks/accuracy.py DATA --sets acac --minutes 2 20 --seeds 3             # DATA has the folders of SETS
python benchmarks/accuracy.py DATA --sets acac mlearn-Si --presets fast segnn --minutes 20 --out accuracy
python benchmarks/accuracy.py DATA --minutes 20 --peers mace=/path/to/mace/bin/python nequip=/path/to/nequip/bin/python
python benchmarks/accuracy.py DATA --presets segnn segnn,interactions=3 segnn,weight_decay=0.01 --epochs 60   # a study

Every run is `segnn train` with a time and what is given behind the preset, in a folder of its own below OUT, where it
goes on when it was stopped; a run that is there is not repeated. Peers (`train_peer.py`) get the same time and the same
frames to train on and to validate with. Energies in meV a molecule or, of crystals and liquids, meV an atom, forces in
meV/Å; RMSE or MAE as the published ones; ms: CPU time of a step of MD with the first test structure. The time is wall
time: one training on an idle core.
"""

import argparse
import json
import os
import subprocess
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
import torch
from ase import Atoms
from report import machine, plot_lines, print_table, save

from segnn_ase import SEGNNCalculator
from segnn_ase.data.frames import Frame
from segnn_ase.model.settings import ModelConfig
from segnn_ase.train.prepare import read_sets
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import train


class Task(NamedTuple):
    train: str
    tests: dict[str, str]  # by the end of the names of columns
    valid_fraction: float
    error: str  # rmse or mae
    molecule: int = 0  # atoms that energies are told of; 0: of one
    isolated: str | None = None
    valid: str | None = None  # instead of a fraction
    published: tuple[tuple, ...] = ()  # name, then energy and forces of each test


RMD17_ATOMS = {"ethanol": 9, "aspirin": 21, "toluene": 15}
RMD17 = {
    "ethanol": (("MACE", 0.4, 2.1), ("NequIP", 0.4, 2.8), ("Allegro", 0.4, 2.1), ("PONITA", 0.4, 2.5)),
    "aspirin": (("MACE", 2.2, 6.6), ("NequIP", 2.3, 8.2), ("Allegro", 2.3, 7.3), ("PONITA", 1.7, 5.8)),
    "toluene": (("MACE", 0.5, 1.5), ("NequIP", 0.3, 1.6), ("Allegro", 0.4, 1.8), ("PONITA", 0.3, 1.3)),
}
RMD17_50 = {
    "ethanol": (("MACE", 6.7, 32.6), ("NequIP", 8.7, 40.2), ("ACE", 8.6, 43.0)),
    "aspirin": (("MACE", 17.0, 43.9), ("NequIP", 19.5, 52.0), ("ACE", 26.2, 63.8)),
    "toluene": (("MACE", 3.1, 12.1), ("NequIP", 3.3, 15.1), ("ACE", 5.3, 27.1)),
}
MLEARN = {
    "Si": (("SNAP", 6.44, 133.0), ("qSNAP", 3.81, 116.0), ("ALIGNN-FF", None, 69.0), ("NequIP", None, 90.0)),
    "Mo": (("SNAP", 5.48, 207.0), ("qSNAP", 2.77, 184.0)),
    "Li": (("SNAP", 1.03, 27.7), ("qSNAP", 0.73, 32.8)),
}


def rmd17(name: str) -> dict[str, Task]:
    """The field's 950 frames and, 50 for validation, and 50 frames, the same ones for validation."""
    frames, test = f"rmd17/{name}_train.xyz", {"": f"rmd17/{name}_test.xyz"}
    many = Task(frames, test, 0.05, "mae", RMD17_ATOMS[name], published=RMD17[name])
    few = many._replace(train=f"{frames}@:50", valid=f"{frames}@950:", published=RMD17_50[name])
    return {f"rmd17-{name}": many, f"rmd17-{name}-50": few}


def mlearn(name: str) -> dict[str, Task]:
    folder = f"mlearn_{name}"
    return {
        f"mlearn-{name}": Task(f"{folder}/train.xyz", {"": f"{folder}/test.xyz"}, 0.1, "mae", published=MLEARN[name])
    }


ACAC = (
    ("MACE", 0.9, 5.1, 4.6, 22.4),
    ("NequIP", 0.81, 5.90, 6.04, 27.8),
    ("MACE, rerun by others", 0.8, 5.9, 8.2, 26.7),
)
SETS = {
    "acac": Task(
        "acac/train_300K.xyz",
        {"_300K": "acac/test_300K.xyz", "_600K": "acac/test_600K.xyz"},
        0.1,
        "rmse",
        15,
        "acac/isolated_atoms.xyz",
        published=ACAC,
    ),
    **{key: task for name in RMD17 for key, task in rmd17(name).items()},
    **{key: task for name in MLEARN for key, task in mlearn(name).items()},
    "water": Task("water_pbe0/train.xyz", {"": "water_pbe0/test.xyz"}, 0.1, "rmse"),
    "ecemc": Task("ecemc/train.xyz", {"": "ecemc/test.xyz"}, 0.1, "rmse", isolated="ecemc/isolated_atoms.xyz"),
    "batio3": Task("responses/batio3_train.xyz", {"": "responses/batio3_test.xyz"}, 0.1, "rmse"),
}


class Choice(NamedTuple):
    """What is trained: a preset, with other settings behind it, or a peer, as "mace=PYTHON"; and for how long."""

    potential: str
    peer: bool
    unit: str  # minutes or epochs
    length: float
    seed: int

    @property
    def label(self) -> str:
        return self.potential.partition("=")[0] if self.peer else self.potential

    def settings(self) -> tuple[dict, dict]:
        """Of [model] and [training]."""
        preset, *others = self.potential.split(",")
        model, training = {"preset": preset}, {"seed": self.seed, "device": "cpu", self.unit: self.length}
        for key, _, value in (other.partition("=") for other in others):
            (model if key in ModelConfig.model_fields else training)[key] = value_of(value)
        return model, training


def value_of(text: str) -> object:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def configured(task: Task, data: Path, choice: Choice, out: Path) -> TrainConfig:
    files = {"train": task.train, "test": list(task.tests.values()), "isolated_atoms": task.isolated}
    if task.valid:
        files["valid"] = task.valid
    files = {key: at(data, value) for key, value in files.items() if value}
    model, training = choice.settings()
    return TrainConfig.parse(
        {
            "out": str(out / "model.pt"),
            "data": {**files, "valid_fraction": task.valid_fraction},
            "model": model,
            "training": training,
        }
    )


def at(data: Path, paths: str | list[str]) -> str | list[str]:
    return str(data / paths) if isinstance(paths, str) else [str(data / path) for path in paths]


def trained(task: Task, data: Path, folder: Path, choice: Choice) -> dict:
    """Errors on the tests, CPU seconds of the training and ms of a step; from the folder if they are there."""
    done = folder / "errors.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        errors = train(configured(task, data, choice, folder))
        found = {"errors": errors, "cpu_s": time.process_time() - began, "ms": ms_of_step(folder, task, data)}
        done.write_text(json.dumps({"machine": machine(), **found}))
    return json.loads(done.read_text())


def ms_of_step(folder: Path, task: Task, data: Path, steps: int = 50) -> float:
    """CPU time of energy and forces at changing positions: the least of ten."""
    atoms = ase.io.read(at(data, next(iter(task.tests.values()))), 0)
    atoms.calc = SEGNNCalculator(folder / "model.pt", device="cpu", domain="ignore", allow_nonsmooth=True)
    start, rng, best = atoms.positions.copy(), np.random.default_rng(0), np.inf
    for _ in range(11):
        began = time.process_time()
        for _ in range(steps):
            atoms.positions = start + rng.normal(scale=0.01, size=start.shape)
            atoms.get_forces()
        best = min(best, (time.process_time() - began) / steps)
    return 1e3 * best


def trained_by_peer(task: Task, data: Path, folder: Path, choice: Choice) -> dict:
    """The same with a peer's training on the frames that ours would take."""
    done = folder / "errors.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = configured(task, data, choice._replace(potential="segnn"), folder)
        train, valid, tests, isolated = read_sets(config.data, choice.seed, 5.0)
        sets = {"train": train, "valid": valid, **{f"test{n}": test for n, test in enumerate(tests.values())}}
        for name, frames in sets.items():
            ase.io.write(folder / f"{name}.xyz", [with_plain_labels(frame) for frame in frames], format="extxyz")
        E0 = isolated and {frame.atoms.get_chemical_symbols()[0]: frame.energy for frame in isolated}
        given = {"minutes": choice.length, "seed": choice.seed, "isolated": E0}
        (folder / "task.json").write_text(json.dumps(given))
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        kind, _, python = choice.potential.partition("=")
        subprocess.run([python, str(Path(__file__).with_name("train_peer.py")), kind, str(folder)], env=environment)
    found = json.loads(done.read_text())
    return {"errors": {str(data / path): row for path, row in zip(task.tests.values(), found["errors"], strict=True)}}


def with_plain_labels(frame: Frame) -> Atoms:
    """Under names that no program changes."""
    atoms = Atoms(frame.atoms.numbers, frame.atoms.positions, cell=frame.atoms.cell, pbc=frame.atoms.pbc)
    atoms.info["REF_energy"] = frame.energy
    atoms.arrays["REF_forces"] = np.array(frame.forces)
    return atoms


def columns_of(task: Task, errors: dict, data: Path) -> dict:
    row = {}
    for end, path in task.tests.items():
        found = errors[str(data / path)]
        row[f"E{end}"] = 1e3 * (task.molecule or 1) * found[f"energy_{task.error}"]
        row[f"F{end}"] = 1e3 * found[f"forces_{task.error}"]
    return row


def published(task: Task) -> list[dict]:
    names = [f"{kind}{end}" for end in task.tests for kind in "EF"]
    return [{"potential": name, **dict(zip(names, values, strict=True))} for name, *values in task.published]


def measured(name: str, task: Task, a: argparse.Namespace) -> list[dict]:
    """A row for each potential and length: mean and spread over the seeds."""
    rows = []
    lengths = [("epochs", n) for n in a.epochs] or [("minutes", minutes) for minutes in a.minutes]
    for potential, peer in [*((p, False) for p in a.presets), *((p, True) for p in a.peers)]:
        for unit, length in lengths:
            runs = []
            for seed in range(a.seeds):
                choice = Choice(potential, peer, unit, length, seed)
                folder = Path(a.out) / name / f"{choice.label}-{length:g}{unit[:3]}-{seed}"
                found = (trained_by_peer if peer else trained)(task, a.data, folder, choice)
                costs = {key: found[key] for key in ("cpu_s", "ms") if key in found}
                runs.append({**costs, **columns_of(task, found["errors"], a.data)})
            means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            spread = {f"±{key}": float(np.ptp([run[key] for run in runs]) / 2) for key in runs[0]}
            rows.append({"potential": choice.label, unit: length, "seeds": len(runs), **means, **spread})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["acac"], choices=SETS)
    parser.add_argument("--presets", nargs="*", default=["segnn"], metavar="PRESET[,SETTING=VALUE]")
    parser.add_argument("--minutes", nargs="+", type=float, default=[20.0])
    parser.add_argument("--epochs", nargs="+", type=int, default=[], help="instead of minutes; not for peers")
    parser.add_argument("--peers", nargs="*", default=[], metavar="mace=PYTHON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="accuracy")
    a = parser.parse_args()
    if a.epochs and a.peers:
        parser.error("--epochs counts passes of our training: give peers --minutes")
    torch.set_num_threads(a.threads)
    everything = []
    for name in a.sets:
        task = SETS[name]
        mine = measured(name, task, a)
        rows = [*mine, *published(task)]
        names = [f"{kind}{end}" for end in task.tests for kind in "EF"]
        unit = "epochs" if a.epochs else "minutes"
        columns = {"potential": "", unit: "g", "seeds": "d", "cpu_s": ".0f", "ms": ".2f"}
        for key in names:
            columns |= {key: ".2f", f"±{key}": ".2f"}
        print(f"\n{name}: {task.error.upper()}, E meV{'' if task.molecule else '/atom'}, F meV/Å")
        print_table(rows, columns)
        everything += [{"set": name, **row} for row in rows]
        plot_lines(f"{a.out}-{name}", mine, group="potential", x=unit, y=names[1], labels=(unit, "forces [meV/Å]"))
        costs = ("ms a step", "forces [meV/Å]")
        with_cost = [row for row in mine if "ms" in row]
        plot_lines(f"{a.out}-{name}-cost", with_cost, group="potential", x="ms", y=names[1], labels=costs)
    save(a.out, everything, {k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
