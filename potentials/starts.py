"""Structures from which the dynamics of the shipped potentials begin: built, none is of the training data."""

from collections.abc import Sequence

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_masses
from ase.geometry import get_distances
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.units import mol

from segnn_ase.store.shipped import find_model

ETHYLENE_CARBONATE = Atoms(  # a planar ring, bonds of usual lengths
    "COOOC2H4",
    [
        [0, 0, 0], [0, 1.19, 0], [1.12, -0.78, 0], [-1.12, -0.78, 0], [0.77, -2.16, 0], [-0.77, -2.16, 0],
        [1.15, -2.66, 0.89], [1.15, -2.66, -0.89], [-1.15, -2.66, 0.89], [-1.15, -2.66, -0.89],
    ],
)  # fmt: skip
ETHYL_METHYL_CARBONATE = Atoms(  # heavy atoms in a plane, both ends on the side of the double bond
    "COOOC3H8",
    [
        [0, 0, 0], [0, 1.21, 0], [1.08, -0.79, 0], [-1.08, -0.79, 0], [2.34, -0.08, 0], [-2.34, -0.08, 0],
        [3.44, -1.11, 0], [2.41, 0.55, 0.89], [2.41, 0.55, -0.89], [4.41, -0.61, 0], [3.36, -1.73, 0.89],
        [3.36, -1.73, -0.89], [-3.16, -0.79, 0], [-2.40, 0.55, 0.89], [-2.40, 0.55, -0.89],
    ],
)  # fmt: skip


def strained(atoms: Atoms) -> Atoms:
    atoms.set_cell(atoms.cell @ np.array([[1.02, 0.01, 0], [0, 0.99, 0.02], [0, 0, 1.01]]), scale_atoms=True)
    return atoms


def water_box(n: int = 4, spacing: float = 12.444661 / 4, closest: float = 1.7) -> Atoms:
    """n^3 randomly turned molecules on a cubic lattice at the density of the training data.

    A molecule is turned until it is `closest` Å from the others: from overlapping ones a relaxation finds H2.
    """
    sites = spacing * (np.array(list(np.ndindex(n, n, n))) + 0.5)
    return packed([molecule("H2O")] * n**3, n * spacing, closest, sites)


def water_dimer() -> Atoms:
    positions = [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0], [0, 2.9, 0], [0.5, 3.5, 0.6], [-0.6, 3.4, 0.5]]
    return Atoms("OHHOHH", positions, cell=[8, 8, 8], pbc=True)


def electrolyte(n: int, density: float) -> Atoms:
    """n molecules of ethylene carbonate and 2n of ethyl methyl carbonate, as in the data, at a density in g/cm^3."""
    molecules = [ETHYL_METHYL_CARBONATE] * 2 * n + [ETHYLENE_CARBONATE] * n
    grams = sum(atomic_masses[one.numbers].sum() for one in molecules) / mol
    return packed(molecules, 1e8 * np.cbrt(grams / density), closest=1.8)


def packed(molecules: Sequence[Atoms], edge: float, closest: float, sites: np.ndarray | None = None) -> Atoms:
    """Put molecules into a cube (Å), each turned, and without sites moved, until it is `closest` Å from the others."""
    rng = np.random.default_rng(0)
    box = Atoms(cell=[edge] * 3, pbc=True)
    for n, kind in enumerate(molecules):
        while True:
            one = kind.copy()
            one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
            site = rng.uniform(0, edge, 3) if sites is None else sites[n]
            one.translate(site - one.get_center_of_mass())
            distances = get_distances(one.positions, box.positions, cell=box.cell, pbc=True)[1] if len(box) else None
            if distances is None or distances.min() > closest:
                break
        box += one
    return box


def acetylacetone() -> Atoms:
    """The relaxed molecule of the potential that is shipped so far, which was relaxed with the one before it."""
    atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
    return Atoms(atoms.numbers, atoms.positions)


def crystal(symbol: str, a: float, n: int) -> Atoms:
    """n^3 cubic cells."""
    return bulk(symbol, cubic=True, a=a).repeat(n)


def strained_crystal(symbol: str, a: float) -> Atoms:
    """The primitive cell, strained."""
    return strained(bulk(symbol, a=a))


def bonds(atoms: Atoms) -> set[tuple[int, int]]:
    """Pairs within 1.3 times the sum of covalent radii: H-H 0.81, O-H 1.26, C-H 1.39, C-O 1.85 Å."""
    return set(zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.3)), strict=True))


def check_molecules(atoms: Atoms, built: Atoms, closest: float = 1.2) -> None:
    """Raise RuntimeError unless every bond is that of the built structure, and others are `closest` Å apart."""
    found, expected = bonds(atoms), bonds(built)
    if found != expected:
        names = {f"{atoms.symbols[i]}{i}-{atoms.symbols[j]}{j}" for i, j in found ^ expected if i < j}
        raise RuntimeError(
            f"a molecule broke or two met: bonds {', '.join(sorted(names))} are not those that were built"
        )
    near = set(zip(*neighbor_list("ij", atoms, closest), strict=True)) - expected
    if near:
        raise RuntimeError(f"atoms {sorted(near)[0]} are closer than {closest} Å and not bound")
