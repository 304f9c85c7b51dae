"""What is done in a round: a short training, and an error that is measured on frames of dynamics."""

import csv
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.choice import in_brief
from segnn_ase.learn.explore import Ran
from segnn_ase.learn.labelled import CONDITION, write_frames
from segnn_ase.learn.pretraining import train_from
from segnn_ase.learn.settings import LearnConfig
from segnn_ase.learn.state import Loop
from segnn_ase.model.settings import model_config
from segnn_ase.structure.neighbors import neighbor_list
from segnn_ase.train.few_frames import seconds_by_size
from segnn_ase.train.settings import DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.tuning_settings import FinetuneConfig

SHORT = 0.05  # of the minutes of the budget that the training of a round is to take, roughly; no clock is read
SHORTEST = 0.4  # of that, where the errors of the round before were as far below the aim
EPOCHS = 30, 200  # of it, at least and at most
OFTEN = 100  # epochs that are many: frames are what is missing, not time
FOR_FEW = {"learning_rate": 0.03, "rollout_steps": 0, "teachers": 0}  # settings of a training of few epochs
OF_LAST = {"minutes", "epochs", "committee", "patience", "teachers", "select"}  # settings of the last training alone
OF_LAST |= {name for name in OptimConfig.model_fields if name.startswith("rollout_")}
PASSED = "frames passed a minute in"  # and the round
STRONGEST = 50.0  # eV/Å: frames with larger forces say nothing of dynamics, and spoil a training


class Rounds(NamedTuple):
    """What the rounds leave to the last training."""

    why: str  # they ended before it was good enough
    structures: list[Atoms]  # relaxed by the reference
    keys: list[str]  # of the frames that may be learned
    held: list[str]  # of those that were drawn in the last round
    ran: list[Ran]  # the dynamics of the last round


def round_folder(config: LearnConfig, number: int) -> Path:
    return config.folder / f"round-{number:03d}"


def usable(frames: Sequence[Atoms]) -> list[Atoms]:
    """Those that are trained on."""
    return [frame for frame in frames if np.abs(frame.get_forces()).max() <= STRONGEST]


def calculator_of_round(loop: Loop, frames: Sequence[Atoms], folder: Path) -> SEGNNCalculator:
    """Of the potential that is trained on these frames, from scratch or from the pretrained one, unless it is there;
    where that was stopped it goes on."""
    config = loop.config
    source, finished = folder / "train.xyz", folder / "trained.json"
    if not finished.exists():
        if not source.exists():
            write_frames(source, frames)
        minutes = share_of(config, loop.state.rounds) * SHORT * config.budget.minutes
        training = short_training(loop, frames, folder, minutes)
        begins, since = not (folder / "model.resume.pt").exists(), time.monotonic()
        with doctor_in_words():
            errors = train_from(config, training, progress=False)
        if begins:
            loop.state.once(f"{PASSED} {folder.name}", lambda: passed_a_minute(folder, len(frames), since))
        write_atomically(finished, json.dumps(errors.get("valid"), default=str).encode())
    return SEGNNCalculator(str(folder / "model.pt"), device=config.training.device, domain="ignore")


def passed_a_minute(folder: Path, frames: int, since: float) -> int:
    """By the training in this folder, with what it needs besides."""
    with (folder / "model.csv").open() as file:
        epochs = int([*csv.DictReader(file)][-1]["epoch"])
    return int(60 * epochs * frames / (time.monotonic() - since))


@contextmanager
def doctor_in_words() -> Iterator[None]:
    """Where the doctor refuses labels, name the setting of a loop."""
    try:
        yield
    except DataError as error:
        told = str(error).replace(
            "refuse_flaws = false under [data]", "refuse_flaws = false in the TOML file of the loop"
        )
        raise DataError(told) from error


def share_of(config: LearnConfig, rows: Sequence[dict[str, Any]]) -> float:
    """Of the usual time of a short training: less where errors are well below the aim, so that more rounds are made."""
    last = rows[-1]["forces"] if rows else None
    return 1.0 if last is None else float(np.clip(last / config.aim.forces, SHORTEST, 1.0))


def short_training(loop: Loop, frames: Sequence[Atoms], folder: Path, minutes: float) -> TrainConfig:
    """Of as many epochs as these minutes allow, roughly, at a rate for few; decided once, by no clock."""
    config = loop.config
    epochs = loop.state.once(
        f"epochs of {folder.name}", lambda: epochs_within(minutes, frames, config.model, config.training)
    )
    given = config.training.model_dump(exclude_unset=True)
    mine = OptimConfig(**{name: value for name, value in given.items() if name not in OF_LAST})
    short = settings_for_few(mine, fast=config.pretraining is None)
    settings = {"seed": config.seed, "epochs": epochs, **short, **mine.model_dump(exclude_unset=True)}
    return training_in(config, folder, OptimConfig(**settings))


def settings_for_few(training: OptimConfig, *, fast: bool) -> dict[str, Any]:
    """Settings of a training of few epochs, where others were not given; what these need stays. fast: with the rate
    that learns most in a short time, which is too large for a longer one, and to go on from a pretrained potential."""
    unwanted = {"rollout_steps"} if training.select == "stability" else set()
    unwanted |= set() if fast else {"learning_rate"}
    return {name: value for name, value in FOR_FEW.items() if name not in unwanted}


def training_in(config: LearnConfig, folder: Path, training: OptimConfig) -> TrainConfig:
    """Of the frames in this folder, to a model beside them."""
    data = DataConfig(train=(str(folder / "train.xyz"),), refuse_flaws=config.refuse_flaws)
    values = {"out": str(folder / "model.pt"), "data": data, "training": training}
    if config.pretraining is None:
        return TrainConfig(**values, model=config.model)
    keep = "auto" if config.pretraining.model else "nothing"  # of a cheaper reference
    return TrainConfig(**values, finetune=FinetuneConfig(keep=keep))


def epochs_within(minutes: float, frames: Sequence[Atoms], model: dict, training: OptimConfig) -> int:
    """As many as this time allows, by what a pair of neighbours costs; no clock is read."""
    cutoff, elements = model_config(**model).cutoff, sorted({int(z) for frame in frames for z in frame.numbers})
    pairs = sum(len(neighbor_list(f.positions, f.cell.array, f.pbc, cutoff).i) for f in frames)
    steps = max(len(frames) / training.batch_size, pairs / training.max_edges)
    seconds = seconds_by_size(model, elements, pairs, steps, training.device)
    return int(np.clip(60 * minutes / max(seconds, 1e-9), *EPOCHS))


def errors_on(frames: Sequence[Atoms], calculator: SEGNNCalculator) -> dict[str, Any]:
    """Of labelled frames: "drawn", their number, rms errors of "forces" (meV/Å) and "energy" (meV/atom), "scatter" of
    that of the forces (its standard error, as so few frames tell it), "expected" of the forces by the potential itself,
    "stress" (meV/Å^3), and "by_condition" those of the forces; None for what is not known."""
    unknown = dict.fromkeys(("forces", "energy", "stress", "expected", "scatter"))
    found: dict[str, Any] = {"drawn": len(frames), **unknown}
    found["by_condition"] = {}
    if not frames:
        return found
    said = calculator.evaluate([frame.copy() for frame in frames], ("energy", "forces", "stress"))
    forces = [one["forces"] - frame.get_forces() for one, frame in zip(said, frames, strict=True)]
    energy = [(o["energy"] - f.get_potential_energy()) / len(f) for o, f in zip(said, frames, strict=True)]
    found |= {"forces": rms_in_milli(forces), "energy": rms_in_milli(energy), "scatter": scatter_in_milli(forces)}
    pairs = [
        (o["stress"], f) for o, f in zip(said, frames, strict=True) if "stress" in f.calc.results and "stress" in o
    ]
    if pairs:
        found["stress"] = rms_in_milli([stress - frame.get_stress() for stress, frame in pairs])
    if all("forces_std" in one for one in said):
        found["expected"] = rms_in_milli([one["forces_std"] for one in said])
    names = [frame.info[CONDITION] for frame in frames]
    for name in dict.fromkeys(names):
        found["by_condition"][name] = rms_in_milli([f for f, other in zip(forces, names, strict=True) if other == name])
    return found


def rms_in_milli(parts: Sequence[Any]) -> float:
    values = np.concatenate([np.ravel(part) for part in parts])
    return round(float(1e3 * np.sqrt(np.mean(np.square(values)))), 4)


def scatter_in_milli(parts: Sequence[np.ndarray]) -> float | None:
    """Standard error of the rms of what frames are off by, which scatters from frame to frame; None of one. At least
    that: frames of one run are not independent, and few know little of rare large errors."""
    squares, sizes = np.array([np.sum(part**2) for part in parts]), np.array([part.size for part in parts])
    mean, n = squares.sum() / sizes.sum(), len(parts)
    if n < 2:
        return None
    if not mean:
        return 0.0
    of_mean = np.sqrt(n / (n - 1) * np.sum((squares - mean * sizes) ** 2)) / sizes.sum()
    return round(float(1e3 * of_mean / (2 * np.sqrt(mean))), 4)


def too_sure(rows: Sequence[dict[str, Any]]) -> float:
    """Measured over expected errors of the last round; 1 where that is not known."""
    last = rows[-1] if rows else {}
    return last["forces"] / last["expected"] if last.get("expected") and last.get("forces") else 1.0


def is_good(config: LearnConfig, ran: Sequence[Ran], row: dict[str, Any]) -> bool:
    """Whether it seems so, and frames of every condition say it."""
    everywhere = {run.planned.condition.name for run in ran} <= row["by_condition"].keys()
    return everywhere and seems_good(config, ran, row)


def seems_good(config: LearnConfig, ran: Sequence[Ran], row: dict[str, Any]) -> bool:
    """Whether all dynamics ran as long as is asked for, and frames of them have small errors, with what these scatter:
    who looks after each round would else believe the one that was lucky."""
    long = row["picoseconds"] >= config.conditions.picoseconds
    passed = all(run.reason is None and not run.is_late for run in ran)
    scatter = row.get("scatter", 0.0)  # older loops did not know it
    sure = scatter is not None and row["forces"] + scatter <= config.aim.forces
    return long and passed and sure and is_small(config, row)


def told_of_runs(ran: Sequence[Ran]) -> dict[str, Any]:
    """How many there are, and which of them were stopped, and why, or had no more time."""
    stops = [
        f"{run.planned.key} after {run.steps * run.planned.timestep:g} fs: {in_brief(run.reason)}"
        for run in ran
        if run.reason
    ]
    late = [f"{run.planned.key} after {1e-3 * run.steps * run.planned.timestep:.2f} ps" for run in ran if run.is_late]
    return {"runs": len(ran), "stops": stops, "late": late}


def is_small(config: LearnConfig, row: dict[str, Any]) -> bool:
    """Whether the forces are as good as is asked for, in all and at every condition, and so are energies and stress."""
    found: list[tuple[float | None, float | None]] = [(row[k], getattr(config.aim, k)) for k in ("energy", "stress")]
    found += [(error, config.aim.forces) for error in (row["forces"], *row["by_condition"].values())]
    return all(aim is None or (error is not None and error <= aim) for error, aim in found)
