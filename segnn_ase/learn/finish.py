"""The end of a loop: the last training on all frames, from scratch, what it is worth, and what it cost."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms

from segnn_ase.base.files import write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.labelled import SECONDS, decided
from segnn_ase.learn.pool import threads_of
from segnn_ase.learn.references import resolve_reference
from segnn_ase.learn.report import Ended, write_loop_report
from segnn_ase.learn.rounds import decided_training, doctor_in_words, errors_on, is_small, usable
from segnn_ase.learn.settings import LearnConfig
from segnn_ase.learn.state import Loop, what_ends
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.train.settings import DataConfig, TrainConfig
from segnn_ase.train.start import train
from segnn_ase.verify.certificate import write
from segnn_ase.verify.run import verify

LAST = 1 / 3  # of the minutes of the budget, at least, are for the last training
TIMED, WARM = 20, 5  # evaluations that are timed, and before


class Learned(NamedTuple):
    """What became of a loop."""

    model: str
    report: str
    reached: bool  # whether dynamics ran at every condition and the error is below the aim
    why: str  # it ended before that, in words
    labels: int
    minutes: float


def finish_loop(loop: Loop, keys: Sequence[str], held: Sequence[str], why: str) -> Learned:
    """Train on all frames but those that are held out, in a folder of its own, measure the potential on these, verify
    it, and write model and report; where that was stopped it goes on."""
    config, state, labelled = loop.config, loop.state, loop.labeller.labelled
    loop.report(f"the rounds end: {why}" if why else "good enough: all dynamics ran, and errors are below the aim")
    before = state.minutes
    digest = hashlib.sha256(json.dumps(what_ends(config), sort_keys=True).encode()).hexdigest()[:6]
    folder = config.folder / f"final-{len(state.rounds):03d}-{digest}"
    folder.mkdir(exist_ok=True)
    frames = decided(folder / "train.xyz", lambda: usable(labelled.of(keys)))
    training = decided_training(folder, lambda: last_training(config, folder, state.minutes - state.last_minutes))
    with doctor_in_words():
        train(training, progress=loop.labeller.progress)
    model = str(folder / "model.pt")
    measured = errors_on(labelled.of(held), SEGNNCalculator(model, device=config.training.device, domain="ignore"))
    if not why and not is_small(config, measured):
        why = "the errors of the last potential are above it, those of the last round's were below"
    certificate = verify(model, loop.structures[0].copy(), device=config.training.device)
    write(certificate, model=model)
    tell_origin(folder / "model.pt", config, labelled.count)
    speed = speeds(model, frames, config)
    write_atomically(config.out, Path(model).read_bytes())
    state.last_minutes += state.minutes - before
    report = Path(config.out).with_suffix(".report.md")
    ended = Ended(state.rounds, labelled, frames, measured, certificate, speed, why, state.minutes)
    write_loop_report(report, config, ended)
    learned = Learned(config.out, str(report), not why, why, labelled.count, round(state.minutes, 1))
    state.finished = {"learned": learned._asdict(), "settings": what_ends(config)}
    state.save()
    return learned


def last_training(config: LearnConfig, folder: Path, spent: float) -> TrainConfig:
    """Of the settings that were given; without a length it gets the minutes that are left, and a third at least."""
    training = config.training.model_copy(update={"seed": config.seed})
    if training.epochs is None and training.minutes is None:
        minutes = max(config.budget.minutes - spent, LAST * config.budget.minutes)
        training = training.model_copy(update={"minutes": minutes})
    data = DataConfig(train=(str(folder / "train.xyz"),), refuse_flaws=config.refuse_flaws)
    return TrainConfig(out=str(folder / "model.pt"), data=data, model=config.model, training=training)


def tell_origin(model: Path, config: LearnConfig, labels: int) -> None:
    """Write into the model file whose labels it learned, and their licence."""
    reference = resolve_reference(config.reference.calculator, config.reference.arguments)
    origin = {"reference": config.reference.calculator, "about": reference.about, "licence": reference.licence}
    potential, metadata = load_with_metadata(model)
    save_potential(model, potential, metadata={**metadata, "learned_from": {**origin, "labels": labels}})


def speeds(model: str, frames: Sequence[Atoms], config: LearnConfig) -> tuple[float, float, int]:
    """Seconds of a label (the median of those of the largest structure), and of energy and forces (and stress) by the
    potential on as many threads; and how many these are."""
    largest = max(len(frame) for frame in frames)
    same = [frame for frame in frames if len(frame) == largest]
    label, threads = float(np.median([frame.info[SECONDS] for frame in same])), threads_of(config.reference)
    calculator, taken = SEGNNCalculator(model, domain="ignore", device=config.training.device), []
    with number_of_threads(threads):
        for n in range(WARM + TIMED):
            atoms = same[n % len(same)].copy()
            atoms.calc = calculator
            begin = time.perf_counter()
            atoms.get_forces()
            if "stress" in same[0].calc.results:
                atoms.get_stress()
            taken.append(time.perf_counter() - begin)
    return label, float(np.median(taken[WARM:])), threads


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
