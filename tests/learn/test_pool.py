"""Labels by processes: the same as without, and what goes wrong loses one of them."""

import sys
import time

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from segnn_ase.base.errors import ConfigError, ReferenceStartError
from segnn_ase.learn.pool import LabelPool, ReferenceLabel, threads_of
from segnn_ase.learn.references import REFERENCES, resolve_reference
from segnn_ase.learn.settings import ReferenceConfig

HERE = "helpers.references:"


@pytest.fixture(autouse=True)
def in_tests(monkeypatch):
    """Workers find modules in the folder where the command was given."""
    monkeypatch.chdir("tests")


def labels_of(structures, folder, **settings):
    """Of each its label or the error's text."""
    found = {}
    with LabelPool(ReferenceConfig(**settings), folder) as pool:
        futures = [
            pool.submit(atoms, folder / f"{n}.json", lambda label, n=n: found.__setitem__(n, label))
            for n, atoms in enumerate(structures)
        ]
        for future in futures:
            future.result(timeout=120)
    assert not list(folder.glob("*.json"))
    return [found[n] if isinstance(found[n], ReferenceLabel) else str(found[n]) for n in range(len(structures))]


def test_labels_are_those_of_the_calculator(tmp_path):
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=1)
    atoms = molecule("H2O")
    found = labels_of([crystal, atoms], tmp_path, calculator="emt", workers=2)
    for structure, label in zip((crystal, atoms), found, strict=True):
        structure.calc = EMT()
        assert label.energy == structure.get_potential_energy()
        assert np.array_equal(label.forces, structure.get_forces())
    assert np.array_equal(found[0].stress, crystal.get_stress())
    assert found[1].stress is None and found[1].seconds > 0


def test_the_energy_is_that_of_the_forces(tmp_path):
    atoms = molecule("H2O")
    (found,) = labels_of([atoms], tmp_path, calculator=f"{HERE}Colder")
    atoms.calc = EMT()
    assert found.energy == atoms.get_potential_energy()


def test_what_goes_wrong_loses_one_label(tmp_path):
    moods = [0, 1, 0, 2, 3, 0, 4, 5, 0]
    structures = [molecule("H2O") for _ in moods]
    for atoms, mood in zip(structures, moods, strict=True):
        atoms.positions += [0, 0, mood - atoms.positions[0, 2]]
    begin = time.monotonic()
    found = labels_of(structures, tmp_path, calculator=f"{HERE}Moody", label_minutes=0.1)
    assert time.monotonic() - begin < 100
    told = [label for label in found if isinstance(label, str)]
    assert [isinstance(label, ReferenceLabel) for label in found] == [mood == 0 for mood in moods]
    for text, expected in zip(
        told, ("did not converge", "no answer within", "ended with status 7", "energy is not"), strict=False
    ):
        assert expected in text
    assert "shape (1, 3)" in told[4]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are the system's")
def test_memory_has_a_limit(tmp_path):
    greedy, modest = molecule("H2O"), molecule("H2O")
    greedy.positions[:, 2] += 6 - greedy.positions[0, 2]
    modest.positions[:, 2] -= modest.positions[0, 2]
    found = labels_of([greedy, modest], tmp_path, calculator=f"{HERE}Moody", memory=2.0)
    assert "MemoryError" in found[0] and isinstance(found[1], ReferenceLabel)


def test_an_answer_that_nobody_heard_is_found(tmp_path):
    atoms = molecule("H2O")
    heard = []
    with LabelPool(ReferenceConfig(calculator="emt"), tmp_path) as pool:
        answer = tmp_path / "one.json"
        with pytest.raises(OSError):
            pool.submit(atoms, answer, lambda label: (_ for _ in ()).throw(OSError("full"))).result()
        assert answer.exists()
    with LabelPool(ReferenceConfig(calculator="no:Such"), tmp_path) as pool:
        pool.submit(atoms, answer, heard.append).result()
    atoms.calc = EMT()
    assert heard[0].energy == atoms.get_potential_energy() and not answer.exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"calculator": "no_such_module:Calculator"}, "does not start: ModuleNotFoundError"),
        ({"calculator": "ase.calculators.emt:Emt"}, "does not start: AttributeError"),
        ({"calculator": "math:sqrt", "arguments": {"speed": 1}}, "does not start: TypeError"),
    ],
)
def test_what_does_not_start_says_why(tmp_path, settings, told):
    with pytest.raises(ReferenceStartError, match=told):  # it is not the structure's fault
        labels_of([molecule("H2O")], tmp_path, **settings)


def test_a_python_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"reference.python' is '/no/python'"):
        labels_of([molecule("H2O")], tmp_path, calculator="emt", python="/no/python")


@pytest.mark.parametrize("name", ["gfn2", "EMT", "module:", ":Class", "a b:C", "sevennet"])
def test_names_of_references(name):
    with pytest.raises(ConfigError, match=r"reference is .*expected a short name"):
        resolve_reference(name)


def test_every_reference_says_what_it_is():
    for name, reference in REFERENCES.items():
        assert resolve_reference(name, {"more": 1}).arguments["more"] == 1
        assert reference.about and reference.package and ":" in reference.factory and reference.licence


def test_arguments_that_are_files_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.model").write_text("weights")
    found = resolve_reference("emt", {"model": "my.model", "name": "small"}).arguments
    assert found == {"model": str(tmp_path / "my.model"), "name": "small"}


@pytest.mark.slow
def test_density_functional_theory_of_molecules(tmp_path):
    from ase.units import Hartree
    from pyscf import dft, gto

    from segnn_ase.learn.pyscf_molecules import MoleculeDFT

    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=1)
    settings = {"xc": "pbe", "basis": "sto-3g", "density_fit": False}
    (label,) = labels_of([atoms], tmp_path, calculator="pyscf", arguments=settings)
    mol = gto.M(atom=list(zip(atoms.symbols, atoms.positions.tolist(), strict=True)), basis="sto-3g", verbose=0)
    assert label.energy == pytest.approx(dft.RKS(mol, xc="pbe").kernel() * Hartree, abs=1e-6)
    step = 0.005
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[1, 2] += sign * step
        moved.calc = MoleculeDFT(**settings)
        energies.append(moved.get_potential_energy())
    assert label.forces[1, 2] == pytest.approx((energies[1] - energies[0]) / (2 * step), abs=0.02)
    assert np.abs(label.forces.sum(axis=0)).max() < 0.02
    anion = molecule("OH")
    (label,) = labels_of([anion], tmp_path, calculator="pyscf", arguments={**settings, "charge": -1})
    assert np.isfinite(label.energy)
    (told,) = labels_of([anion], tmp_path, calculator="pyscf", arguments=settings)  # a doublet without spin
    assert "spin" in told
    anion.info["charge"] = -1
    assert labels_of([anion], tmp_path, calculator="pyscf", arguments=settings)[0].energy == label.energy


def test_charges_reach_the_reference(tmp_path):
    import ase.io

    atoms = molecule("H2O")
    atoms.info["charge"] = 1
    ase.io.write(tmp_path / "ion.xyz", atoms)
    (told,) = labels_of([ase.io.read(tmp_path / "ion.xyz")], tmp_path, calculator=f"{HERE}OfCharge")
    assert told.energy == 1.0


@pytest.mark.slow
def test_ions_of_tight_binding(tmp_path):
    anion, neutral = molecule("OH"), molecule("OH")
    for atoms in (anion, neutral):
        atoms.set_initial_magnetic_moments(None)
    anion.info["charge"] = -1
    found = labels_of([anion, neutral], tmp_path, calculator="gfn2-xtb")
    assert found[0].energy == pytest.approx(-127.39, abs=0.1) and found[1].energy == pytest.approx(-120.5, abs=0.1)
    with pytest.raises(ReferenceStartError, match="TBLite has no argument 'charg'"):
        labels_of([anion], tmp_path, calculator="gfn2-xtb", arguments={"charg": 1})


def test_threads_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(ReferenceConfig(calculator="emt")) == 3
    assert threads_of(ReferenceConfig(calculator="emt", threads=5)) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of(ReferenceConfig(calculator="emt", workers=250)) == 1
