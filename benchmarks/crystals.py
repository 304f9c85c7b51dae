"""Properties of a cubic crystal of one element, by ASE and matscipy: each function returns {name: (value, unit)}."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.build import bcc100, bcc110, bulk, diamond100, diamond111
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, LBFGS
from ase.phonons import Phonons
from matscipy.elasticity import fit_elastic_constants

from segnn_ase import SEGNNCalculator

Measured = dict[str, tuple[float, str]]
J_PER_M2 = 16.021766  # eV/Å^2
PER_CM = 8065.544  # 1/cm in an eV


class Crystal(NamedTuple):
    symbol: str
    a: float  # Å, from which it is relaxed
    cells: int  # cubic cells along an edge of the box with the vacancy
    surfaces: dict[str, Callable[[str, float], Atoms]]  # by name: the slab, of symbol and lattice constant


def plain(build: Callable, layers: int) -> Callable[[str, float], Atoms]:
    return lambda symbol, a: build(symbol, (1, 1, layers), a=a, vacuum=6.0, periodic=True)


def one_bond_cut(symbol: str, a: float) -> Atoms:
    """A (111) slab of 12 layers whose outermost atoms have three neighbours; ASE's even ones end with one."""
    slab = diamond111(symbol, (1, 1, 14), a=a, vacuum=5.0, periodic=True)
    return slab[np.argsort(slab.positions[:, 2])[1:-1]]


def dimers(symbol: str, a: float, step: float = 0.7, tilt: float = 0.1) -> Atoms:
    """A (100) slab with dimers: pairs of outermost atoms moved towards each other and one of them up (Å).

    With four layers, or a multiple, the bonds inwards lie along x on both sides, so the dimers along y.
    """
    slab = diamond100(symbol, (1, 2, 16), a=a, vacuum=6.0, periodic=True)
    z = slab.positions[:, 2]
    for level, sign in ((z.max(), 1), (z.min(), -1)):
        first, second = np.flatnonzero(abs(z - level) < 0.1)
        slab.positions[first] += [0, step, sign * tilt]
        slab.positions[second] -= [0, step, sign * tilt]
    return slab


SILICON = Crystal(
    "Si", 5.469, 3, {"(100), 1x1": plain(diamond100, 16), "(100), 2x1": dimers, "(111), 1x1": one_bond_cut}
)
MOLYBDENUM = Crystal("Mo", 3.17, 4, {"(110), 1x1": plain(bcc110, 12), "(100), 1x1": plain(bcc100, 14)})
LITHIUM = MOLYBDENUM._replace(symbol="Li", a=3.44)


def relaxed(crystal: Crystal, calculator: SEGNNCalculator) -> Atoms:
    """The cubic cell without stress."""
    atoms = bulk(crystal.symbol, cubic=True, a=crystal.a)
    atoms.calc = calculator
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=200)
    return atoms


def edge(atoms: Atoms) -> float:
    return float(np.cbrt(atoms.get_volume()))


def lattice(crystal: Crystal, calculator: SEGNNCalculator, folder: Path) -> Measured:
    return {"lattice constant": (edge(relaxed(crystal, calculator)), "Å")}


def elastic(crystal: Crystal, calculator: SEGNNCalculator, folder: Path) -> Measured:
    """From the stress at strains of 0.5 % either way, atoms relaxed; what atoms held give, where it differs."""
    found = {}
    for name, optimizer in (("", BFGS), (", atoms held", None)):
        C, _ = fit_elastic_constants(
            relaxed(crystal, calculator), symmetry="cubic", delta=2.5e-3, optimizer=optimizer, fmax=1e-4, verbose=False
        )
        found |= {f"C{i}{j}{name}": (C[i - 1, j - 1] / units.GPa, "GPa") for i, j in ((1, 1), (1, 2), (4, 4))}
    return {k: v for k, v in found.items() if "held" not in k or abs(v[0] - found[k[:3]][0]) > 1e-2 * abs(v[0])}


def vacancy(crystal: Crystal, calculator: SEGNNCalculator, folder: Path) -> Measured:
    """E(N - 1) - (N - 1)/N E(N) of a relaxed vacancy; a small displacement lets it lose its symmetry."""
    atoms = relaxed(crystal, calculator).repeat(crystal.cells)
    atoms.calc = calculator
    whole = atoms.get_potential_energy()
    del atoms[0]
    atoms.rattle(0.02, seed=0)
    LBFGS(atoms, logfile=None).run(fmax=0.01, steps=300)
    n = len(atoms) + 1
    return {"vacancy": (atoms.get_potential_energy() - (n - 1) / n * whole, "eV")}


def surfaces(crystal: Crystal, calculator: SEGNNCalculator, folder: Path) -> Measured:
    """Relaxed slabs with two surfaces and 12 Å of vacuum."""
    one = relaxed(crystal, calculator)
    per_atom = one.get_potential_energy() / len(one)
    slabs = {name: build(crystal.symbol, edge(one)) for name, build in crystal.surfaces.items()}
    return {f"surface {name}": (surface_energy(slab, per_atom, calculator), "J/m^2") for name, slab in slabs.items()}


def surface_energy(slab: Atoms, per_atom: float, calculator: SEGNNCalculator) -> float:
    slab.calc = calculator
    LBFGS(slab, logfile=None).run(fmax=0.01, steps=300)
    area = np.linalg.norm(np.cross(slab.cell[0], slab.cell[1]))
    return float(J_PER_M2 * (slab.get_potential_energy() - len(slab) * per_atom) / (2 * area))


def phonons(crystal: Crystal, calculator: SEGNNCalculator, folder: Path) -> Measured:
    """At Gamma and X of diamond, from finite displacements in 4^3 primitive cells; ASE keeps each in the folder."""
    a = edge(relaxed(crystal, calculator))
    atoms = bulk(crystal.symbol, a=a)
    waves = Phonons(atoms, calculator, supercell=(4, 4, 4), delta=0.01, name=str(folder / "phonons"))
    waves.run()
    waves.read(acoustic=True)
    points = atoms.cell.bandpath(npoints=0).special_points
    gamma, x = PER_CM * waves.band_structure([points["G"], points["X"]], verbose=False)
    found = {"Gamma, optical": gamma[-1], "X, TA": x[0], "X, LA/LO": x[2], "X, TO": x[-1]}
    return {f"phonon, {name}": (float(value), "1/cm") for name, value in found.items()}
