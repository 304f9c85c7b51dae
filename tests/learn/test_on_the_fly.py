"""The potential answers where it is sure, the reference where not, and nothing that it said is lost."""

import time

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin
from helpers.trainings import leave_out_plots

from segnn_ase import OnTheFlyCalculator, load_potential
from segnn_ase.base.errors import ConfigError, OutputError
from segnn_ase.learn.labelled import read_whole

SMALL = {"hidden_irreps": "8x0e+8x1o", "lmax_attr": 1, "cutoff": 3.5, "n_radial": 4, "radial_hidden": [8]}


@pytest.fixture
def crystal():
    return bulk("Cu", cubic=True)


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (60, 60))
    leave_out_plots(monkeypatch)


def moved(atoms, calculator, steps, seed=0):
    atoms.calc = calculator
    rng = np.random.default_rng(seed)
    Langevin(atoms, 5 * units.fs, temperature_K=300, friction=0.02 / units.fs, fixcm=False, rng=rng).run(steps)
    return atoms


def test_it_asks_less_and_less(tmp_path, crystal):
    settings = {
        "out": tmp_path / "cu.pt",
        "network": SMALL,
        "beside": False,
        "aim": 100.0,
        "training": {"device": "cpu"},
    }
    calculator = OnTheFlyCalculator("emt", **settings)
    moved(crystal, calculator, 60)
    assert calculator.labels + calculator.answers >= 60
    assert calculator.answers > 5 and calculator.labels >= 8 and (tmp_path / "cu.pt").exists()
    with pytest.raises(OutputError, match=r"state\.json"):
        OnTheFlyCalculator(EMT(), **settings)
    calculator.close()
    again = OnTheFlyCalculator(EMT(), **settings)  # takes up both
    assert again.labels == calculator.labels
    sure, unsure = crystal.copy(), bulk("Cu", cubic=True)
    unsure.rattle(0.4, seed=2)
    for atoms in (sure, unsure):
        atoms.calc = again
        atoms.get_potential_energy()
        truth = atoms.copy()
        truth.calc = EMT()
        if again.results["asked"]:
            assert np.array_equal(atoms.get_forces(), truth.get_forces())
            assert np.array_equal(atoms.get_stress(), truth.get_stress())
        else:
            assert np.abs(atoms.get_forces() - truth.get_forces()).max() < 1.0
    assert again.results["asked"] and again.labels > calculator.labels


def test_trainings_run_beside(tmp_path, crystal, monkeypatch):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (2, 2))
    settings = {"out": tmp_path / "cu.pt", "network": SMALL, "training": {"device": "cpu"}}
    calculator = OnTheFlyCalculator(EMT(), train_every=8, **settings)
    crystal.calc = calculator
    rng = np.random.default_rng(0)
    for _ in range(9):
        crystal.positions += 0.02 * rng.normal(size=crystal.positions.shape)
        crystal.get_forces()
    assert calculator.labels == 9 and not (tmp_path / "cu.pt").exists()
    deadline = time.monotonic() + 120
    while not (tmp_path / "cu.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
        crystal.positions += 1e-6
        crystal.get_potential_energy()


def test_a_training_that_fails_is_told(tmp_path, crystal):
    wrong = OnTheFlyCalculator(EMT(), out=tmp_path / "cu.pt", network={"preset": "none"}, train_every=1)
    crystal.calc = wrong
    with pytest.raises(ConfigError, match="preset"):
        for _ in range(9):
            crystal.rattle(0.05)
            crystal.get_forces()


def test_what_cannot_be(tmp_path):
    out = tmp_path / "a.pt"
    for arguments, told in (
        ({"aim": 0.0}, "aim is 0.0"),
        ({"train_every": 0}, "train_every is 0"),
        ({"training": {"committee": 2}}, "expected one potential"),
        ({"model": "silicon-pbe", "network": SMALL}, "model is given, which has its own"),
        ({"training": {"select": "stability", "rollout_steps": 0}}, "rollout_steps"),
    ):
        with pytest.raises(ConfigError, match=told):
            OnTheFlyCalculator("emt", out=out, **arguments)
    with pytest.raises(ConfigError, match=r"ends in \.pt"):
        OnTheFlyCalculator("emt", out="a")
    with pytest.raises(ConfigError, match="an ASE calculator or a name"):
        OnTheFlyCalculator(3, out=out)
    with pytest.raises(ConfigError, match="pip install"):
        OnTheFlyCalculator("no_such_module:Calculator", out=out)
    atoms = molecule("H2O")
    atoms.calc = OnTheFlyCalculator("emt", out=out)
    with pytest.raises(PropertyNotImplementedError, match="three periodic directions"):
        atoms.get_stress()
    assert atoms.get_potential_energy() and atoms.calc.labels == 1


@pytest.mark.parametrize("given", [{"minutes": 0.02}, {"epochs": 1, "select": "stability", "rollout_steps": 2}])
def test_trainings_are_as_they_are_given(tmp_path, crystal, given):
    calculator = OnTheFlyCalculator(EMT(), out=tmp_path / "cu.pt", network=SMALL, training={"device": "cpu", **given})
    crystal.calc = calculator
    for n in range(8):
        crystal.positions = bulk("Cu", cubic=True).positions + 0.05 * np.random.default_rng(n).normal(size=(4, 3))
        crystal.get_forces()
    calculator.train()
    assert (tmp_path / "cu.pt").exists()


def test_labels_know_no_constraints(tmp_path, crystal):
    crystal.rattle(0.1, seed=1)
    free = crystal.copy()
    crystal.set_constraint(FixAtoms([0, 1]))
    crystal.calc, free.calc = OnTheFlyCalculator(EMT(), out=tmp_path / "cu.pt"), EMT()
    assert np.abs(crystal.get_forces()[:2]).max() == 0
    (label,) = read_whole(tmp_path / "cu.learn" / "frames.xyz")
    assert np.abs(label.get_forces() - free.get_forces()).max() < 1e-7


def test_a_potential_to_begin_with_is_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (1, 1))
    settings = {"out": tmp_path / "si.pt", "beside": False, "train_every": 8, "training": {"device": "cpu"}}
    calculator = OnTheFlyCalculator(EMT(), "silicon-pbe", **settings)
    atoms = bulk("Cu", cubic=True)
    atoms.calc = calculator
    for n in range(8):
        atoms.positions = bulk("Cu", cubic=True).positions + 0.05 * np.random.default_rng(n).normal(size=(4, 3))
        atoms.get_forces()
    assert load_potential(tmp_path / "si.pt").symbols == ["Si", "Cu"]
