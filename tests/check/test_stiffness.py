"""Energies and forces in another unit, alike, are told from the stiffness of bonds."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.units import Hartree, Rydberg, kcal, mol
from helpers.frames import emt_atoms

from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.check.doctor import examine
from segnn_ase.check.findings import Sets
from segnn_ase.check.stiffness import COHESION, stiffness
from segnn_ase.data.frames import Frame, frame_from_atoms

UNITS = {"kcal/mol": kcal / mol, "Hartree": Hartree, "Rydberg": Rydberg}
METALS = ("Al", "Cu", "Ni", "Au", "Pt")


def metal(symbol: str) -> list[Frame]:
    """Cubes of four atoms at some strains."""
    images = []
    for n in range(24):
        atoms = bulk(symbol, cubic=True)
        atoms.set_cell(atoms.cell * (0.98 + 0.002 * n), scale_atoms=True)
        atoms.rattle(0.1, seed=n)
        atoms.calc = EMT()
        atoms.get_forces()
        images.append(atoms)
    return [frame_from_atoms(atoms, source=f"{symbol}.xyz, frame {n}") for n, atoms in enumerate(images)]


def of_potential(name: str, build, stdev: float) -> list[Frame]:
    calc = SEGNNCalculator(name, accelerate="off", domain="ignore", dtype="float32")
    images = [build() for _ in range(24)]
    for n, atoms in enumerate(images):
        atoms.rattle(stdev, seed=n)
    found = calc.evaluate(images)
    return [
        Frame(a, r["energy"], r["forces"], None, f"a.xyz, frame {n}", ("energy", "forces", None))
        for n, (a, r) in enumerate(zip(images, found, strict=True))
    ]


@pytest.fixture(scope="module")
def frames() -> dict[str, list[Frame]]:
    found = {symbol: metal(symbol) for symbol in METALS}
    found["silicon"] = of_potential("silicon-pbe", lambda: bulk("Si", cubic=True), 0.08)
    found["acetone"] = of_potential("acetylacetone-pbe", lambda: molecule("CH3COCH3"), 0.04)
    return found


def scaled(frames: list[Frame], factor: float) -> list[Frame]:
    return [f._replace(energy=factor * f.energy, forces=factor * f.forces) for f in frames]


def findings_of(frames: list[Frame]) -> list:
    return [f for f in examine(Sets(frames)).findings if f.code == "unit of energy"]


@pytest.mark.parametrize("name", [*METALS, "silicon", "acetone"])
def test_matter_in_its_units_and_in_others(frames, name):
    assert not findings_of(frames[name])
    assert 4 < stiffness(examine(Sets(frames[name])).judged) < 40
    for unit, size in UNITS.items():
        (finding,) = findings_of(scaled(frames[name], 1 / size))
        assert finding.severity == "warning" and unit in finding.message, finding
    (finding,) = findings_of(scaled(frames[name], -1.0))
    assert "wrong sign" in finding.message


def test_what_other_checks_find_is_not_told_twice(frames):
    apart = [f._replace(forces=23.06 * f.forces) for f in frames["Cu"] + scaled(frames["Cu"], 1.0)]
    examined = examine(Sets(apart))
    assert [f.code for f in examined.findings if f.severity == "error"][:1] == ["units of energy and forces"]
    assert not findings_of(apart)


def test_frames_that_do_not_tell(frames):
    """Fits to parts of them disagree."""
    odd = [f._replace(forces=(1000 if n % 4 == 3 else 1) * f.forces) for n, f in enumerate(frames["Cu"])]
    assert np.isnan(stiffness(examine(Sets(odd)).judged))


def test_noble_gases_and_shuffled_forces_are_not_judged(frames):
    argon = [f._replace(atoms=Atoms("Ar4", f.atoms.positions, cell=f.atoms.cell, pbc=True)) for f in frames["Cu"]]
    assert not findings_of(scaled(argon, 1e-3))
    shuffled = [a._replace(forces=b.forces) for a, b in zip(frames["Cu"], frames["Cu"][::-1], strict=True)]
    assert not findings_of(scaled(shuffled, 1e-3))


def test_the_table_is_complete_and_in_order():
    known = {"H": 2.24, "C": 7.37, "Si": 4.63, "K": 0.93, "Fe": 4.28, "Mo": 6.82, "I": 1.11, "W": 8.90, "Au": 3.81}
    assert all(COHESION[symbol] == value for symbol, value in {**known, "Hg": 0.67, "U": 5.55}.items())


def test_molecules_of_a_crude_potential():
    """EMT's water is no water, but of its stiffness."""
    frames = [frame_from_atoms(a, source=f"a.xyz, frame {n}") for n, a in enumerate(emt_atoms(40, stdev=0.05))]
    assert not findings_of(frames)
