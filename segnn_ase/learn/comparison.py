"""The potential beside its reference: equation of state, vibrations, and the ensemble that the reference would have."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.eos import EquationOfState

from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.labelled import CONDITION, KEY, asked_frame
from segnn_ase.learn.labeller import Labeller
from segnn_ase.md.analysis import radial_distribution

VOLUMES = np.linspace(0.94, 1.06, 7)  # of the structure's own
MODES, LARGEST = 20, 300  # that are looked at, at most, of structures of so many atoms
STEP = 0.01  # Å, by which the atom that moves farthest is displaced
FARTHEST, BINS = 6.0, 60  # Å of g(r), and how many
PAIRS = 6  # of elements
WAVENUMBER = units._hbar * 1e10 / np.sqrt(units._e * units._amu) / units.invcm  # cm^-1 of sqrt(eV/Å^2/amu)


class State(NamedTuple):
    """The minimum of an equation of state."""

    volume: float  # Å^3/atom
    bulk_modulus: float  # GPa


class Ensemble(NamedTuple):
    """Frames of the potential's dynamics at a condition, and what the reference would make of them."""

    condition: str
    frames: int
    effective: float  # of them, when each is weighed as often as the reference would visit it
    shift: float  # meV/atom, of the mean energy, when they are weighed
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # pair: r (Å), g of the reference, of the potential


class Compared(NamedTuple):
    """The same by both; the reference first."""

    states: tuple[State, State] | None
    modes: np.ndarray  # (n, 2) cm^-1; below zero: imaginary
    ensembles: list[Ensemble]


def compare_states(atoms: Atoms, calculator: SEGNNCalculator, labeller: Labeller, key: str) -> tuple | None:
    """Of a structure that is scaled at fixed fractional coordinates, by Birch and Murnaghan; None where the minimum is
    not among these volumes, or labels are missing."""
    frames = []
    for n, factor in enumerate(VOLUMES):
        scaled = atoms.copy()
        scaled.set_constraint()
        scaled.set_cell(atoms.cell.array * factor ** (1 / 3), scale_atoms=True)
        frames.append(asked_frame(scaled, f"{key}/volume/{n}", 0, "", "comparison: volume"))
    known = labeller.label(frames)
    if len(known) < len(frames):
        return None
    volumes = np.array([frame.get_volume() for frame in known])
    own = [each["energy"] for each in calculator.evaluate([frame.copy() for frame in known], ("energy",))]
    reference = [frame.get_potential_energy() for frame in known]
    states = [state_of(volumes, np.array(energies), len(atoms)) for energies in (reference, own)]
    return None if None in states else tuple(states)


def state_of(volumes: np.ndarray, energies: np.ndarray, atoms: int) -> State | None:
    """Volumes (n,) Å^3 and energies (n,) eV of so many atoms."""
    if not volumes[0] < volumes[int(np.argmin(energies))] < volumes[-1]:
        return None
    volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit(warn=False)
    return State(volume / atoms, modulus / units.GPa)


def compare_modes(atoms: Atoms, calculator: SEGNNCalculator, labeller: Labeller, key: str, count: int) -> np.ndarray:
    """Wavenumbers (n, 2) by both, along so many modes of the potential, evenly from its lowest to its highest, each by
    a central difference of forces: of the reference it is the mean curvature in that direction."""
    directions = modes_of(atoms, calculator, min(count, MODES)) if count else np.zeros((0, len(atoms), 3))
    frames: list[Atoms] = []
    for n, direction in enumerate(directions):
        for sign in (1, -1):
            moved = atoms.copy()
            moved.set_positions(atoms.positions + sign * step_of(direction) * direction, apply_constraint=False)
            frames.append(asked_frame(moved, f"{key}/mode/{n}{'+' if sign > 0 else '-'}", 0, "", "comparison: mode"))
    labeller.label(frames)
    pairs = [labeller.labelled.of([f.info[KEY] for f in frames[2 * n : 2 * n + 2]]) for n in range(len(directions))]
    found = []
    for direction, pair in zip(directions, pairs, strict=True):
        if len(pair) == 2:
            own = calculator.evaluate([frame.copy() for frame in pair], ("forces",))
            forces = [[frame.get_forces() for frame in pair], [each["forces"] for each in own]]
            found.append([wavenumber(direction, *two) for two in forces])
    return np.array(found).reshape(-1, 2)


def modes_of(atoms: Atoms, calculator: SEGNNCalculator, count: int) -> np.ndarray:
    """Directions (n, N, 3), Å/sqrt(amu), of modes that are orthonormal when weighted with the masses; atoms that are
    fixed stay, and what moves the whole is left out."""
    fixed = [c.index for c in atoms.constraints if isinstance(c, FixAtoms)]
    free = np.setdiff1d(np.arange(len(atoms)), np.concatenate(fixed) if fixed else [])
    root = np.repeat(np.sqrt(atoms.get_masses()[free]), 3)
    chosen = (3 * free[:, None] + np.arange(3)).ravel()
    alone = atoms.copy()
    alone.set_constraint()
    hessian = calculator.get_hessian(alone)[np.ix_(chosen, chosen)] / np.outer(root, root)
    basis = np.eye(len(chosen))
    if len(free) == len(atoms):
        left, size, _ = np.linalg.svd(rigid_motions(atoms) * root[:, None], full_matrices=True)
        basis = left[:, int((size > 1e-6 * size[0]).sum()) :]
    _, vectors = np.linalg.eigh(basis.T @ hessian @ basis)
    vectors = basis @ vectors
    numbers = np.unique(np.linspace(0, vectors.shape[1] - 1, count).round().astype(int))
    found = np.zeros((len(numbers), len(atoms), 3))
    found[:, free] = (vectors[:, numbers] / root[:, None]).T.reshape(len(numbers), len(free), 3)
    return found


def rigid_motions(atoms: Atoms) -> np.ndarray:
    """Displacements (3N, 3 or 6) of the whole: turned where nothing is periodic."""
    moved = np.tile(np.eye(3), (len(atoms), 1))
    if atoms.pbc.any():
        return moved
    arms = atoms.positions - atoms.positions.mean(0)
    return np.hstack([moved, np.cross(np.eye(3)[None], arms[:, None]).transpose(0, 2, 1).reshape(-1, 3)])


def step_of(direction: np.ndarray) -> float:
    return STEP / float(np.linalg.norm(direction, axis=1).max())


def wavenumber(direction: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> float:
    """cm^-1, below zero where it is imaginary, from the forces (N, 3) at both ends of a step."""
    curvature = float(np.sum(direction * (backward - forward))) / (2 * step_of(direction))
    return float(np.sign(curvature) * np.sqrt(abs(curvature)) * WAVENUMBER)


def compare_ensembles(
    frames: Sequence[Atoms], said: Sequence[dict[str, Any]], temperatures: dict[str, float]
) -> list[Ensemble]:
    """What the reference makes of labelled frames of the potential's dynamics, by condition: they are weighed by
    exp(-(E_reference - E_potential) / kT) (Zwanzig, J. Chem. Phys. 22, 1420 (1954)).

    said: energies of the potential; temperatures: K, by name of the condition.
    """
    found = []
    for name, kelvin in temperatures.items():
        mine = [n for n, frame in enumerate(frames) if frame.info[CONDITION] == name]
        if len(mine) < 2:
            continue
        own = np.array([said[n]["energy"] for n in mine])
        weights = weights_of(np.array([frames[n].get_potential_energy() for n in mine]) - own, kelvin)
        atoms = len(frames[mine[0]])
        shift = 1e3 * float(weights @ (own - own.mean())) / atoms
        curves = curves_of([frames[n] for n in mine], weights)
        found.append(Ensemble(name, len(mine), float(1 / np.sum(weights**2)), shift, curves))
    return found


def weights_of(off: np.ndarray, kelvin: float) -> np.ndarray:
    """Of frames (n,) whose energies are off by this (n,), eV; they add up to one."""
    weights = np.exp(-(off - off.min()) / (units.kB * kelvin))
    return weights / weights.sum()


def curves_of(frames: Sequence[Atoms], weights: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """g(r) of pairs of elements by the reference and by the potential, of what is periodic in three directions."""
    if not frames[0].pbc.all():
        return {}
    symbols = sorted(set(frames[0].get_chemical_symbols()))
    pairs = [f"{a}-{b}" for n, a in enumerate(symbols) for b in symbols[n:]][:PAIRS]
    both = [radial_distribution(frames, pairs, FARTHEST, BINS, weights=w) for w in (weights, None)]
    return {pair: (*both[0][pair], both[1][pair][1]) for pair in pairs}
