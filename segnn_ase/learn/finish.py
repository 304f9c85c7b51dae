"""The end of a loop: the last training, dynamics with what came of it, what that is worth and costs."""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms

from segnn_ase.base.files import write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.choice import drawn
from segnn_ase.learn.comparison import (
    VOLUMES,
    Compared,
    compare_modes,
    compare_relaxed,
    compare_volumes,
    has_vacuum,
    reweighted_ensembles,
)
from segnn_ase.learn.explore import SHARE, explore, largest_uncertainty, patience, plan_runs
from segnn_ase.learn.filling import more_frames, usual_speed
from segnn_ase.learn.labelled import KEY, SECONDS, decided
from segnn_ase.learn.pool import threads_of
from segnn_ase.learn.pretraining import minutes_of_pretraining, train_from
from segnn_ase.learn.references import resolve_reference
from segnn_ase.learn.report import Ended, Speed, Trial, write_loop_report
from segnn_ase.learn.rounds import (
    OFTEN,
    Rounds,
    doctor_in_words,
    epochs_within,
    errors_on,
    is_small,
    settings_for_few,
    too_sure,
    training_in,
    usable,
)
from segnn_ase.learn.settings import LearnConfig, ReferenceConfig
from segnn_ase.learn.state import Loop, what_ends
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.verify.certificate import write
from segnn_ase.verify.run import verify

LAST, AFTER = 0.3, 0.15  # of the minutes of the budget, for the last training, at least, and for what follows
COMPARED = 0.025  # of the minutes, for labels of frames of these dynamics, and for those of comparisons
RELAXED = 8  # of these frames, at most, are relaxed by the potential
OF_CONDITION = 20  # labels of frames of these dynamics
TIMED, WARM = 20, 5  # evaluations that are timed, and before


class Learned(NamedTuple):
    """What became of a loop."""

    model: str
    report: str
    reached: bool  # whether dynamics ran at every condition and the error is below the aim
    why: str  # it ended before that, in words
    labels: int
    minutes: float
    errors: dict[str, Any] | None = None  # of it, on frames of its own dynamics (`errors_on`); None of older loops


def finish_loop(loop: Loop, rounds: Rounds) -> Learned:
    """Train on all frames, from scratch or from the pretrained potential, in a folder of its own, run dynamics at every
    condition, measure the potential on frames of these, compare it with the reference, verify it, and write model and
    report; where that was stopped it goes on.

    Where no labels are left for new frames, those of the last round are held out to measure it.
    """
    config, state, labelled = loop.config, loop.state, loop.labeller.labelled
    ended = f"the rounds end: {rounds.why}"
    loop.report(ended if rounds.why else "good enough: all dynamics ran, and errors are below the aim")
    digest = hashlib.sha256(json.dumps(what_ends(config), sort_keys=True).encode()).hexdigest()[:6]
    folder = config.folder / f"final-{len(state.rounds):03d}-{digest}"
    folder.mkdir(exist_ok=True)
    begun = state.once(f"seconds before {folder.name}", lambda: round(60 * state.minutes))
    new = state.once(f"labels of {folder.name}", lambda: labels_of_trial(loop))
    held = () if new else rounds.held
    more = [] if held else more_frames(loop, rounds, folder, config.training.minutes or minutes_left(loop))
    keys = dict.fromkeys([*rounds.keys, *([] if held else rounds.held), *more])
    frames = decided(folder / "train.xyz", lambda: usable(labelled.of(list(keys))))
    with doctor_in_words():
        train_from(config, last_training(loop, frames, folder), progress=loop.labeller.progress)
    model = str(folder / "model.pt")
    calculator = SEGNNCalculator(model, device=config.training.device, domain="ignore")
    certificate = verify(model, loop.structures[0].copy(), device=config.training.device)
    write(certificate, model=model)
    tell_origin(folder / "model.pt", config, labelled.count)
    tried = trial(loop, rounds, calculator, folder, new)
    measured = errors_on(labelled.of(held), calculator) if held else errors_on(tried.frames, calculator)
    why = why_not_good(config, tried, measured)  # of what is written, however the rounds ended
    why = "; ".join(part for part in (rounds.why, why) if part) if why or held else ""
    compared = comparison(loop, rounds.structures[0], calculator, folder, tried)
    speed = speeds(model, frames, config)
    write_atomically(config.out, Path(model).read_bytes())
    state.last_minutes += state.minutes - begun / 60
    report = Path(config.out).with_suffix(".report.md")
    whole = state.minutes + minutes_of_pretraining(state)
    told = Ended(state.rounds, labelled, frames, tried, measured, bool(held), compared, certificate, speed, why, whole)
    write_loop_report(report, config, told)
    learned = Learned(config.out, str(report), not why, why, labelled.count, round(whole, 1), measured)
    state.finished = {"learned": learned._asdict(), "settings": what_ends(config), "rounds": len(state.rounds)}
    state.save()
    return learned


def labels_of_trial(loop: Loop) -> int:
    """For frames of dynamics with the last potential; none where these are less than one for each condition."""
    conditions = len(loop.conditions)
    most = min(OF_CONDITION * conditions, loop.labels_within(COMPARED), loop.labels_left - 1)  # one is a control
    return most if most >= conditions else 0


def trial(loop: Loop, rounds: Rounds, calculator: SEGNNCalculator, folder: Path, labels: int) -> Trial:
    """Dynamics at every condition with the potential that is written, and its errors on frames of these."""
    config, known = loop.config, loop.state.rounds
    number = len(known) + 1
    chance = zlib.crc32(f"{config.seed} {folder.name}".encode())  # others than in a trial before, which are learned
    loop.report("dynamics with the last potential")
    minutes, outside = SHARE * config.budget.minutes, patience(config.aim, known)
    planned = plan_runs(config, rounds.structures, chance, rounds.ran, config.conditions.picoseconds, minutes, outside)
    limit = largest_uncertainty(calculator, config.aim, too_sure(known))
    ran = [explore(each, calculator, folder, limit) for each in planned]
    frames: list[Atoms] = []
    if labels:
        asked = decided(folder / "drawn.xyz", lambda: drawn(ran, labels, number, chance, folder.name))
        frames = loop.labeller.label(asked)
        loop.labeller.control(number, [frame.info[KEY] for frame in frames], folder.name)
    return Trial(ran, frames)


def comparison(loop: Loop, atoms: Atoms, calculator: SEGNNCalculator, folder: Path, tried: Trial) -> Compared:
    """By as many labels as there is time for, of the first structure."""
    conditions = {each.name: each.temperature for each in loop.conditions}
    said = calculator.evaluate([frame.copy() for frame in tried.frames], ("energy",))
    ensembles = reweighted_ensembles(tried.frames, said, conditions)
    most = loop.state.once(
        f"comparisons of {folder.name}", lambda: max(min(loop.labels_within(COMPARED), loop.labels_left), 0)
    )
    minima = None
    if atoms.pbc.all() and most >= len(VOLUMES) and not has_vacuum(atoms):
        minima = compare_volumes(atoms, calculator, loop.labeller, folder)
        most -= len(VOLUMES)
    count = min(most // 4, RELAXED) if most >= 8 else 0  # differences are told of two or more
    relaxed = compare_relaxed(tried.ran, calculator, loop.labeller, folder, count)
    modes = compare_modes(atoms, calculator, loop.labeller, folder, (most - count) // 2)
    return Compared(minima, modes, relaxed, ensembles)


def why_not_good(config: LearnConfig, tried: Trial, measured: dict[str, Any]) -> str:
    """The last potential; "" where it is."""
    if any(run.reason for run in tried.ran):
        return "dynamics with the last potential were stopped"
    if any(run.is_late for run in tried.ran):
        return "there was no time for all dynamics with the last potential"
    if not {run.planned.condition.name for run in tried.ran} <= measured["by_condition"].keys():
        return "the errors of the last potential are not known at every condition"
    if not is_small(config, measured):
        return "the errors of the last potential are above it"
    return ""


def minutes_left(loop: Loop) -> float:
    """For the last training."""
    minutes, state = loop.config.budget.minutes, loop.state
    return max((1 - AFTER) * minutes - (state.minutes - state.last_minutes), LAST * minutes)


def last_training(loop: Loop, frames: Sequence[Atoms], folder: Path) -> TrainConfig:
    """Of the settings that were given; without a length it gets the minutes that are left.

    Where these are few epochs, roughly, it has no teachers and no short dynamics, as one of a round; but it finds its
    rate by trials, if they tell anything: that of the rounds is too large where there is time.
    """
    config, state = loop.config, loop.state
    given = config.training.model_dump(exclude_unset=True)
    if config.training.epochs is None and config.training.minutes is None:
        seconds = state.once(f"seconds of {folder.name}", lambda: max(round(60 * minutes_left(loop)), 1))
        given["minutes"] = minutes = seconds / 60
        epochs = state.once(f"roughly epochs of {folder.name}", lambda: epochs_of_last(loop, frames, minutes))
        if epochs < OFTEN:
            given = {**settings_for_few(config.training, fast=False), **given}
    return training_in(config, folder, OptimConfig(**{"seed": config.seed, **given}))


def epochs_of_last(loop: Loop, frames: Sequence[Atoms], minutes: float) -> int:
    """Roughly as many as this time allows, by what the trainings of the rounds took, where that is known."""
    if speed := usual_speed(loop):
        return int(minutes * speed / len(frames))
    return epochs_within(minutes, frames, loop.config.model, loop.config.training)


def tell_origin(model: Path, config: LearnConfig, labels: int) -> None:
    """Write into the model file whose labels it learned, before others too, and their licence."""
    origin: dict[str, Any] = {**told_of(config.reference), "labels": labels}
    if config.pretraining is not None:
        first = config.pretraining.reference
        origin["pretrained_on"] = {"model": config.pretraining.model} if first is None else told_of(first)
    potential, metadata = load_with_metadata(model)
    save_potential(model, potential, metadata={**metadata, "learned_from": origin})


def told_of(settings: ReferenceConfig) -> dict[str, str]:
    reference = resolve_reference(settings.calculator, settings.arguments)
    return {"reference": settings.calculator, "about": reference.about, "licence": reference.licence}


def speeds(model: str, frames: Sequence[Atoms], config: LearnConfig) -> Speed:
    """Of a label (the median of those of the largest structure), and of energy and forces (and stress) by the potential
    on as many threads."""
    timed = [frame for frame in frames if SECONDS in frame.info]  # without those that were given
    largest = max(len(frame) for frame in timed)
    same = [frame for frame in timed if len(frame) == largest]
    label, threads = float(np.median([frame.info[SECONDS] for frame in same])), threads_of(config.reference)
    calculator, taken = SEGNNCalculator(model, domain="ignore", device=config.training.device), []
    with number_of_threads(threads):
        for n in range(WARM + TIMED):
            atoms = same[n % len(same)].copy()
            atoms.calc = calculator
            begin = time.perf_counter()
            if "stress" in same[n % len(same)].calc.results:
                atoms.get_stress()  # and with it the forces
            atoms.get_forces()
            taken.append(time.perf_counter() - begin)
    return Speed(largest, threads, label, float(np.median(taken[WARM:])))


@contextmanager
def number_of_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
