"""Labelled frames."""

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


def emt_atoms(n: int, build=lambda: molecule("H2O"), seed: int = 0, stdev: float = 0.1) -> list[Atoms]:
    """Rattled copies of a structure that carry ASE's EMT labels, with stress where it is periodic."""
    images = []
    for k in range(n):
        atoms = build()
        atoms.rattle(stdev, rng=np.random.default_rng([seed, k]))
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if atoms.pbc.all():
            labels["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **labels)
        images.append(atoms)
    return images


def water_frames(n: int, seed: int = 0) -> list[Atoms]:
    return emt_atoms(n, seed=seed)
