"""What `verify` works on: a structure with its calculators, the sizes of its terms, and a short trajectory."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress

from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.certificate import Check
from segnn_ase.config import SEGNNError
from segnn_ase.domain import Outside
from segnn_ase.ensembles import set_velocities
from segnn_ase.graph import graph_from_arrays, within
from segnn_ase.neighbors import Neighbors
from segnn_ase.potential import Prediction, predict

TEMPERATURE = 300.0  # K
FLUCTUATION, HALVINGS = 3e-4, 6  # eV/atom, of the energy of velocity Verlet; of the time step, to reach it


class Sizes(NamedTuple):
    """Something for each of energy (eV), forces (eV/Å) and stress (eV/Å^3)."""

    energy: float
    forces: float
    stress: float

    def times(self, other: "Sizes") -> "Sizes":
        return Sizes(*(a * b for a, b in zip(self, other, strict=True)))


UNITS = Sizes("eV", "eV/Å", "eV/Å³")
RELATIVE = {torch.float64: Sizes(1e-11, 1e-9, 1e-10), torch.float32: Sizes(3e-6, 1e-4, 1e-5)}


class State(NamedTuple):
    energy: float  # eV
    energies: np.ndarray  # (N,) eV
    forces: np.ndarray  # (N, 3) eV/Å
    stress: np.ndarray | None  # (3, 3) eV/Å^3


class Run(NamedTuple):
    """A short trajectory at constant energy."""

    timestep: float  # fs
    energy: np.ndarray  # (steps,) eV
    shadow: np.ndarray  # (steps,) eV, what velocity Verlet itself conserves, to fourth order in the time step
    temperature: np.ndarray  # (steps,) K
    memory: np.ndarray  # (steps,) bytes, 0 where it cannot be read
    ms_per_step: float  # median
    problem: str


class Subject(NamedTuple):
    """What is verified: a structure, the calculator in use, and its twin in float64."""

    atoms: Atoms
    make: Callable[..., SEGNNCalculator]
    calc: SEGNNCalculator
    double: SEGNNCalculator
    here: State  # of the structure, by `calc`
    sizes: Sizes
    run: Run
    outside: list[Outside] | None  # of the training data; None where they are not known
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return self.calc.potentials[0].dtype

    @property
    def tolerance(self) -> Sizes:
        return self.sizes.times(RELATIVE[self.dtype])

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def some(self, most: int, least: int = 2) -> int:
        """How many samples a structure of this size gets."""
        return int(np.clip(1600 // len(self.atoms), least, most))


def state_of(calc: SEGNNCalculator, atoms: Atoms) -> State:
    atoms = atoms.copy()
    atoms.calc = calc
    forces = atoms.get_forces()
    stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else None
    return State(atoms.get_potential_energy(), atoms.get_potential_energies(), forces, stress)


def states_of(calc: SEGNNCalculator, structures: Sequence[Atoms]) -> list[State]:
    """The same by `evaluate`: without skin and cache."""
    out = []
    for results in calc.evaluate(structures, ("energy", "forces", "stress")):
        stress = voigt_6_to_full_3x3_stress(results["stress"]) if "stress" in results else None
        out.append(State(results["energy"], results["energies"], results["forces"], stress))
    return out


def energies_of(calc: SEGNNCalculator, atoms: Atoms) -> np.ndarray:
    atoms.calc = calc
    return atoms.get_potential_energies()


def predicted(calc: SEGNNCalculator, atoms: Atoms, pairs: Neighbors) -> list[Prediction]:
    """Every member's prediction with given pairs."""
    graph = graph_from_arrays(atoms.numbers, atoms.positions, atoms.cell.array, pairs).to(calc.device)
    stress = bool(atoms.pbc.all())
    return [predict(p, within(graph, p.cutoff), forces=True, stress=stress) for p in calc.potentials]


def sizes_of(calc: SEGNNCalculator, atoms: Atoms, here: State) -> Sizes:
    pairs = calc.get_pairs(atoms)
    predictions = predicted(calc, atoms, pairs)
    scale = max(max(p.scales) for p in calc.potentials)
    push = max([scale, *(float(p.edge_gradients.abs().max()) for p in predictions if len(p.edge_gradients))])
    network = max(scale, float(np.abs(here.energies - references(calc, atoms.numbers)).max()))
    volume = atoms.get_volume() if atoms.pbc.all() else math.nan
    stress = push * calc.potentials[0].cutoff * max(len(pairs.i), 1) ** 0.5 / volume
    return Sizes(network * len(atoms), push, stress)


def references(calc: SEGNNCalculator, numbers: np.ndarray) -> np.ndarray:
    """E0 of atoms, (N,) eV, mean of the members."""
    tables = [dict(zip(p.species, p.reference_energies, strict=True)) for p in calc.potentials]
    return np.array([np.mean([table[z] for table in tables]) for z in numbers.tolist()])


def judged(name: str, value: float, tolerance: float, unit: str, note: str = "") -> Check:
    return Check(name, float(value), float(tolerance), unit, bool(value <= tolerance), note)


def without(name: str, note: str) -> Check:
    return Check(name, None, None, "", None, note)


def compared(name: str, pairs: Iterable[tuple[State, State]], tolerance: Sizes, note: str = "") -> list[Check]:
    """Largest differences of energies, forces and, where it is defined, stress."""
    pairs, lines = list(pairs), []
    for quantity, limit, unit in zip(Sizes._fields, tolerance, UNITS, strict=True):
        ends = [(getattr(a, quantity), getattr(b, quantity)) for a, b in pairs]
        values = [np.abs(np.subtract(a, b)).max() for a, b in ends if a is not None and b is not None]
        if values:
            lines.append(judged(f"{name}, {quantity}", np.max(values), limit, unit, note))
    return lines


def moved(atoms: Atoms, matrix: np.ndarray, shift=(0.0, 0.0, 0.0)) -> Atoms:
    """r -> matrix r + shift, the lattice too."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ matrix.T)
    atoms.positions = atoms.positions @ matrix.T + np.asarray(shift)
    return atoms


def timestep_for(atoms: Atoms, forces: np.ndarray) -> float:
    """fs: 0.25 for hydrogen and longer for heavier atoms; shorter where the first step would be a leap."""
    masses = atoms.get_masses()
    push = (np.linalg.norm(forces, axis=1) / masses).max() * units.fs**2  # Å/fs^2
    return float(min(0.25 * (masses.min() / 1.008) ** 0.5, 2.0, (0.005 / max(push, 1e-9)) ** 0.5))


def constant_energy_run(calc: SEGNNCalculator, atoms: Atoms, steps: int, seed: int) -> Run:
    """A trajectory with time steps short enough for what happens in it: a structure under stress gets hot.

    They are halved until what velocity Verlet makes of the energy is small and known, or that no longer helps.
    """
    atoms = atoms.copy()
    atoms.calc = calc
    timestep = timestep_for(atoms, atoms.get_forces())
    set_velocities(atoms, TEMPERATURE, np.random.default_rng(seed))
    before = math.inf
    for _ in range(HALVINGS):
        run = _trajectory(atoms.copy(), calc, timestep, steps)
        known, rest = (run.shadow - run.energy).std(), run.shadow.std()
        if (known <= FLUCTUATION * len(atoms) and rest <= 0.1 * known) or rest > before / 1.5:
            break
        timestep, before = timestep / 2, rest if not run.problem else math.inf
    return run


def _trajectory(atoms: Atoms, calc: SEGNNCalculator, timestep: float, steps: int) -> Run:
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
    return Run(timestep, *columns, float(np.median(ms)), problem)


def held_bytes(device: torch.device) -> float:
    """Bytes that the process holds, on the GPU too; 0 where that cannot be read."""
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0.0
    statistics = Path("/proc/self/statm")
    return held + (int(statistics.read_text().split()[1]) * 4096.0 if statistics.exists() else 0.0)
