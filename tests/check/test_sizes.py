"""Units of length are told from the lengths of bonds."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.units import Bohr
from helpers.systems import copper

from segnn_ase.check.doctor import check_frames
from segnn_ase.check.findings import Sets
from segnn_ase.data.frames import Frame

BUILDS = {
    "water": lambda: molecule("H2O"),
    "ethanol": lambda: molecule("CH3CH2OH"),
    "copper": copper,
    "silicon": lambda: bulk("Si", cubic=True),
    "salt": lambda: bulk("NaCl", "rocksalt", a=5.64, cubic=True),
    "cesium": lambda: bulk("Cs", cubic=True),
    "perovskite": lambda: bulk("BaO", "cesiumchloride", a=3.5),
    "argon": lambda: bulk("Ar", cubic=True),
}


def found(build, factor: float) -> list:
    frames = []
    for n in range(5):
        atoms = build()
        atoms.rattle(0.03, seed=n)
        scaled = Atoms(atoms.numbers, factor * atoms.positions, cell=factor * atoms.cell.array, pbc=atoms.pbc)
        frames.append(Frame(scaled, -1.0 - n, np.ones((len(atoms), 3)), None, f"a.xyz, frame {n}", (None, None, None)))
    return [f for f in check_frames(Sets(frames)) if f.code == "unit of length"]


@pytest.mark.parametrize("name", BUILDS)
def test_positions_in_angstrom(name):
    assert not found(BUILDS[name], 1.0)


@pytest.mark.parametrize("name", ["water", "ethanol", "copper", "silicon", "salt"])
@pytest.mark.parametrize(("unit", "factor"), [("Bohr", 1 / Bohr), ("nm", 0.1)])
def test_positions_in_other_units(name, unit, factor):
    if name == "salt" and unit == "Bohr":
        factor *= 0.9  # else no pair is within reach
    (finding,) = found(BUILDS[name], factor)
    assert finding.severity == "warning" and f"positions in {unit}" in finding.message


def test_atoms_that_all_are_far_apart():
    (finding,) = found(lambda: bulk("Na", cubic=True), 1 / Bohr)
    assert "positions in Bohr" in finding.message
