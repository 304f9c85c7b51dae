"""The potential beside its reference: equation of state, vibrations, and the ensemble that the reference would have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.eos import EquationOfState

from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.choice import distinct, evenly_spaced, is_sane, relaxed_from
from segnn_ase.learn.explore import Ran
from segnn_ase.learn.labelled import CONDITION, KEY, asked_frame, decided
from segnn_ase.learn.labeller import Labeller
from segnn_ase.md.analysis import radial_distribution

VOLUMES = np.linspace(0.93, 1.07, 8)  # of the structure's own, which is known
MODES, LARGEST = 20, 200  # that are looked at, at most, of structures of so many atoms
RIGID = 1e-3  # of the largest singular value: what is less turns a line about itself
NO_ROUND = -1
EMPTY = 5.0  # Å without an atom
FMAX, LONGEST = 2e-3, 1000  # eV/Å, and steps, to a minimum: where forces are larger, there are slopes, too
STEP = 0.01  # Å, by which the atom that moves farthest is displaced
FARTHEST, BINS = 6.0, 60  # Å of g(r), and how many
PAIRS = 6  # of elements
WAVENUMBER = units._hbar * 1e10 / np.sqrt(units._e * units._amu) / units.invcm  # cm^-1 of sqrt(eV/Å^2/amu)


class Minimum(NamedTuple):
    """The minimum of an equation of state."""

    volume: float  # Å^3/atom
    bulk_modulus: float  # GPa


class Reweighted(NamedTuple):
    """Frames of the potential's dynamics at a condition, and what the reference would make of them."""

    condition: str
    frames: int
    effective: float  # of them, when each is weighed as often as the reference would visit it
    shift: float  # meV/atom, of the mean energy, when they are weighed
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # pair: r (Å), g of the reference, of the potential


class Relaxed(NamedTuple):
    """Minima of the potential in the cells of frames of its dynamics, and what the reference says of them."""

    frames: int
    forces: float  # meV/Å (rms), by which those of the potential are off
    off: float  # meV (rms), by which its energies are off, apart from their mean
    spread: float  # meV (rms), of the reference's energies about their mean


class Compared(NamedTuple):
    """The same by both; the reference first."""

    minima: tuple[Minimum, Minimum] | None
    modes: np.ndarray  # (n, 2) cm^-1; below zero: imaginary
    relaxed: Relaxed | None
    ensembles: list[Reweighted]


def compare_volumes(
    atoms: Atoms, calculator: SEGNNCalculator, labeller: Labeller, folder: Path
) -> tuple[Minimum, Minimum] | None:
    """Of a structure that is scaled at fixed fractional coordinates, by Birch and Murnaghan; None where the minimum is
    not among these volumes, or labels are missing."""
    frames = decided(folder / "volumes.xyz", lambda: scaled_frames(atoms, f"{folder.name}/volume"))
    known = labelled_if_possible(labeller, frames)
    if len(known) < len(frames):
        return None
    volumes = np.array([frame.get_volume() for frame in known])
    own = [each["energy"] for each in calculator.evaluate([frame.copy() for frame in known], ("energy",))]
    reference = [frame.get_potential_energy() for frame in known]
    minima = [minimum_of(volumes, np.array(energies), len(atoms)) for energies in (reference, own)]
    return None if minima[0] is None or minima[1] is None else (minima[0], minima[1])


def has_vacuum(atoms: Atoms) -> bool:
    """Whether there is an empty layer: of slabs and molecules in periodic cells."""
    heights = 1 / np.linalg.norm(atoms.cell.reciprocal(), axis=1)
    places = np.sort(atoms.get_scaled_positions(), axis=0)
    gaps = np.diff(np.vstack([places, places[:1] + 1]), axis=0).max(axis=0) * heights
    return bool((gaps > EMPTY).any())


def labelled_if_possible(labeller: Labeller, frames: Sequence[Atoms]) -> list[Atoms]:
    """Those that have labels: what fails here is missing in a table, and stops nothing."""
    labeller.ask(frames)
    labeller.wait()
    return labeller.labelled.of([frame.info[KEY] for frame in frames])


def scaled_frames(atoms: Atoms, key: str) -> list[Atoms]:
    found = []
    for n, factor in enumerate(VOLUMES):
        scaled = atoms.copy()
        scaled.set_constraint()
        scaled.set_cell(atoms.cell.array * factor ** (1 / 3), scale_atoms=True)
        found.append(asked_frame(scaled, f"{key}/{n}", NO_ROUND, "", "comparison: volume"))
    return found


def minimum_of(volumes: np.ndarray, energies: np.ndarray, atoms: int) -> Minimum | None:
    """Volumes (n,) Å^3 and energies (n,) eV of so many atoms."""
    try:
        volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit(warn=False)
    except (RuntimeError, ValueError):  # no fit
        return None
    found = volumes[0] < volume < volumes[-1] and modulus > 0
    return Minimum(volume / atoms, modulus / units.GPa) if found else None


def compare_relaxed(
    ran: Sequence[Ran], calculator: SEGNNCalculator, labeller: Labeller, folder: Path, count: int
) -> Relaxed | None:
    """Of so many frames of the first structure's dynamics, at most; None where they lead to less than two minima that
    have labels."""
    key = f"{folder.name}/relaxed"
    frames = decided(
        folder / "relaxed.xyz",
        lambda: [
            asked_frame(frame, f"{key}/{n}", NO_ROUND, run.planned.condition.name, "comparison: minimum")
            for n, (run, frame) in enumerate(minima_of_potential(of_first(ran), count, calculator))
        ],
    )
    known = labelled_if_possible(labeller, frames) if len(frames) > 1 else []
    if len(known) < 2:
        return None
    said = calculator.evaluate([frame.copy() for frame in known], ("energy", "forces"))
    forces = [one["forces"] - frame.get_forces() for one, frame in zip(said, known, strict=True)]
    theirs = np.array([frame.get_potential_energy() for frame in known])
    off = np.array([one["energy"] for one in said]) - theirs
    rms = np.sqrt(np.mean(np.square(forces)))
    return Relaxed(len(known), 1e3 * float(rms), *(1e3 * float(np.std(each, ddof=1)) for each in (off, theirs)))


def minima_of_potential(
    candidates: Sequence[tuple[Ran, Atoms]], count: int, calculator: SEGNNCalculator
) -> list[tuple[Ran, Atoms]]:
    """From so many of these frames, evenly spaced, where its relaxations end, no two alike."""
    numbers = evenly_spaced(len(candidates), min(count, len(candidates)))
    ends = (relaxed_from(*candidates[n], calculator, FMAX, LONGEST) for n in numbers)
    return distinct([(run, relaxed) for run, relaxed, ended in ends if ended and relaxed is not None], calculator)


def of_first(ran: Sequence[Ran]) -> list[tuple[Ran, Atoms]]:
    """Frames of the dynamics of the first structure."""
    mine = [run for run in ran if run.planned.condition.structure == 0]
    return [(run, frame) for run in mine for frame in run.frames if is_sane(frame)]


def compare_modes(
    atoms: Atoms, calculator: SEGNNCalculator, labeller: Labeller, folder: Path, count: int
) -> np.ndarray:
    """Wavenumbers (n, 2) by both, along so many modes of the potential, evenly from its lowest to its highest, each by
    a central difference of forces: of the reference it is the mean curvature in that direction.

    None of structures with more than `LARGEST` atoms, or with constraints that do more than fix atoms.
    """
    plain = all(isinstance(constraint, FixAtoms) for constraint in atoms.constraints)
    if not count or not plain or len(atoms) > LARGEST or not len(free_atoms(atoms)):
        return np.zeros((0, 2))
    key = f"{folder.name}/mode"
    frames = decided(folder / "modes.xyz", lambda: frames_of_modes(atoms, calculator, min(count, MODES), key))
    known = {frame.info[KEY]: frame for frame in labelled_if_possible(labeller, frames)}
    found = []
    for n in range(len(frames) // 2):
        pair = [known[name] for sign in "+-" if (name := f"{key}/{n}{sign}") in known]
        if len(pair) == 2:
            own = calculator.evaluate([frame.copy() for frame in pair], ("forces",))
            forces = [frame.get_forces() for frame in pair], [each["forces"] for each in own]
            half = 0.5 * (pair[0].positions - pair[1].positions)
            found.append([wavenumber(atoms.get_masses(), half, *two) for two in forces])
    return np.array(found).reshape(-1, 2)


def frames_of_modes(atoms: Atoms, calculator: SEGNNCalculator, count: int, key: str) -> list[Atoms]:
    """Two of each mode, displaced to either side."""
    frames = []
    for n, direction in enumerate(modes_of(atoms, calculator, count)):
        step = STEP / np.linalg.norm(direction, axis=1).max() * direction
        for sign, moved in (("+", step), ("-", -step)):
            frame = asked_frame(atoms, f"{key}/{n}{sign}", NO_ROUND, "", "comparison: mode")
            frame.positions += moved
            frames.append(frame)
    return frames


def free_atoms(atoms: Atoms) -> np.ndarray:
    fixed = [constraint.index % len(atoms) for constraint in atoms.constraints if isinstance(constraint, FixAtoms)]
    return np.setdiff1d(np.arange(len(atoms)), np.concatenate(fixed) if fixed else [])


def modes_of(atoms: Atoms, calculator: SEGNNCalculator, count: int) -> np.ndarray:
    """Directions (n, N, 3), Å/sqrt(amu), of modes that are orthonormal when weighted with the masses; atoms that are
    fixed stay, and what moves the whole is left out."""
    free = free_atoms(atoms)
    root = np.repeat(np.sqrt(atoms.get_masses()[free]), 3)
    chosen = (3 * free[:, None] + np.arange(3)).ravel()
    alone = atoms.copy()
    alone.set_constraint()
    hessian = calculator.get_hessian(alone)[np.ix_(chosen, chosen)] / np.outer(root, root)
    basis = np.eye(len(chosen))
    if len(free) == len(atoms):
        left, size, _ = np.linalg.svd(rigid_motions(atoms) * root[:, None], full_matrices=True)
        basis = left[:, int((size > RIGID * size[0]).sum()) :]
    _, vectors = np.linalg.eigh(basis.T @ hessian @ basis)
    vectors = basis @ vectors
    numbers = np.unique(np.linspace(0, vectors.shape[1] - 1, count).round().astype(int))
    found = np.zeros((len(numbers), len(atoms), 3))
    found[:, free] = (vectors[:, numbers] / root[:, None]).T.reshape(len(numbers), len(free), 3)
    return found


def rigid_motions(atoms: Atoms) -> np.ndarray:
    """Displacements (3N, 3 to 6) of the whole: turned about any axis if nothing is periodic, a wire about its own."""
    moved = np.tile(np.eye(3), (len(atoms), 1))
    if atoms.pbc.sum() > 1:
        return moved
    axes = atoms.cell.array[atoms.pbc] if atoms.pbc.any() else np.eye(3)
    arms = atoms.positions - atoms.get_center_of_mass()
    return np.hstack([moved, np.cross(axes[None], arms[:, None]).transpose(0, 2, 1).reshape(-1, len(axes))])


def wavenumber(masses: np.ndarray, half: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> float:
    """cm^-1, below zero where it is imaginary, from the forces (N, 3) half a step before and behind."""
    size = float(np.sum(masses[:, None] * half**2))  # amu Å^2
    curvature = float(np.sum(half * (backward - forward))) / (2 * size)
    return float(np.sign(curvature) * np.sqrt(abs(curvature)) * WAVENUMBER)


def reweighted_ensembles(
    frames: Sequence[Atoms], said: Sequence[dict[str, Any]], temperatures: dict[str, float]
) -> list[Reweighted]:
    """What the reference makes of labelled frames of the potential's dynamics, by condition: they are weighed by
    exp(-(E_reference - E_potential) / kT) (Zwanzig, J. Chem. Phys. 22, 1420 (1954)), those of each run among
    themselves: a crystal and a glass do not turn into one another.

    said: energies of the potential; temperatures: K, by name of the condition.
    """
    found = []
    for name, kelvin in temperatures.items():
        mine = [n for n, frame in enumerate(frames) if frame.info[CONDITION] == name]
        if len(mine) < 2:
            continue
        own = np.array([said[n]["energy"] for n in mine])
        off = np.array([frames[n].get_potential_energy() for n in mine]) - own
        runs = [frames[n].info[KEY].rpartition("/")[0] for n in mine]
        weights = np.zeros(len(mine))
        for run in dict.fromkeys(runs):
            those = [k for k, name in enumerate(runs) if name == run]
            weights[those] = weights_of(off[those], kelvin) * len(those) / len(mine)
        atoms = len(frames[mine[0]])
        shift = 1e3 * float(weights @ (own - own.mean())) / atoms
        curves = curves_of([frames[n] for n in mine], weights)
        found.append(Reweighted(name, len(mine), float(1 / np.sum(weights**2)), shift, curves))
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
