"""D3 from the library, against the library called here, finite differences, and all that would kill its process."""

import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.units import Bohr, Hartree
from helpers.systems import left_handed, rattled, slab, triclinic, wire

from segnn_ase.base.dispersion_name import parse_dispersion
from segnn_ase.base.errors import ConfigError, MissingExtraError, SEGNNError, StructureError
from segnn_ase.structure.dispersion import dispersion_energies, dispersion_hessian, dispersion_of, require_dispersion

dftd3 = pytest.importorskip("dftd3.interface")


def silicon() -> Atoms:
    return rattled(bulk("Si", cubic=True), stdev=0.05)


def copper_slab() -> Atoms:
    return rattled(fcc111("Cu", (2, 1, 2), vacuum=9.0, periodic=False))


SYSTEMS = {f.__name__: f for f in (silicon, copper_slab, left_handed, triclinic, slab, wire)}
SYSTEMS["ethanol"] = lambda: rattled(molecule("CH3CH2OH"))
SETTINGS = {"d3bj:pbe": dftd3.RationalDampingParam, "d3zero:pbe": dftd3.ZeroDampingParam}


def by_the_library(name: str, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces and virial without anything of the package; the box must enclose the atoms where it is open."""
    atoms = atoms.copy()
    atoms.center(vacuum=5.0, axis=np.flatnonzero(~atoms.pbc))
    model = dftd3.DispersionModel(atoms.numbers, atoms.positions / Bohr, atoms.cell.array / Bohr, atoms.pbc)
    model.set_realspace_cutoff(60.0, 40.0, 40.0, 10.0)
    found = model.get_dispersion(SETTINGS[name](method=name.partition(":")[2]), grad=True)
    return float(found["energy"]) * Hartree, -found["gradient"] * Hartree / Bohr, found["virial"] * Hartree


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_is_that_of_the_library(system, name):
    atoms = SYSTEMS[system]()
    found, (energy, forces, virial) = dispersion_of(name, atoms), by_the_library(name, atoms)
    assert energy < -1e-3
    assert abs(found.energy - energy) < 1e-9
    np.testing.assert_allclose(found.forces, forces, atol=1e-9)
    np.testing.assert_allclose(found.virial, virial, atol=1e-9)
    assert abs(dispersion_of(name, atoms, derivatives=False).energy - energy) < 1e-12
    assert abs(dispersion_energies(name, atoms).sum() - energy) < 1e-9


@pytest.mark.parametrize("build", [silicon, lambda: molecule("H2O")])
def test_it_is_that_of_the_librarys_own_calculator(build):
    """The numbers that anybody else gets, with the smooth end of pairs."""
    atoms = build()
    reach = {"disp2": 60 * Bohr, "width2": 10 * Bohr}
    atoms.calc = pytest.importorskip("dftd3.ase").DFTD3(method="PBE", damping="d3bj", realspace_cutoff=reach)
    found = dispersion_of("d3bj:pbe", atoms)
    assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(found.forces, atoms.get_forces(), atol=1e-9)
    atoms.calc.set(realspace_cutoff={})
    assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4 * len(atoms))
    if atoms.pbc.all():
        atoms.calc.set(realspace_cutoff=reach)
        np.testing.assert_allclose(found.virial / atoms.get_volume(), atoms.get_stress(voigt=False), atol=1e-9)


@pytest.mark.parametrize("system", SYSTEMS)
def test_forces_and_virial_are_derivatives(system):
    atoms, rng = SYSTEMS[system](), np.random.default_rng(0)
    found, v = dispersion_of("d3bj:pbe", atoms), rng.normal(size=(len(atoms), 3))
    strain = rng.normal(size=(3, 3)) * np.outer(atoms.pbc, atoms.pbc) + 0.0
    strain = 0.1 * (strain + strain.T)
    shape = atoms.cell.array

    def energy(x: float, y: float = 0.0) -> float:
        changed = Atoms(atoms.numbers, atoms.positions + x * v, cell=shape, pbc=atoms.pbc)
        changed.set_cell(shape @ (np.eye(3) + y * strain))
        changed.positions = changed.positions @ (np.eye(3) + y * strain)
        return dispersion_of("d3bj:pbe", changed, derivatives=False).energy

    slope = (energy(-2e-3) - 8 * energy(-1e-3) + 8 * energy(1e-3) - energy(2e-3)) / 12e-3
    # the library stops counting neighbours at 21 Å, with jumps of some 1e-8 eV
    assert abs((found.forces * v).sum() + slope) < 2e-4
    slope = (energy(0, -2e-3) - 8 * energy(0, -1e-3) + 8 * energy(0, 1e-3) - energy(0, 2e-3)) / 12e-3
    assert abs((found.virial * strain).sum() - slope) < 2e-4 * max(1.0, np.abs(found.virial).max())


@pytest.mark.parametrize("system", ["silicon", "copper_slab", "ethanol"])
def test_the_hessian_is_the_derivative_of_the_forces(system):
    atoms = SYSTEMS[system]()
    found, v = dispersion_hessian("d3bj:pbe", atoms), np.random.default_rng(0).normal(size=3 * len(atoms))
    ends = []
    for sign in (-1, 1):
        moved = atoms.copy()
        moved.positions += 1e-3 * sign * v.reshape(-1, 3)
        ends.append(dispersion_of("d3bj:pbe", moved).forces.ravel())
    np.testing.assert_allclose(found @ v, (ends[0] - ends[1]) / 2e-3, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_depends_neither_on_the_cell_of_an_atom_nor_on_the_box(system):
    atoms, rng = SYSTEMS[system](), np.random.default_rng(1)
    here = dispersion_of("d3bj:pbe", atoms)
    moved = atoms.copy()
    moved.positions += (rng.integers(-4, 5, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array + (30.0, -200.0, 7.0)
    there = dispersion_of("d3bj:pbe", moved)
    assert abs(here.energy - there.energy) < 1e-9
    np.testing.assert_allclose(there.forces, here.forces, atol=1e-9)


def test_a_cell_that_is_sheared_a_hundred_times_is_the_same_lattice():
    atoms = silicon()
    sheared = atoms.copy()
    sheared.set_cell(np.array([[1, 0, 0], [100, 1, 0], [-70, 30, 1]]) @ atoms.cell.array)
    assert abs(dispersion_of("d3bj:pbe", sheared).energy - dispersion_of("d3bj:pbe", atoms).energy) < 1e-9


def test_molecules_out_of_reach_do_not_feel_each_other():
    one, far = SYSTEMS["ethanol"](), SYSTEMS["ethanol"]()
    far.positions += (1e4, 0.0, 0.0)
    pair = one + far
    for pbc in (False, (False, True, False)):
        pair.set_cell([0.0, 90.0, 0.0])
        pair.pbc = pbc
        assert dispersion_of("d3bj:pbe", pair).energy == pytest.approx(
            2 * dispersion_of("d3bj:pbe", one).energy, abs=1e-6
        )


def test_a_lone_atom_has_none():
    found = dispersion_of("d3bj:pbe", Atoms("Cu"))
    assert (found.energy, np.abs(found.forces).max(), np.abs(found.virial).max()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("text", ["d3bj:pbe", " D3BJ:PBE\n", "d3zero:b3-lyp", "d3bjm:b97-d", "d3zerom:pbe0"])
def test_names(text):
    assert parse_dispersion(text) == text.strip().lower()
    require_dispersion(parse_dispersion(text), [1, 103])


NOT_NAMES = {
    "nothing": "",
    "functional_only": "pbe",
    "damping_only": "d3bj:",
    "no_damping": ":pbe",
    "another_method": "d4:pbe",
    "d3_alone": "d3",
    "spaces": "d3bj: pbe",
    "two": "d3bj:pbe,d3zero:pbe",
    "too_long": "d3bj:" + "p" * 600,  # the library writes past its buffer
    "zero_byte": "d3bj:pbe\0",
    "line_break": "d3bj:pbe\npbe",
    "not_ascii": "d3bj:ωb97",
    "digits_of_others": "d3bj:b٣lyp",
    "bytes": b"d3bj:pbe",
    "number": 3,
    "true": True,
    "list": ["d3bj:pbe"],
}


@pytest.mark.parametrize("text", NOT_NAMES.values(), ids=NOT_NAMES)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ConfigError, match=r"dispersion is .*; expected a damping .* such as 'd3bj:pbe'"):
        parse_dispersion(text)


WATER = molecule("H2O")
MISTAKES = {
    "unknown_functional": ("d3bj:nonsense", WATER, ConfigError, r"no parameters of d3bj for 'nonsense'"),
    "not_with_this_damping": ("d3zero:r2scan", WATER, ConfigError, r"no parameters of d3zero for 'r2scan'"),
    "too_heavy": ("d3bj:pbe", Atoms("Rf2", [[0, 0, 0], [0, 0, 3]]), ConfigError, r"no parameters for Rf.* up to Lr"),
    "heaviest": ("d3bj:pbe", Atoms([118], [[0, 0, 0]]), ConfigError, r"no parameters for Og"),
    "no_element": ("d3bj:pbe", Atoms("X"), ConfigError, r"no parameters for X"),
    "nan": ("d3bj:pbe", Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]), StructureError, "positions"),
    "one_spot": ("d3bj:pbe", Atoms("H2", [[0, 0, 0], [0, 0, 0]]), StructureError, "[Tt]oo close"),
    "flat_cell": ("d3bj:pbe", Atoms("H", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=True), StructureError, "cell"),
    "no_cell": ("d3bj:pbe", Atoms("H", pbc=True), StructureError, "cell"),
    "tiny_cell": ("d3bj:pbe", Atoms("H", cell=[0.1, 0.1, 0.1], pbc=True), StructureError, "neighbours"),
}


@pytest.mark.parametrize("name, atoms, error, message", MISTAKES.values(), ids=MISTAKES)
def test_what_would_end_in_zeros_nan_or_a_dead_process_is_refused(name, atoms, error, message):
    with pytest.raises(error, match=message) as caught:
        dispersion_of(name, atoms)
    assert isinstance(caught.value, SEGNNError)


def test_a_process_ends_in_silence():
    code = """
from ase.build import molecule
from segnn_ase.structure.dispersion import dispersion_of
print(dispersion_of("d3bj:pbe", molecule("H2O")).energy < 0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    dispersion_of("d3bj:pbe", WATER)  # it was there
    monkeypatch.setitem(sys.modules, "dftd3", None)
    with pytest.raises(MissingExtraError, match=r"'d3bj:pbe' needs dftd3: pip install 'segnn-ase\[dispersion\]'"):
        dispersion_of("d3bj:pbe", WATER)
    with pytest.raises(ImportError, match="needs dftd3"):
        require_dispersion("d3bj:pbe", [1])
