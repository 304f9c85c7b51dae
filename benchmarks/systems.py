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
    """acetylacetone, or <atoms> of water, silicon or one alkane."""
    if name == "acetylacetone":
        atoms = ase.io.read(REFERENCE, "1")
        return Atoms(atoms.numbers, atoms.positions)
    if name.startswith("alkane"):
        return alkane(round((int(name.removeprefix("alkane")) - 2) / 3))
    for prefix, per_cell, build in (("water", 3, water), ("silicon", 8, _silicon)):
        if name.startswith(prefix):
            n = round((int(name.removeprefix(prefix)) / per_cell) ** (1 / 3))
            return build(n)
    raise SystemExit(f"system is {name!r}; expected acetylacetone, water192, silicon512, alkane62, ...")


def alkane(carbons: int) -> Atoms:
    """C_n H_2n+2, all trans, in a vacuum."""
    n, side = np.arange(carbons), (-1.0) ** np.arange(carbons)
    chain = np.stack([1.274 * n, 0.42 * side, 0 * n], axis=1)  # Å
    hydrogens = [chain + np.stack([0 * n, 0.62 * side, z * np.ones(carbons)], axis=1) for z in (0.89, -0.89)]
    ends = [chain[0] + [-0.89, -0.63 * side[0], 0], chain[-1] + [0.89, -0.63 * side[-1], 0]]
    return Atoms(f"C{carbons}H{2 * carbons + 2}", np.concatenate([chain, *hydrogens, ends]))


def _silicon(n: int) -> Atoms:
    return bulk("Si", cubic=True, a=5.47).repeat(n)
