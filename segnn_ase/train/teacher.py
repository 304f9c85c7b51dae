"""Structures that a teacher labels: a potential that is trained already, or the mean of a committee.

The mean of a committee is nearer to the truth than its members, and a large potential than a small one. A potential
that learns what they say near the frames, beside the frames, has most of that at its own cost (Hinton et al.,
arXiv:1503.02531). Where the frames are is told by short dynamics from each, at its own temperature.
"""

import math
from collections.abc import Iterator

import numpy as np
from ase import Atoms, units
from ase.data import chemical_symbols
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, SEGNNError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.batches import make_item
from segnn_ase.data.frames import Frame
from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import load_committee
from segnn_ase.store.tensors import checksum
from segnn_ase.structure.stored import evenly
from segnn_ase.train.beside import beside
from segnn_ase.train.evaluation import evaluator_of
from segnn_ase.train.job import TrainingData
from segnn_ase.train.rollouts import CONTACT, FRICTION, dynamics_of, nearest_of, usual_timestep
from segnn_ase.train.settings import DataConfig, TrainConfig

TAUGHT = "taught"  # name of the set
TIMES, MOST = 10, 500  # structures for each frame, and in all
STEPS = 40  # of dynamics between structures
PROBES, DISPLACED = 4, 0.01  # directions in which the curvature of the energy is measured, and how far, Å
COLDEST, HOTTEST = 100.0, 5000.0  # K
DISAGREED = 3.0  # times the usual spread of a committee is too much to be learned


def with_teacher(data: TrainingData, config: TrainConfig, cutoff: float, report) -> TrainingData:
    """The data with structures that the teacher of the settings labels, if there is one; the same in every run."""
    if config.data.teacher is None:
        if config.data.taught is not None:
            raise ConfigError(f"setting 'data.taught' is {config.data.taught}, but there is no data.teacher; give both")
        return data
    teachers = teachers_of(config.data, data.frames)
    most = config.data.taught or min(TIMES * len(data.train), MOST)
    for potential in teachers:
        potential.to(resolve_device(config.training.device))
    report(f"teacher: {most} structures are made by short dynamics from the frames")
    made, temperatures = dynamics_near(data, teachers, most, config.training.seed)
    items = [make_item(frame, cutoff) for frame in agreed(made, teachers, config.training.accelerate)]
    low, high = np.percentile(temperatures, [10, 90]) if temperatures else (0.0, 0.0)
    origin = f"{len(items)} structures from short dynamics at {low:.0f} to {high:.0f} K, labelled by "
    origin += f"the mean of {len(teachers)} potentials" if len(teachers) > 1 else "one potential"
    left_out = len(made) - len(items)
    origin += f" ({left_out} left out, on which they disagree)" if left_out else ""
    found = beside(TAUGHT, items, len(items), origin)
    if not found.replayed:
        raise ConfigError(
            f"setting 'data.teacher' is {config.data.teacher!r}: {len(items)} structures of its dynamics can be "
            "learned, expected two or more; raise data.taught, or take a teacher that was trained on such frames"
        )
    known = checksum([data.checksum, most, *(dict(potential.state_dict()) for potential in teachers)])
    report(f"teacher: {found.told()}")
    return data._replace(beside=(found,), checksum=known)


def teachers_of(settings: DataConfig, frames: list[Frame]) -> list[Potential]:
    """The potentials of the teacher's file. Raises ConfigError where they are of other elements or other labels."""
    teachers = load_committee(settings.teacher).potentials
    first, needed = teachers[0], {int(z) for frame in frames for z in frame.atoms.numbers}
    if unknown := needed - set(first.species):
        known, more = (", ".join(chemical_symbols[z] for z in sorted(some)) for some in (first.species, unknown))
        raise ConfigError(
            f"setting 'data.teacher' is {settings.teacher!r}, which knows {known}; the frames have {more}, too: "
            "expected a potential of all their elements"
        )
    if first.dispersion != settings.dispersion:
        raise ConfigError(
            f"setting 'data.teacher' is {settings.teacher!r}, of whose labels the dispersion {first.dispersion!r} was "
            f"taken off, and 'data.dispersion' is {settings.dispersion!r}; expected the same"
        )
    return [potential.eval().requires_grad_(False) for potential in teachers]


def dynamics_near(
    data: TrainingData, teachers: list[Potential], most: int, seed: int
) -> tuple[list[Frame], list[float]]:
    """At most so many structures of dynamics that start from the frames, and the temperatures, K.

    The teachers take turns.
    """
    starts = evenly([item.atoms for item in data.train if len(item.graph.edge_src)], most)
    calculators = [SEGNNCalculator(potential, domain="ignore", device=str(potential.device)) for potential in teachers]
    frames, temperatures = [], []
    for n, start in enumerate(starts):
        rng, calculator = np.random.default_rng([seed, n]), calculators[n % len(teachers)]
        temperature = configurational_temperature(start, calculator, rng)
        copies = most * (n + 1) // len(starts) - most * n // len(starts)
        for atoms in moved(start, calculator, temperature, copies, data.closest, rng):
            frames.append(Frame(atoms, None, None, None, f"dynamics from frame {n}", (None, None, None)))
        temperatures.append(temperature)
    return frames, temperatures


def configurational_temperature(start: Atoms, calculator: SEGNNCalculator, rng: np.random.Generator) -> float:
    """Squared forces over the Laplacian of the energy, K, within bounds: the temperature of a structure in equilibrium.

    Butler et al., J. Chem. Phys. 109, 6519 (1998), eq. 4; the Laplacian is the mean curvature in random directions.
    """
    atoms = bare(start)
    atoms.calc = calculator
    squared, curvature = float(np.sum(atoms.get_forces() ** 2)), 0.0
    for _ in range(PROBES):
        direction = rng.choice([-1.0, 1.0], size=atoms.positions.shape)
        change = np.zeros_like(direction)
        for sign in (1.0, -1.0):
            atoms.positions = start.positions + sign * DISPLACED * direction
            change -= sign * atoms.get_forces()
        curvature += float(np.sum(direction * change)) / (2 * DISPLACED * PROBES)
    return float(np.clip(squared / (units.kB * curvature), COLDEST, HOTTEST)) if curvature > 0 else COLDEST


def moved(
    start: Atoms,
    calculator: SEGNNCalculator,
    temperature: float,
    copies: int,
    closest: dict[tuple[int, int], float],
    rng: np.random.Generator,
) -> Iterator[Atoms]:
    """So many structures of Langevin dynamics, fewer where it fails or atoms meet."""
    atoms = bare(start)
    atoms.calc = calculator
    dynamics = dynamics_of(atoms, usual_timestep(atoms), temperature, FRICTION, rng)
    for _ in range(copies):
        try:
            dynamics.run(STEPS)
        except (SEGNNError, np.linalg.LinAlgError):
            return
        if not np.isfinite(atoms.positions).all() or nearest_of(atoms, closest) < CONTACT:
            return
        yield bare(atoms)


def bare(atoms: Atoms) -> Atoms:
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def agreed(frames: list[Frame], teachers: list[Potential], accelerate: str) -> list[Frame]:
    """The structures with the mean of what the teachers say, without those on which they disagree more than usual."""
    if not frames:
        return []
    items = [make_item(frame, teachers[0].cutoff) for frame in frames]
    evaluators = [evaluator_of(potential, items, accelerate) for potential in teachers]
    labelled, spreads = [], []
    for frame, item in zip(frames, items, strict=True):
        said = [evaluate(item.graph, forces=True, stress=bool(item.atoms.pbc.all())) for evaluate in evaluators]
        forces, spread = mean_of([p.forces for p in said])
        stress = None if said[0].stress is None else mean_of([p.stress for p in said])[0][0]
        energy = float(mean_of([p.energy for p in said])[0][0])
        labelled.append(frame._replace(energy=energy, forces=forces, stress=stress))
        spreads.append(spread)
    most = DISAGREED * float(np.median(spreads)) if len(teachers) > 1 else math.inf
    return [frame for frame, spread in zip(labelled, spreads, strict=True) if spread <= most]


def mean_of(said: list[Tensor]) -> tuple[np.ndarray, float]:
    """The mean, and the root mean square of the deviations from it."""
    values = np.stack([x.detach().double().numpy() for x in said])
    return values.mean(axis=0), float(np.sqrt(values.var(axis=0).mean()))
