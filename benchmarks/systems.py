"""Structures that every benchmark uses, the same in every process: they need ASE and numpy only."""

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

REFERENCE = Path(__file__).parent.parent / "potentials" / "acetylacetone-pbe" / "reference.xyz"
WATER_SPACING = 3.105  # Å, between molecules on a cubic lattice: the density of the liquid


def water(n: int) -> Atoms:
    """n^3 molecules, each turned at random, on a cubic lattice; of many, an eighth is repeated."""
    if n > 16 and n % 2 == 0:
        return water(n // 2).repeat(2)
    rng = np.random.default_rng(0)
    box = Atoms(cell=[n * WATER_SPACING] * 3, pbc=True)
    for site in np.ndindex(n, n, n):
        one = molecule("H2O")
        one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
        one.positions += WATER_SPACING * (np.array(site) + 0.5) - one.get_center_of_mass()
        box += one
    return box


def system(name: str) -> Atoms:
    """acetylacetone, water<atoms> or silicon<atoms>."""
    if name == "acetylacetone":
        atoms = ase.io.read(REFERENCE, "1")
        return Atoms(atoms.numbers, atoms.positions)
    for prefix, per_cell, build in (("water", 3, water), ("silicon", 8, _silicon)):
        if name.startswith(prefix):
            n = round((int(name.removeprefix(prefix)) / per_cell) ** (1 / 3))
            return build(n)
    raise SystemExit(f"system is {name!r}; expected acetylacetone, water192, silicon512, ...")


def _silicon(n: int) -> Atoms:
    return bulk("Si", cubic=True, a=5.47).repeat(n)
