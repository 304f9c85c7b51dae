"""Short dynamics of a potential under training: small errors on frames do not tell whether a simulation holds.

Two rollouts from a labelled frame: constant energy at a temperature, and Langevin dynamics at twice that, in which
holes of the energy surface are found. A run is over when atoms meet, heat up out of proportion, or cannot be evaluated.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.verlet import VelocityVerlet

from segnn_ase.base.errors import AccelerationWarning, SEGNNError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.batches import Item
from segnn_ase.md.velocities import set_velocities
from segnn_ase.model.potential import Potential
from segnn_ase.structure.neighbors import neighbor_list
from segnn_ase.structure.told import standing
from segnn_ase.train.job import TrainingData
from segnn_ase.train.settings import OptimConfig

HOT = 2.0  # times the temperature
EXPLODED = 5.0  # times the temperature that it should have
CONTACT = 0.7  # of the shortest distance of a pair in training
FRICTION = 0.02  # 1/fs
TIMES = 5  # during a training, where nothing else is said
LOOKS = 20  # at distances, during a rollout
TIMESTEPS = (0.5, 2.0)  # fs, for hydrogen and for heavy atoms


class Stability(NamedTuple):
    """What became of the two rollouts."""

    nve_ps: float  # survived
    nve_drift: float  # eV/atom/ps, of the total energy; NaN if it ended at once
    hot_ps: float  # survived
    closest: float  # the shortest distance met, as a part of the shortest of its pair in training
    survived: float  # part of the time that was planned, of the shorter-lived of the two


class Trajectory(NamedTuple):
    survived: int  # steps
    energies: np.ndarray  # (survived + 1,) eV, total
    closest: float  # see `Stability`


def usual_timestep(atoms: Atoms) -> float:
    """A usual time step, fs: 0.5 with hydrogen, longer with the square root of the smallest mass."""
    return float(np.clip(0.5 * math.sqrt(atoms.get_masses().min()), *TIMESTEPS))


def stability(
    potential: Potential,
    atoms: Atoms,
    closest: dict[tuple[int, int], float],
    *,
    steps: int,
    temperature: float,
    seed: int = 0,
    accelerate: str = "auto",
) -> Stability:
    """Let a copy of the atoms move, `steps` of each rollout; temperature in K.

    closest: shortest distances in training by pairs of atomic numbers, Å. Neither potential nor atoms are changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)  # said when the training began
        calculator = SEGNNCalculator(potential, accelerate=accelerate, domain="ignore", device=str(potential.device))
        timestep = usual_timestep(atoms)
        runs = []
        for heat, friction in ((1.0, None), (HOT, FRICTION)):
            mine = standing(atoms)
            mine.calc = calculator
            rng = np.random.default_rng(seed)
            dynamics = dynamics_of(mine, timestep, heat * temperature, friction, rng)
            runs.append(_follow(dynamics, mine, steps, EXPLODED * heat * temperature, closest))
    nve, hot = runs
    ps = timestep / 1000
    time = ps * np.arange(len(nve.energies))
    drift = math.nan if nve.survived < 2 else float(np.polyfit(time, nve.energies, 1)[0]) / len(atoms)
    least = min(nve.survived, hot.survived) / steps
    return Stability(nve.survived * ps, drift, hot.survived * ps, min(nve.closest, hot.closest), least)


def dynamics_of(atoms: Atoms, timestep: float, temperature: float, friction, rng) -> MolecularDynamics:
    set_velocities(atoms, temperature, rng)
    if friction is None:
        return VelocityVerlet(atoms, timestep * units.fs)
    friction = friction / units.fs
    return Langevin(atoms, timestep * units.fs, temperature_K=temperature, friction=friction, fixcm=False, rng=rng)


def _follow(dynamics: MolecularDynamics, atoms: Atoms, steps: int, hottest: float, closest: dict) -> Trajectory:
    """Run until something is wrong, or to the end."""
    energies, nearest, every = [], math.inf, max(steps // LOOKS, 1)
    for step in range(steps + 1):
        try:
            if step:
                dynamics.step()
            energies.append(atoms.get_total_energy())
        except (SEGNNError, np.linalg.LinAlgError):
            break
        if step % every == 0:
            nearest = min(nearest, nearest_of(atoms, closest))
        # a frame that is far from rest heats up by itself at first
        if not math.isfinite(energies[-1]) or nearest < CONTACT or (step and atoms.get_temperature() > hottest):
            break
    else:
        return Trajectory(steps, np.array(energies), nearest)
    return Trajectory(max(step - 1, 0), np.array(energies[:step]), nearest)


def nearest_of(atoms: Atoms, closest: dict[tuple[int, int], float]) -> float:
    """The smallest ratio of a distance to the shortest of its pair in training; infinite without such pairs."""
    if not closest:
        return math.inf
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, max(closest.values()))
    distances = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array, axis=1)
    a, b = np.sort([atoms.numbers[i], atoms.numbers[j]], axis=0)
    known = np.array([closest.get((int(p), int(q)), 0.0) for p, q in zip(a, b, strict=True)])
    ratio = distances[known > 0] / known[known > 0]
    return float(ratio.min()) if len(ratio) else math.inf


def start_of_rollouts(data: TrainingData, seed: int) -> Item | None:
    """Where short dynamics begin; None where no held-out frame can move."""
    starts = [item for item in data.held_out if len(item.atoms) > 1]
    return starts[np.random.default_rng(seed).integers(len(starts))] if starts else None


def rollouts(
    averaged: Potential, data: TrainingData, settings: OptimConfig, history: list[dict], *, epoch: int, epochs: float
) -> dict:
    """Short dynamics from a validation frame, always the same one, where they are due; None where they are not."""
    every = settings.rollout_every or max(epochs // TIMES, 1)
    last = max((row["epoch"] for row in history if row["survived"] is not None), default=0)
    due = epoch // every > last // every or epoch == epochs
    start = start_of_rollouts(data, settings.seed)
    if not (settings.rollout_steps and due and start and averaged.config.smooth):
        return dict.fromkeys(Stability._fields)
    found = stability(
        averaged,
        start.atoms,
        data.closest,
        steps=settings.rollout_steps,
        temperature=settings.rollout_temperature,
        seed=settings.seed,
        accelerate="off" if settings.accelerate == "off" else "auto",
    )
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
