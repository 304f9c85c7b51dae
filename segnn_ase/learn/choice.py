"""Which frames of a round's dynamics are labelled: some at random for the error, where runs were stopped, on the way,
and relaxed."""

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.optimize import LBFGS
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from segnn_ase.base.errors import SEGNNError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.explore import Condition, Ran, placed_as
from segnn_ase.learn.labelled import KEY, asked_frame
from segnn_ase.learn.selection import informative, learned_form
from segnn_ase.structure.neighbors import neighbor_list

NEAREST = 0.55  # of the sum of covalent radii: what is nearer is no structure to ask a reference for
OF_MINIMA = 6  # one in so many that are chosen: minima lie below all that dynamics show, and users relax into them
FMAX, LONGEST = 0.03, 200  # eV/Å, and steps, of a relaxation to be labelled
PART = 0.25  # of the steps of the dynamics, for all of these
ALIKE = 1e-3  # how much features of two minima differ, beside their size, where they are one
FAILS = SEGNNError, np.linalg.LinAlgError, RuntimeError, ValueError  # the potential refuses, or constraints do


def drawn(
    ran: Sequence[Ran], count: int, round_: int, seed: int, prefix: str = "", but: Collection[str] = ()
) -> list[Atoms]:
    """Frames of all runs, at random times, to be labelled for the error: so many in all; conditions take turns, with
    another one first in each round, and so do the runs of each. prefix: of their keys; but: keys of frames that were
    drawn before; conditions that have fewer of these come first."""

    def key(n: int, k: int) -> str:
        return f"{prefix or round_}/drawn/{ran[n].planned.key}/{k}"

    rng = np.random.default_rng([seed, round_])
    left: dict[Condition, list[list[tuple[int, int]]]] = {}
    had: Counter[Condition] = Counter()
    for n, run in enumerate(ran):
        had[run.planned.condition] += sum(key(n, k) in but for k in range(len(run.frames)))
        sane = [k for k, frame in enumerate(run.frames) if key(n, k) not in but and is_sane(frame)]
        if sane:
            left.setdefault(run.planned.condition, []).append([(n, sane[k]) for k in rng.permutation(len(sane))])
    found: list[tuple[int, int]] = []
    first = round_ * count % max(len(left), 1)
    conditions = sorted([*left][first:] + [*left][:first], key=had.__getitem__)
    turns = [left[condition] for condition in conditions]
    while len(found) < count and any(any(runs) for runs in turns):
        for runs in turns:
            runs.sort(key=len, reverse=True)  # the one of which most are left
            if runs[0] and len(found) < count:
                found.append(runs[0].pop())
    return [
        asked_frame(ran[n].frames[k], key(n, k), round_, ran[n].planned.condition.name, "drawn at random")
        for n, k in sorted(found)
    ]


def chosen(
    ran: Sequence[Ran], measured: Sequence[Atoms], count: int, round_: int, calculator: SEGNNCalculator, *, few: bool
) -> list[Atoms]:
    """So many frames of dynamics: up to half of them where runs were stopped, a sixth relaxed by the potential, the
    rest of all; the most informative ones of each kind. few: the rest is evenly spaced instead, as few labels are worth
    more where dynamics are than where they rarely come.

    measured: frames that are learned anyway.
    """
    if count < 1:
        return []
    ends = [(run, end) for run in ran if (end := last_sane(run)) is not None]
    taken = {tuple(frame.info[KEY].split("/")[-2:]) for frame in measured}
    on_the_way = [
        (run, frame)
        for run in ran
        for k, frame in enumerate(run.frames)
        if (run.planned.key, str(k)) not in taken and is_sane(frame)
    ]
    known, learned = learned_form(calculator), [calculator.get_descriptors(frame) for frame in measured]
    picked: list[tuple[Ran, Atoms, str]] = []
    minima = count // OF_MINIMA
    relaxed = relaxed_frames(on_the_way, 2 * minima, calculator, round_)
    kinds = (ends, count // 2, "stopped"), (relaxed, minima, "relaxed"), (on_the_way, count, "passed")
    for candidates, most, told in kinds:
        most = min(most, count - len(picked))
        if told == "passed" and few:
            numbers = evenly_spaced(len(candidates), min(most, len(candidates)), round_)
            picked += [(*candidates[n], "spaced") for n in numbers]
            continue
        features = [calculator.get_descriptors(frame) for _, frame in candidates]
        numbers, _ = informative(features, most, known, learned)
        picked += [(*candidates[n], told) for n in numbers]
        learned += [features[n] for n in numbers]
    return [
        asked_frame(frame, f"{round_}/chosen/{n}", round_, run.planned.condition.name, _reason(run, told))
        for n, (run, frame, told) in enumerate(picked)
    ]


def _reason(run: Ran, told: str) -> str:
    if told == "relaxed":
        return "minimum of the potential"
    if told == "spaced":
        return "evenly spaced"
    return f"stopped: {in_brief(run.reason)}" if told == "stopped" and run.reason else "informative"


def in_brief(reason: str | None) -> str:
    """Why a run was stopped, without where its files are."""
    text = (reason or "").partition(": ")[2] or (reason or "")
    for end in (". What would help", ". The frame before", ". A smaller"):
        text = text.partition(end)[0]
    text = text.removeprefix("this is outside what the potential was trained on: ")
    return text.partition("; ")[0][:160]


def last_sane(run: Ran) -> Atoms | None:
    """Where a run was stopped: the refused frame, or the one before, where that is a structure at all."""
    return next((frame for frame in reversed(run.ends) if is_sane(frame)), None)


def is_sane(atoms: Atoms) -> bool:
    """Whether a reference can be asked: atoms are somewhere, and not upon one another."""
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return False
    radii = covalent_radii[atoms.numbers]
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 2 * NEAREST * radii.max())
    d = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array, axis=1)
    return bool((d >= NEAREST * (radii[i] + radii[j])).all())


def relaxed_frames(
    candidates: Sequence[tuple[Ran, Atoms]], count: int, calculator: SEGNNCalculator, turn: int
) -> list[tuple[Ran, Atoms]]:
    """So many of these frames of dynamics, evenly spaced and others in each turn, relaxed by the potential in the cells
    that they have; fewer, where the dynamics were short beside the relaxations, or some lead to the same."""
    steps = sum({id(run): run.steps for run, _ in candidates}.values())
    count = min(count, len(candidates), int(PART * steps / LONGEST))
    ends = (relaxed_from(*candidates[n], calculator) for n in evenly_spaced(len(candidates), count, turn))
    return distinct([(run, relaxed) for run, relaxed, _ in ends if relaxed is not None], calculator)


def relaxed_from(
    run: Ran, frame: Atoms, calculator: SEGNNCalculator, fmax: float = FMAX, steps: int = LONGEST
) -> tuple[Ran, Atoms | None, bool]:
    """A frame of a run; see `relaxed_by_potential`."""
    return run, *relaxed_by_potential(placed_as(run.planned.start, frame), calculator, fmax, steps)


def distinct(found: Sequence[tuple[Ran, Atoms]], calculator: SEGNNCalculator) -> list[tuple[Ran, Atoms]]:
    """Without those that are like one before, or mirrored, or have other atoms of an element in the same places."""
    kept: list[tuple[Ran, Atoms]] = []
    features: list[np.ndarray] = []
    for run, atoms in found:
        new = calculator.get_descriptors(atoms)
        there = [f for f, (_, old) in zip(features, kept, strict=True) if np.array_equal(old.numbers, atoms.numbers)]
        if not any(are_alike(new, other, atoms.numbers) for other in there):
            features.append(new)
            kept.append((run, atoms))
    return kept


def evenly_spaced(size: int, count: int, turn: int = 0) -> list[int]:
    """So many of 0 to size - 1, in the middle of as many parts, or elsewhere in them by turns."""
    place = (0.5 + turn * (np.sqrt(5) - 1) / 2) % 1.0
    return [int((k + place) * size / count) for k in range(count)]


def are_alike(one: np.ndarray, other: np.ndarray, numbers: np.ndarray) -> bool:
    """Features (N, F) of two structures of the same elements (N,), whichever atoms of an element are like which."""
    off = 0.0
    for element in np.unique(numbers):
        mine = numbers == element
        apart = cdist(one[mine], other[mine], "sqeuclidean")
        off += apart[linear_sum_assignment(apart)].sum()
    return bool(np.sqrt(off) < ALIKE * np.linalg.norm(one))


def relaxed_by_potential(
    atoms: Atoms, calculator: SEGNNCalculator, fmax: float, steps: int
) -> tuple[Atoms | None, bool]:
    """The last of the relaxation for which a reference can be asked, None where that is where it begins; and whether it
    has ended."""
    moving, last = atoms.copy(), None
    moving.calc = calculator
    optimizer = LBFGS(moving, logfile=None)  # type: ignore[arg-type]
    with suppress(*FAILS):  # the frame before is there
        for step, ended in enumerate(optimizer.irun(fmax=fmax, steps=steps)):
            if not is_sane(moving):
                break
            last = moving.copy() if step else None
            if ended:
                return last, True
    return last, False
