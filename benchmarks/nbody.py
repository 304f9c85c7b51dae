"""Learned time-steppers on the published systems of bodies: mean squared error of positions, per model and seed.

python benchmarks/nbody.py --system charged --models segnn egnn,epochs=150 tfn segnn-pairs,backwards=true
python benchmarks/nbody.py --system gravity --models segnn --epochs 10
python benchmarks/nbody.py --models segnn segnn,weight_decay=0.1 segnn,steps=4,backwards=true --seeds 1      # a study

All models learn from the same file of trajectories, which is computed once (7,000: 1 minute of charges, 20 of stars)
and whose sha256 is told: 3,000 to learn from, 2,000 to choose the model by and 2,000 to measure it. Published errors
stand beside ours. Every run has a folder of its own below OUT, where it goes on when it was stopped; a run that is
there is not repeated. together: error of the mean of all seeds' predictions, turned: how far the prediction turns with
the bodies, largest difference. The figure has the errors on the systems that choose the model over the training.
"""

import argparse
import csv
import hashlib
import json
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
from report import plot_lines, print_table, save

from segnn_ase.dynamics import StepperTraining, load_stepper, simulate, train_stepper, write_motion
from segnn_ase.dynamics.motion import Motion, read_motion
from segnn_ase.dynamics.settings import MotionConfig, StepperConfig
from segnn_ase.dynamics.stepper import bodies
from segnn_ase.structure.graph import collate

SIZES = {"train": 3000, "valid": 2000, "test": 2000}
SEED = 43
AT_ONCE = 100  # systems of the test
CLIP = 0.05  # of the gradient: that of a batch with two charges that meet is ten times that of others
NEAREST = {"charged": None, "gravity": 6}
PUBLISHED = {
    "charged": {
        "SE(3)-Transformer": 0.0244,
        "TFN": 0.0155,
        "message passing": 0.0107,
        "radial field": 0.0104,
        "EGNN": 0.0070,
        "SEGNN, geometry": 0.0056,
        "SEGNN": 0.0043,
        "CGENN": 0.0039,
    },
    "gravity": {"SEGNN": 0.265, "SEGNN (jax)": 0.264},
}


def motion_of(system: str, sizes: dict[str, int], work: Path) -> Path:
    path = work / f"{system}-{sum(sizes.values())}.npz"
    if not path.exists():
        write_motion(path, simulate(system, sum(sizes.values()), SEED))
    return path


def folder_of(a: argparse.Namespace, model: str, seed: int) -> Path:
    return Path(a.out) / a.system / f"{model}-{a.epochs}-{seed}"


def settings(a: argparse.Namespace, model: str, seed: int, motion: Path) -> StepperTraining:
    folder, (preset, *others) = folder_of(a, model, seed), model.split(",")
    given = tomllib.loads("\n".join(others))
    data, network = (
        {k: given.pop(k) for k in kind.model_fields.keys() & given} for kind in (MotionConfig, StepperConfig)
    )
    training = {
        "epochs": a.epochs,
        "patience": a.epochs,
        "seed": seed,
        "batch_size": a.batch_size,
        "max_edges": 100_000,
        "learning_rate": a.learning_rate,
        "validate_every": 5,
        "clip_norm": CLIP,
        **given,
    }
    return StepperTraining.parse(
        {
            "out": str(folder / "stepper.pt"),
            "data": {"motion": str(motion), **a.sizes, **data},
            "model": {"preset": preset, "neighbors": a.neighbors or NEAREST[a.system], **network},
            "training": training,
        }
    )


def turned(path: str, motion: Path) -> float:
    """Largest difference, over ten systems, between turning the bodies before and after the step, in float64."""
    stepper, moved = load_stepper(path)[0].double(), read_motion(motion)
    matrix, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    most = 0.0
    for x, v, q in zip(moved.positions[-10:], moved.velocities[-10:], moved.charges[-10:], strict=True):
        before = stepper.step(x, v, q) @ matrix
        after = stepper.step(x @ matrix + 1.0, v @ matrix, q) - 1.0
        most = max(most, float(np.abs(before - after).max()))
    return most


def measure(a: argparse.Namespace, model: str, seed: int, motion: Path) -> dict:
    config = settings(a, model, seed, motion)
    known, begun = Path(config.out).with_name("row.json"), Path(config.out).exists()
    start = time.process_time()
    errors = train_stepper(config)  # refuses to go on with other settings, and does nothing where all is done
    if known.exists():
        return json.loads(known.read_text())
    row = {"model": model, "epochs": a.epochs, "seed": seed}
    row["cpu_s"] = None if begun else time.process_time() - start  # of a part it would say nothing
    row |= {name: values["mse"] for name, values in errors.items()}
    row["turned"] = turned(config.out, motion)
    known.write_text(json.dumps(row))
    return row


@torch.no_grad()
def together(a: argparse.Namespace, model: str, motion: Path) -> float:
    """Mean squared error of the mean that all seeds predict, over the systems of the test."""
    steppers = [load_stepper(str(folder_of(a, model, seed) / "stepper.pt"))[0] for seed in range(a.seeds)]
    first = a.sizes["train"] + a.sizes["valid"]
    tested = Motion(*(values[first : first + a.sizes["test"]] for values in read_motion(motion)))
    squares = []
    for start in range(0, a.sizes["test"], AT_ONCE):
        part = Motion(*(values[start : start + AT_ONCE] for values in tested))
        graph = collate([bodies(x, v, q, steppers[0].config.neighbors) for x, v, q in zip(*part[:3], strict=True)])
        mean = torch.stack([stepper(graph)[:, :3] for stepper in steppers]).mean(dim=0).numpy()
        squares.append(np.square(mean - part.later.reshape(-1, 3)).ravel())
    return float(np.concatenate(squares).mean())


def curves(a: argparse.Namespace, runs: list[dict]) -> list[dict]:
    """Errors over the training of the first seed of each model, as told by its CSV file."""
    rows = []
    for run in runs:
        if run["seed"] == 0 and run["cpu_s"] is not None:
            folder = folder_of(a, run["model"], 0)
            with (folder / "stepper.csv").open() as lines:
                told = [(int(row["epoch"]), float(row["valid_positions"])) for row in csv.DictReader(lines)]
            minutes = run["cpu_s"] / told[-1][0] / 60
            rows += [{"model": run["model"], "minutes": epoch * minutes, "error": error} for epoch, error in told]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="charged", choices=PUBLISHED)
    parser.add_argument("--models", nargs="+", default=["segnn"], metavar="PRESET[,SETTING=VALUE]")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.08)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--neighbors", type=int, help="nearest that send messages; default: all charges, 6 stars")
    parser.add_argument("--small", type=int, help="so many trajectories of each kind instead, to try it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="nbody")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.sizes = dict.fromkeys(SIZES, a.small) if a.small else SIZES
    Path(a.out).mkdir(parents=True, exist_ok=True)
    motion = motion_of(a.system, a.sizes, Path(a.out))
    print(f"{motion}: sha256 {hashlib.sha256(motion.read_bytes()).hexdigest()}")
    runs = [measure(a, model, seed, motion) for model in a.models for seed in range(a.seeds)]
    rows = []
    for model in a.models:
        mine = [run for run in runs if run["model"] == model]
        means = {name: float(np.mean([run[name] for run in mine])) for name in ("train", "valid", "test")}
        times = [run["cpu_s"] for run in mine if run["cpu_s"] is not None]
        means["cpu_s"] = float(np.mean(times)) if times else None
        spread = float(np.std([run["test"] for run in mine], ddof=1)) if len(mine) > 1 else None
        means |= {"together": together(a, model, motion), "turned": max(run["turned"] for run in mine)}
        rows.append({"model": model, "seeds": len(mine), **means, "±": spread})
    rows += [{"model": f"{name}, published", "test": error} for name, error in PUBLISHED[a.system].items()]
    errors = dict.fromkeys(("train", "valid", "test", "±", "together"), ".5f")
    print_table(rows, {"model": "", "seeds": "d", **errors, "cpu_s": ".0f", "turned": ".1e"})
    labels = ("CPU time [minutes]", "mean squared error, systems that choose the model")
    plot_lines(a.out, curves(a, runs), group="model", x="minutes", y="error", labels=labels)
    save(a.out, rows, {k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
