"""`Subject`: what is verified; `State`: what a calculator makes of a structure; and how two of them are compared."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from segnn_ase.base.devices import resolve_dtype
from segnn_ase.base.errors import AccelerationWarning
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.compiled.choose import choose_evaluator
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction
from segnn_ase.structure.cue_settings import FIELD, Cue
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import graph_from_arrays, graph_from_atoms
from segnn_ase.structure.ions import pull_on_charge
from segnn_ase.structure.neighbors import Neighbors
from segnn_ase.trust.domain import Outside
from segnn_ase.verify.certificate import Check
from segnn_ase.verify.trajectory import EnergyRun


class Sizes(NamedTuple):
    """Something for each of energy (eV), forces (eV/Å) and stress (eV/Å^3)."""

    energy: float
    forces: float
    stress: float

    def times(self, other: "Sizes") -> "Sizes":
        return Sizes(*(a * b for a, b in zip(self, other, strict=True)))


PLAIN = "plain PyTorch"
UNITS = Sizes("eV", "eV/Å", "eV/Å³")
RELATIVE = {torch.float64: Sizes(1e-11, 1e-9, 1e-10), torch.float32: Sizes(3e-6, 1e-4, 1e-5)}


class State(NamedTuple):
    energy: float  # eV
    energies: np.ndarray  # (N,) eV
    forces: np.ndarray | None  # (N, 3) eV/Å
    stress: np.ndarray | None  # (3, 3) eV/Å^3


class Parts(NamedTuple):
    """The members of a calculator, as copies: whoever asks it for its own must expect it to look after them."""

    potentials: list[Potential]
    evaluators: list[Evaluator]  # for graphs that are none of the calculator's

    @property
    def cutoff(self) -> float:
        """Å, of the first one."""
        return self.potentials[0].cutoff

    def references(self, numbers: np.ndarray) -> np.ndarray:
        """E0 of atoms, (N,) eV, mean of the members."""
        tables = [dict(zip(p.species, p.reference_energies, strict=True)) for p in self.potentials]
        return np.array([np.mean([table[z] for table in tables]) for z in numbers.tolist()])

    def predict(self, atoms: Atoms, pairs: Neighbors) -> list[Prediction]:
        """Every member's prediction with given pairs."""
        graph = graph_from_arrays(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, pairs)
        graph = told(graph.to(self.potentials[0].device), atoms, self.potentials[0].config.cues)
        return [evaluate(graph, forces=True, stress=bool(atoms.pbc.all())) for evaluate in self.evaluators]


class Subject(NamedTuple):
    """What is verified: a structure, the calculator in use, its twin in float64, and what it is made of."""

    atoms: Atoms
    make: Callable[..., SEGNNCalculator]
    calc: SEGNNCalculator
    double: SEGNNCalculator
    parts: Parts
    here: State  # of the structure, by `calc`
    sizes: Sizes
    run: EnergyRun
    outside: list[Outside] | None  # of the training data; None where they are not known
    seed: int
    dispersion: str | None = None  # that is added in use; the calculators here are without it

    @property
    def cues(self) -> tuple[Cue, ...]:
        """What the potential is told."""
        return self.parts.potentials[0].config.cues

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.potentials[0].dtype

    @property
    def tolerance(self) -> Sizes:
        return self.sizes.times(RELATIVE[self.dtype])

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def some(self, most: int, least: int = 2) -> int:
        """How many samples a structure of this size gets."""
        return int(np.clip(1600 // len(self.atoms), least, most))


def code_of(calc: SEGNNCalculator) -> str:
    """What evaluates the members, once the calculator has made up its mind."""
    return ", ".join(dict.fromkeys(calc.evaluators)) or PLAIN


def parts_of(calc: SEGNNCalculator, models: Sequence[Potential], atoms: Atoms, options: dict) -> Parts:
    """What a calculator made of these models with these options consists of."""
    dtype = resolve_dtype(options["dtype"])
    potentials = [copy.deepcopy(p).to(device=calc.device, dtype=dtype or p.dtype).eval() for p in models]
    graph = graph_from_atoms(atoms, max(p.cutoff for p in potentials)).to(calc.device)
    graph = told(graph, atoms, potentials[0].config.cues)
    mode = "off" if code_of(calc) == PLAIN else options["accelerate"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)  # the calculator has said so
        return Parts(potentials, [choose_evaluator(p, graph, mode, tables=True) for p in potentials])


def state_of(calc: SEGNNCalculator, atoms: Atoms) -> State:
    """What the network says: without what a field does to a net charge as a whole."""
    atoms = atoms.copy()
    atoms.calc = calc
    forces = atoms.get_forces()
    stress = atoms.get_stress() if atoms.pbc.all() else None
    energy, energies = atoms.get_potential_energy(), atoms.get_potential_energies()
    return _state({"energy": energy, "energies": energies, "forces": forces, "stress": stress}, calc, atoms)


def _state(results: dict, calc: SEGNNCalculator, atoms: Atoms) -> State:
    added = pull_on(calc, atoms)
    energy, energies, forces = (results[name] - added.get(name, 0.0) for name in ("energy", "energies", "forces"))
    stress = results.get("stress")
    return State(energy, energies, forces, None if stress is None else voigt_6_to_full_3x3_stress(stress))


def pull_on(calc: SEGNNCalculator, atoms: Atoms) -> dict:
    """What a net charge in a field adds to results, of structures that say which field they are in."""
    return pull_on_charge(atoms, calc.cues, atoms.info.get(FIELD) if FIELD in calc.told_names else None)


def states_of(calc: SEGNNCalculator, structures: Sequence[Atoms]) -> list[State]:
    """The same by `evaluate`: without skin and cache."""
    found = calc.evaluate(structures, ("energy", "forces", "stress"))
    return [_state(results, calc, atoms) for results, atoms in zip(found, structures, strict=True)]


def energies_of(calc: SEGNNCalculator, atoms: Atoms) -> np.ndarray:
    atoms.calc = calc
    return atoms.get_potential_energies() - pull_on(calc, atoms).get("energies", 0.0)


def sizes_of(parts: Parts, atoms: Atoms, pairs: Neighbors, here: State) -> Sizes:
    scale = max(max(p.scales) for p in parts.potentials)
    gradients = [p.edge_gradients for p in parts.predict(atoms, pairs)]
    push = max([scale, *(float(g.abs().max()) for g in gradients if len(g))])
    network = max(scale, float(np.abs(here.energies - parts.references(atoms.numbers)).max()))
    volume = atoms.get_volume() if atoms.pbc.all() else math.nan
    stress = push * parts.cutoff * max(len(pairs.i), 1) ** 0.5 / volume
    return Sizes(network * len(atoms), push, stress)


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
