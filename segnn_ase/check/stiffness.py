"""Units judged by size: how stiff bonds are, which a factor common to energies and forces changes.

A force constant times the square of the bond length is an energy, and in all matter it goes with the energy of
cohesion: a third of the trace of the Hessian over the sum of E_coh / r^2 of the atoms, r the distance of the nearest
neighbour, measured 6 for lithium, 11 for molybdenum and silicon, 9 for water and organic molecules, 15 for barium
titanate, 25 for silica.
"""

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import Hartree, Rydberg, kcal, kJ, mol

from segnn_ase.check.consistency import Judged
from segnn_ase.check.findings import Finding
from segnn_ase.check.linear_model import features_of, fit_folds
from segnn_ase.check.pairs import Pairs, merge_pairs, pairs_of
from segnn_ase.check.sizes import NOBLE
from segnn_ase.data.frames import species_of

# eV an atom, of the elements (Kittel, Introduction to Solid State Physics, 8th edition, table 3.1); of hydrogen H2's
COHESION = dict(
    zip(
        (
            "H Li Be B C N O F Na Mg Al Si P S Cl K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Rb Sr Y Zr Nb Mo Tc "
            "Ru Rh Pd Ag Cd In Sn Sb Te I Cs Ba La Ce Pr Nd Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl "
            "Pb Bi Th U"
        ).split(),
        (
            *(2.24, 1.63, 3.32, 5.81, 7.37, 4.92, 2.60, 0.84, 1.11, 1.51, 3.39, 4.63, 3.43, 2.85, 1.40, 0.93, 1.84),
            *(3.90, 4.85, 5.31, 4.10, 2.92, 4.28, 4.39, 4.44, 3.49, 1.35, 2.81, 3.85, 2.96, 2.46, 1.22, 0.85, 1.72),
            *(4.37, 6.25, 7.57, 6.82, 6.85, 6.74, 5.75, 3.89, 2.95, 1.16, 2.52, 3.14, 2.75, 2.19, 1.11, 0.80, 1.90),
            *(4.47, 4.32, 3.70, 3.40, 2.14, 1.86, 4.14, 4.05, 3.04, 3.14, 3.29, 2.42, 1.60, 4.43, 6.44, 8.10, 8.90),
            *(8.03, 8.17, 6.94, 5.84, 3.81, 0.67, 1.88, 2.03, 2.18, 6.20, 5.55),
        ),
        strict=True,
    )
)
OF_OTHERS = 4.0  # eV, of actinides and the like
USUAL = (2.0, 60.0)  # of the ratio: as far from what is known as from that in another unit
LIKELY = (4.0, 40.0)
UNITS_OF_ENERGY = {  # eV
    "kcal/mol": kcal / mol,
    "kJ/mol": kJ / mol,
    "meV": 1e-3,
    "Hartree": Hartree,
    "Rydberg": Rydberg,
}
EXPLAINED = 0.6  # part of the forces that the surrogate must explain before its curvature is believed
DISAGREEING = 0.5  # part of the ratio
STRUCTURES, ATOMS = (6, 24), 1500  # to look at, and about how many atoms they have
STEP = 0.02  # Å


def find_unit_of_energy(judged: Judged) -> list[Finding]:
    """Bonds that are far stiffer or softer than any: energies and forces are in another unit than eV, or negated."""
    numbers = species_of(judged.frames)
    if judged.factor != 1.0 or judged.explained_alone < EXPLAINED or np.isin(numbers, NOBLE).any():
        return []
    ratio = stiffness(judged)
    if np.isnan(ratio) or USUAL[0] <= ratio <= USUAL[1]:
        return []
    if ratio < 0:
        text = "the forces drive atoms away from where they are in balance: energies and forces have the wrong sign"
        return [Finding("unit of energy", "warning", text, (), "Negate them, unless these are saddle points")]
    likely = [name for name, size in UNITS_OF_ENERGY.items() if LIKELY[0] < ratio * size < LIKELY[1]]
    text = (
        f"bonds are {ratio / 10:.2g} times as stiff as usual: energies and forces in {' or '.join(likely) or 'what'}?"
    )
    advice = f"State energy_unit={likely[0] if likely else 'kcal/mol'} and forces_unit in the file, or convert to eV"
    return [Finding("unit of energy", "warning", text, (), advice)]


def stiffness(judged: Judged) -> float:
    """The median ratio (see above) of some structures, by the surrogate that is fitted to the forces.

    NaN where the frames do not tell, as the fits to parts of them disagree: all displaced alike, or not at all.
    """
    sizes = [len(frame.atoms) for frame in judged.frames]
    count = int(np.clip(ATOMS / np.mean(sizes), *STRUCTURES))
    coefficients, species = fit_folds(judged.equations, energies=0.0)[0], species_of(judged.frames)
    rng, ratios = np.random.default_rng(0), []
    for n in range(0, len(sizes), -(-len(sizes) // count)):
        pairs = pairs_of(judged.frames[n].atoms)
        expected = expected_trace(pairs)
        if expected > 0:
            ratios.append(traces_of_hessian(judged.frames[n].atoms, pairs, coefficients, species, rng) / expected)
    if not ratios:
        return np.nan
    by_fold = np.median(ratios, axis=0)
    middle = float(np.median(by_fold))
    return middle if np.abs(by_fold - middle).max() < DISAGREEING * abs(middle) else np.nan


def traces_of_hessian(atoms: Atoms, pairs: Pairs, coefficients: np.ndarray, species: list[int], rng) -> np.ndarray:
    """A third of the trace, (FOLDS,) eV/Å^2, by all fits; estimated by z H z for random signs z (Hutchinson)."""
    z = rng.choice([-1.0, 1.0], size=(len(atoms), 3))
    change = STEP * (z[pairs.j] - z[pairs.i])  # no pair is lost: those near the cutoff count nothing
    moved = merge_pairs(pairs._replace(vectors=pairs.vectors + sign * change) for sign in (1, -1))
    forces = features_of([atoms, atoms], moved, species).forces
    return coefficients @ ((forces[1] - forces[0]).T @ z.ravel()) / (2 * STEP) / 3


def expected_trace(pairs: Pairs) -> float:
    """The sum of E_coh / r^2, eV/Å^2, of the atoms of a structure that have a neighbour."""
    nearest = np.full(len(pairs.numbers), np.inf)
    np.minimum.at(nearest, pairs.i, np.linalg.norm(pairs.vectors, axis=1))
    energies = np.array([COHESION.get(chemical_symbols[z], OF_OTHERS) for z in pairs.numbers])
    return float((energies / nearest**2).sum())
