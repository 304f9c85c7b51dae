"""The frames before anything is known: the structures themselves, relaxed, moved, rattled and strained."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.optimize import BFGS

from segnn_ase.base.errors import ConfigError, LabelError
from segnn_ase.learn.explore import placed_as
from segnn_ase.learn.labelled import ROUND, asked_frame, decided
from segnn_ase.learn.labeller import AskingCalculator, Labeller
from segnn_ase.learn.settings import FEWEST, ConditionsConfig, LearnConfig, StartConfig
from segnn_ase.learn.state import Loop
from segnn_ase.md.velocities import set_velocities
from segnn_ase.structure.neighbors import neighbor_list
from segnn_ase.train.rollouts import usual_timestep

NEAR = 0.75  # of the distances of the structure: atoms are not pushed nearer together
ATTEMPTS = 20
FMAX, APART = 0.05, 0.02  # eV/Å of a relaxation, and Å (rms) between frames of it that are learned
EVERY, MOST = 10, 60  # steps between frames of dynamics that are learned, at least, and how many they are at most
SHARE, FIRST, RELAXED = 0.04, 0.25, 0.1  # of the minutes for these dynamics, for first labels, and for relaxations
WORTH, MOST_PS = 50, 2.0  # steps of these, at least, and ps, at most


def first_labels(loop: Loop) -> tuple[list[Atoms], list[str]]:
    """The structures, relaxed as far as asked for, and the keys of frames on the way and of dynamics of the reference,
    where these are learned."""
    config, labeller = loop.config, loop.labeller
    labeller.control_given()
    keys = list(labeller.labelled.given)
    structures: list[Atoms] = []
    for n, atoms in enumerate(loop.structures):
        most = partial(steps_of_relaxation, loop)
        relaxed, more = relaxed_by_reference(labeller, atoms, most, f"0/relax/{n + 1}", config.conditions)
        structures.append(relaxed)
        keys += more
    steps = steps_of_dynamics(loop) // len(structures)
    for n, atoms in enumerate(structures):
        keys += moved_by_reference(loop, atoms, steps, f"0/dynamics/{n + 1}")
    refuse_unknown_stress(loop)
    refuse_slow(loop)
    return structures, keys


def first_frames(loop: Loop, make: Callable[[int], list[Atoms]]) -> list[Atoms]:
    """So many frames, which are made when their number is known, labelled."""
    config, labeller = loop.config, loop.labeller
    room = max(loop.labels_left // 2, 0)  # where labels are limited: half of them are for the rounds
    count = loop.state.once("first labels", lambda: min(config.first_labels, room, loop.labels_within(FIRST)))
    frames = labeller.label(decided(config.folder / "start.xyz", lambda: make(count)))
    begun = [key for key, frame in labeller.labelled.frames.items() if frame.info[ROUND] == 0]
    labeller.control(0, begun[1:])  # also of what is not learned, from which the rest follows
    loop.state.save()
    return frames


def refuse_unknown_stress(loop: Loop) -> None:
    """Raise ConfigError where an aim for the stress cannot be reached; tell what a pressure then is."""
    config = loop.config
    if any("stress" in frame.calc.results for frame in loop.labeller.labelled.frames.values()):
        return
    if config.aim.stress is not None:
        raise ConfigError(
            f"aim.stress is {config.aim.stress:g}, but {config.reference.calculator!r} gives no stress of these "
            "structures: omit it"
        )
    if config.conditions.pressure:
        loop.report(
            "warning: the reference gives no stress: cells are not relaxed, and the stress is learned by forces"
        )


def refuse_slow(loop: Loop) -> None:
    """Raise ConfigError where the minutes are not enough for the labels of a first training."""
    affordable, minutes = loop.labels_within(FIRST), loop.config.budget.minutes
    first = loop.config.pretraining
    less = " without pretraining" if first is not None and first.reference is not None else ""
    if affordable < FEWEST and not (loop.config.folder / "start.xyz").exists():
        raise ConfigError(
            f"budget.minutes is {minutes:g}{less}, of which a quarter allows {affordable} labels of the {FEWEST} that "
            f"a first training needs (one takes {loop.seconds_of_label:.3g} s): raise it, or reference.workers"
        )


def steps_of_relaxation(loop: Loop) -> int:
    """Of each structure, decided when the first label is there; a tenth of the minutes is for all."""
    refuse_slow(loop)
    config, structures = loop.config, len(loop.structures)
    most = min(config.start.relax_steps, loop.labels_within(RELAXED) // (config.reference.workers * structures))
    if config.budget.labels is not None:
        most = min(most, config.relaxations(structures))
    return loop.state.once("relax_steps", lambda: most)


def relaxed_by_reference(
    labeller: Labeller, atoms: Atoms, steps: Callable[[], int], prefix: str, conditions: ConditionsConfig
) -> tuple[Atoms, list[str]]:
    """After at most so many steps, for which is asked when the first label is there, and the keys of frames on the way
    that differ; cells that move do so at the lowest pressure.

    Raises LabelError where the first one fails.
    """
    labeller.labelled.retry([f"{prefix}/0"])  # where it failed, nothing was done
    moving, calculator = atoms.copy(), AskingCalculator(labeller, prefix, "relaxation")
    moving.calc = calculator
    moving.get_forces()
    most = steps()
    free: Any = moving
    if conditions.pressure and moving.pbc.all() and "stress" in calculator.results:
        pressure, isotropic = min(conditions.pressure) * units.GPa, conditions.npt_cell == "isotropic"
        free = FrechetCellFilter(moving, scalar_pressure=pressure, hydrostatic_strain=isotropic)
    with suppress(LabelError):  # one of them: those before are there
        BFGS(free, logfile=None).run(fmax=FMAX, steps=most)
    found: list[str] = []
    last = None
    for key in calculator.keys:
        positions = labeller.labelled.frames[key].positions
        if last is None or key == calculator.keys[-1] or np.sqrt(np.mean((positions - last) ** 2)) > APART:
            found.append(key)
            last = positions
    return placed_as(atoms, labeller.labelled.frames[calculator.keys[-1]]), found


def moved_by_reference(loop: Loop, atoms: Atoms, steps: int, prefix: str) -> list[str]:
    """Keys of some frames of dynamics at the hottest condition."""
    if not steps:
        return []
    loop.report(f"{steps} steps of dynamics by the reference")
    moving, calculator = atoms.copy(), AskingCalculator(loop.labeller, prefix, "dynamics of the reference")
    moving.calc = calculator
    temperature = max(loop.config.conditions.temperature)
    rng, step = np.random.default_rng(loop.config.seed), loop.config.conditions.timestep or usual_timestep(atoms)
    set_velocities(moving, temperature, rng)
    heat: dict[str, Any] = {"temperature_K": temperature, "friction": 0.01 / units.fs, "fixcm": False, "rng": rng}
    try:
        Langevin(moving, step * units.fs, **heat).run(steps)
    except LabelError as error:
        loop.report(f"the dynamics of the reference end after {len(calculator.keys)} steps: {error}")
    every = max(len(calculator.keys) // MOST, EVERY)
    return calculator.keys[every::every]


def steps_of_dynamics(loop: Loop) -> int:
    """As the settings say, or as the time of the first labels allows; that is decided once."""
    config = loop.config
    if config.start.dynamics_steps is not None:
        return config.start.dynamics_steps
    most = config.steps_of(config.conditions.timestep or usual_timestep(loop.structures[0]), MOST_PS)
    steps = min(loop.labels_within(SHARE) // config.reference.workers, most)  # one after the other
    worth = steps >= WORTH * len(loop.structures) and config.budget.labels is None
    return loop.state.once("dynamics_steps", lambda: steps if worth else 0)


def displaced_frames(structures: Sequence[Atoms], count: int, config: LearnConfig) -> list[Atoms]:
    """To be asked for."""
    made = displaced(structures, count, config.start, config.seed)
    return [asked_frame(atoms, f"0/start/{n}", 0, "", told) for n, (atoms, told) in enumerate(made)]


def displaced(structures: Sequence[Atoms], count: int, settings: StartConfig, seed: int) -> list[tuple[Atoms, str]]:
    """So many frames, each with what was done to it: the structures take turns.

    Displacements are normal, of rms sizes up to `rattle`; every other frame that is periodic in three directions is
    strained as well, by up to `strain` in every component.
    """
    found = []
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        atoms = structures[n % len(structures)].copy()
        size = settings.rattle * (1 + n // len(structures)) / -(-count // len(structures))
        told = f"rattled by {size:.3f} Å"
        if atoms.pbc.all() and settings.strain and (n // len(structures)) % 2:
            strain = rng.uniform(-settings.strain, settings.strain, (3, 3))
            strain = 0.5 * (strain + strain.T)
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            told += f", strained by up to {np.abs(strain).max():.3f}"
        found.append((rattled(atoms, size, rng), told))
    return found


def rattled(atoms: Atoms, size: float, rng: np.random.Generator) -> Atoms:
    """Displaced at random by so much (rms, Å), less where atoms would come near one another."""
    before = shortest(atoms)
    for attempt in range(ATTEMPTS):
        out = atoms.copy()
        out.positions += size * 0.8**attempt * rng.normal(size=atoms.positions.shape) / np.sqrt(3)
        if shortest(out) >= NEAR * before:
            return out
    return atoms.copy()


def shortest(atoms: Atoms) -> float:
    """Distance of the nearest pair, Å; infinite without pairs."""
    for cutoff in (2.0, 5.0):
        i, j, S = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
        if len(i):
            vectors = atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array
            return float(np.linalg.norm(vectors, axis=1).min())
    return np.inf
