"""A short trajectory at constant energy, with time steps short enough for what happens in it."""

import math
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from segnn_ase.base.errors import SEGNNError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.md.velocities import set_velocities

TEMPERATURE = 300.0  # K
FLUCTUATION, HALVINGS = 3e-4, 6  # eV/atom, of the energy of velocity Verlet; of the time step, to reach it


class EnergyRun(NamedTuple):
    """A short trajectory at constant energy."""

    timestep: float  # fs
    energy: np.ndarray  # (steps,) eV
    shadow: np.ndarray  # (steps,) eV, what velocity Verlet itself conserves, to fourth order in the time step
    temperature: np.ndarray  # (steps,) K
    memory: np.ndarray  # (steps,) bytes, 0 where it cannot be read
    ms_per_step: float  # median
    problem: str


def timestep_for(atoms: Atoms, forces: np.ndarray) -> float:
    """fs: 0.25 for hydrogen and longer for heavier atoms; shorter where the first step would be a leap."""
    masses = atoms.get_masses()
    push = (np.linalg.norm(forces, axis=1) / masses).max() * units.fs**2  # Å/fs^2
    return float(min(0.25 * (masses.min() / 1.008) ** 0.5, 2.0, (0.005 / max(push, 1e-9)) ** 0.5))


def constant_energy_run(calc: SEGNNCalculator, atoms: Atoms, steps: int, seed: int) -> EnergyRun:
    """A trajectory with time steps short enough for what happens in it: a structure under stress gets hot.

    They are halved until what velocity Verlet makes of the energy is small and known, or that no longer helps.
    """
    atoms = atoms.copy()
    atoms.calc = calc
    timestep = timestep_for(atoms, atoms.get_forces())
    set_velocities(atoms, TEMPERATURE, np.random.default_rng(seed))
    before = math.inf
    for _ in range(HALVINGS):
        run = _conserving_run(atoms.copy(), calc, timestep, steps)
        known, rest = (run.shadow - run.energy).std(), run.shadow.std()
        if (known <= FLUCTUATION * len(atoms) and rest <= 0.1 * known) or rest > before / 1.5:
            break
        timestep, before = timestep / 2, rest if not run.problem else math.inf
    return run


def _conserving_run(atoms: Atoms, calc: SEGNNCalculator, timestep: float, steps: int) -> EnergyRun:
    """Velocity Verlet, with the energy that it conserves to fourth order in the time step h, its shadow Hamiltonian:

    H + h^2 (v K v / 12 - F M^-1 F / 24), K v = -dF/dt (Hairer, Lubich, Wanner, Geometric Numerical Integration, IX).
    """
    atoms.calc = calc
    h, masses = timestep * units.fs, atoms.get_masses()[:, None]
    dynamics, recent, rows, problem = VelocityVerlet(atoms, h), deque(maxlen=3), [], ""
    try:
        for _ in range(steps + 2):
            dynamics.step()
            now = (atoms.get_total_energy(), atoms.get_temperature(), atoms.get_velocities(), atoms.get_forces())
            recent.append((*now, held_bytes(calc.device), time.perf_counter()))
            if len(recent) == 3:
                (_, _, _, before, *_), (energy, temperature, v, f, memory, began), (_, _, _, after, _, ended) = recent
                term = -(v * (after - before)).sum() / (2 * h) / 12 - (f * f / masses).sum() / 24
                rows.append((energy, energy + h * h * term, temperature, memory, 1000 * (ended - began)))
    except (SEGNNError, np.linalg.LinAlgError) as error:
        problem = str(error)
    if not problem and not np.isfinite(rows).all():
        problem = "energies are not finite"
    *columns, ms = np.array(rows or [[math.nan] * 5]).T
    return EnergyRun(timestep, *columns, float(np.median(ms)), problem)


def held_bytes(device: torch.device) -> float:
    """Bytes that the process holds, on the GPU too; 0 where that cannot be read."""
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0.0
    statistics = Path("/proc/self/statm")
    return held + (int(statistics.read_text().split()[1]) * 4096.0 if statistics.exists() else 0.0)
