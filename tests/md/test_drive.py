"""Dynamics in a field of the run's own: constant as that of the structure, oscillating, and the work that it does."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.io import read, write
from helpers.command_line import segnn

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, MDError, StructureError
from segnn_ase.md import MDConfig, run_md
from segnn_ase.md.able import is_turned
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config

SPRING, CHARGE, MASS = 5.0, 0.4, 10.0  # eV/Å^2, e, amu: an ion at a spring
OWN = np.sqrt(SPRING / MASS) / (2 * np.pi) * units.fs / 2.99792458e-5  # 1/cm
FORCE = CHARGE * 0.05


class Ion(Calculator):
    """V = k x^2 / 2 + c x^4 / 4 - q F . x of each atom."""

    implemented_properties = ["energy", "free_energy", "forces", "dipole"]  # noqa: RUF012
    told_names = ("external_field",)

    def __init__(self, quartic: float = 0.0):
        super().__init__()
        self.quartic = quartic

    def check_state(self, atoms, tol=1e-15):
        changed = super().check_state(atoms, tol)
        field = atoms.info["external_field"]
        return changed if changed or np.array_equal(self.atoms.info["external_field"], field) else ["external_field"]

    def calculate(self, atoms, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        x, field = atoms.positions, np.array(atoms.info["external_field"])
        square = (x**2).sum(axis=1, keepdims=True)
        energy = float((SPRING * square / 2 + self.quartic * square**2 / 4).sum() - CHARGE * (x @ field).sum())
        forces = -SPRING * x - self.quartic * square * x + CHARGE * field
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, "dipole": CHARGE * x.sum(axis=0)}


def ion(calc=None, positions=((0, 0, 0),)) -> Atoms:
    atoms = Atoms(f"X{len(positions)}", positions, masses=np.full(len(positions), MASS))
    atoms.calc = Ion() if calc is None else calc
    return atoms


def config(**more) -> MDConfig:
    return MDConfig(**{"ensemble": "nve", "velocities": "keep", "field": (0, 0, 0.05), "log_every": 1, **more})


def test_a_driven_oscillator_moves_as_textbooks_say():
    """x = a (cos wt - cos w0 t), a = (q F / m) / (w0^2 - w^2)."""
    below = 0.6 * OWN
    atoms, steps = ion(), 400
    run_md(atoms, config(timestep=0.5, steps=steps, field_frequency=below), progress=False)
    own, w = (2 * np.pi * 2.99792458e-5 * nu for nu in (OWN, below))  # 1/fs
    a = FORCE / MASS / ((own**2 - w**2) / units.fs**2)
    time = 0.5 * steps
    assert atoms.positions[0, 2] == pytest.approx(a * (np.cos(w * time) - np.cos(own * time)), rel=1e-3)
    assert np.abs(atoms.positions[0, :2]).max() == 0


def test_in_resonance_it_takes_up_energy_and_what_is_conserved_stays():
    atoms = ion()
    result = run_md(atoms, config(timestep=0.2, steps=2000, field_frequency=OWN), progress=False)
    total, conserved = result.log["total"], result.log["conserved"]
    assert total[-1] > 50 * np.ptp(conserved)
    grown = FORCE**2 * (400 * units.fs) ** 2 / (8 * MASS)  # of an oscillator at rest, driven in resonance
    assert total[-1] - total[0] == pytest.approx(grown, rel=0.05)


def test_the_error_of_what_is_conserved_falls_with_the_square_of_the_step():
    spreads = []
    for timestep in (0.4, 0.2):
        atoms = ion(Ion(quartic=20.0), ((0.3, 0, 0), (0, 0.2, 0.1)))
        result = run_md(
            atoms, config(timestep=timestep, steps=round(400 / timestep), field_frequency=700), progress=False
        )
        spreads.append(np.ptp(result.log["conserved"]))
    assert spreads[0] / spreads[1] == pytest.approx(4, rel=0.1)


def test_a_constant_field_is_that_of_the_structure():
    alone, told = ion(positions=((0.1, 0, 0),)), ion(positions=((0.1, 0, 0),))
    told.info["external_field"] = [0, 0, 0.05]
    run_md(alone, config(steps=50), progress=False)
    run_md(told, config(steps=50, field=None), progress=False)
    np.testing.assert_array_equal(alone.positions, told.positions)


@pytest.mark.parametrize("ensemble", ["nve", "langevin", "bussi"])
def test_a_run_that_was_cut_in_two_is_the_same(tmp_path, ensemble):
    both = []
    for parts in ((60,), (25, 60)):
        name = tmp_path / f"{ensemble}{len(parts)}"
        for steps in parts:
            atoms = ion(Ion(quartic=20.0), ((0.3, 0, 0), (0, 0.2, 0.1), (0.1, 0.1, 0)))
            atoms.set_velocities(0.01 * np.arange(9).reshape(3, 3))
            files = {"log": f"{name}.csv", "trajectory": f"{name}.xyz", "restart": f"{name}.npz", "save_every": 10}
            of_run = {"ensemble": ensemble, "steps": steps, "timestep": 0.5, "field_frequency": 300, **files}
            run_md(atoms, config(**of_run), progress=False)
        both.append(atoms)
    np.testing.assert_array_equal(both[0].positions, both[1].positions)
    assert (tmp_path / f"{ensemble}1.csv").read_bytes() == (tmp_path / f"{ensemble}2.csv").read_bytes()
    frames = read(tmp_path / f"{ensemble}2.xyz", ":")
    wanted = 0.05 * np.cos(2 * np.pi * 2.99792458e-5 * 300 * np.array([f.info["time_fs"] for f in frames]))
    np.testing.assert_allclose([f.info["external_field"][2] for f in frames], wanted, atol=1e-8)


def test_the_same_atoms_go_on_in_the_same_process(tmp_path):
    atoms, files = ion(Ion(20.0), ((0.3, 0, 0),)), {"restart": str(tmp_path / "run.npz"), "field_frequency": 300}
    run_md(atoms, config(steps=10, **files), progress=False)
    assert run_md(atoms, config(steps=20, **files), progress=False).steps == 20


WRONG = [
    ({"field": None, "field_frequency": 100}, "field_frequency is 100, but there is no field"),
    ({"field": (0, 0, np.nan)}, "field.2. is nan"),
    ({"field": (0, 1)}, "field"),
    ({"field_frequency": -1}, "field_frequency"),
    ({"field_frequency": 4000, "timestep": 2}, "less than 20 steps a period"),
]


@pytest.mark.parametrize("values,text", WRONG)
def test_settings_that_make_no_sense(values, text):
    with pytest.raises(ConfigError, match=text):
        MDConfig.parse({"ensemble": "nve", "field": (0, 0, 0.1), **values})


def test_who_cannot_follow_says_so():
    atoms = ion(EMT(), ((0, 0, 0), (2, 0, 0)))
    atoms.symbols[:] = "Cu"
    with pytest.raises(ConfigError, match=r"field is .* but EMT knows no external_field: train"):
        run_md(atoms, config(), progress=False)
    with pytest.raises(ConfigError, match="ensemble 'nhc' cannot follow: use 'nve', 'langevin', 'bussi'"):
        run_md(ion(), config(ensemble="nhc", field_frequency=100), progress=False)


class Bystander(LennardJones):
    """Has a dipole, and feels no field."""

    implemented_properties = [*LennardJones.implemented_properties, "dipole"]  # noqa: RUF012 - ASE's interface

    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        self.results["dipole"] = np.array([0.0, 1.0, 3.0])


def sum_of(settings: dict) -> SumCalculator:
    potential = Potential(model_config(cues=["external_field"], **settings), [1, 8])
    potential.responses.usual[:] = 1.0
    return SumCalculator([SEGNNCalculator(potential.double(), domain="ignore"), Bystander(epsilon=1e-3)])


SMALL = {"hidden_irreps": "8x0e+8x1o+4x2e", "radial_hidden": (8,), "n_radial": 4, "cutoff": 3.5}


def test_a_potential_that_knows_fields_is_driven_within_a_sum():
    """By its own dipoles; the sum, which does not look at `info`, was asked before."""
    spreads = []
    for timestep in (0.2, 0.1):
        atoms = molecule("H2O")
        atoms.calc = sum_of(SMALL)
        atoms.get_forces()
        of_run = {"timestep": timestep, "steps": round(20 / timestep), "field_frequency": 5000, "field": (0, 0.2, 0.3)}
        alone = atoms.get_potential_energy()
        result = run_md(atoms, config(**of_run), progress=False)
        assert abs(result.log["potential"][0] - alone) > 0.01
        assert np.ptp(result.log["total"]) > 50 * np.ptp(result.log["conserved"])
        spreads.append(np.ptp(result.log["conserved"]))
    assert spreads[0] / spreads[1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("ensemble", ["bussi", "nhc", "nve"])
@pytest.mark.parametrize("place", ["settings", "structure", "nowhere"])
def test_in_a_field_rotations_hold_heat(ensemble, place):
    """A torque would else turn what thermostats hold for still."""
    atoms, field = molecule("H2O"), None if place != "settings" else (0, 0.2, 0.3)
    atoms.calc = sum_of(SMALL)
    atoms.info |= {"external_field": [0, 0.2, 0.3]} if place == "structure" else {}
    result = run_md(atoms, config(steps=0, ensemble=ensemble, velocities="maxwell", field=field), progress=False)
    dof = 2 * result.log["kinetic"][0] / (units.kB * result.log["temperature"][0])
    assert dof == pytest.approx(3 if place == "nowhere" else 6)
    assert (np.linalg.norm(atoms.get_angular_momentum()) > 0.01) == (place != "nowhere")


@pytest.mark.parametrize("field", ["abc", [1, 2], [None, 0, 0], [0, 0, np.nan]])
def test_a_field_that_is_none_ends_with_a_sentence(field):
    atoms = molecule("H2O")
    atoms.calc = SEGNNCalculator(Potential(model_config(cues=["external_field"], **SMALL), [1, 8]), domain="ignore")
    atoms.info["external_field"] = field
    with pytest.raises(StructureError, match="expected three finite numbers"):
        run_md(atoms, config(steps=1, ensemble="bussi", velocities="maxwell", field=None), progress=False)


def test_vectors_of_atoms_turn_a_molecule_unless_only_their_angles_count():
    atoms, settings = molecule("H2O"), config(field=None)
    atoms.arrays |= {"initial_magmoms": np.ones((3, 3)), "axes": np.zeros((3, 3))}
    for cue, turned in (
        ("initial_magmoms", False),
        ({"name": "initial_magmoms", "spin_orbit": True}, True),
        ({"name": "axes", "kind": "polar"}, False),
    ):
        atoms.calc = SEGNNCalculator(Potential(model_config(cues=[cue], **SMALL), [1, 8]).double(), domain="ignore")
        assert is_turned(atoms, settings) == turned
    atoms.arrays["axes"][0, 1] = 1.0
    assert is_turned(atoms, settings)


def test_the_field_is_that_of_the_run_alone(tmp_path):
    atoms, restart = molecule("H2O"), str(tmp_path / "run.npz")
    atoms.calc = sum_of(SMALL)
    alone = atoms.get_potential_energy()
    run_md(atoms, config(steps=0, field=(0, 0.2, 0.3), restart=restart), progress=False)
    assert "external_field" not in atoms.info and atoms.get_potential_energy() == alone
    atoms.info["external_field"] = [0, 0, 0.01]
    with pytest.raises(ConfigError, match=r"field was \(0.0, 0.2, 0.3\) and is \(0.0, 0.0, 0.1\). Only steps"):
        run_md(atoms, config(steps=1, field=(0, 0, 0.1), restart=restart), progress=False)
    assert atoms.info["external_field"] == [0, 0, 0.01]


def test_work_that_is_none_is_refused(tmp_path):
    restart = tmp_path / "run.npz"
    run_md(ion(), config(steps=2, field_frequency=100, restart=str(restart)), progress=False)
    arrays = dict(np.load(restart))
    for wrong in (np.array(1j), np.array(True), np.zeros(2)):
        np.savez(restart, **{**arrays, "work": wrong})
        with pytest.raises(MDError, match="cannot be read: work of an unexpected type"):
            run_md(ion(), config(steps=4, field_frequency=100, restart=str(restart)), progress=False)


def test_periodic_ions_do_no_work_that_is_known():
    atoms = molecule("H2O", vacuum=4.0, pbc=True)
    atoms.calc, atoms.info["charge"] = sum_of(SMALL).mixer.calcs[0], 1
    with pytest.raises(ConfigError, match="gives no dipole here, as of periodic ions"):
        run_md(atoms, config(steps=2, field=(0, 0, 0), field_frequency=300), progress=False)


@pytest.mark.parametrize("ensemble", ["bussi", "nhc"])
def test_thermostats_that_would_freeze_a_pulled_ion_are_refused(ensemble):
    atoms = molecule("H2O")
    atoms.calc, atoms.info["charge"] = sum_of(SMALL).mixer.calcs[0], 1
    with pytest.raises(ConfigError, match=r"a field pulls the ion away.*use 'nve' or 'langevin'"):
        run_md(atoms, config(ensemble=ensemble, steps=2, field=(0, 0, 0.1)), progress=False)
    atoms.info["external_field"] = [0, 0, 0.1]
    with pytest.raises(ConfigError, match="a field pulls the ion away"):
        run_md(atoms, config(ensemble=ensemble, steps=2, field=None), progress=False)
    run_md(atoms, config(ensemble="langevin", steps=2, field=(0, 0, 0.1)), progress=False)
    run_md(atoms, config(ensemble=ensemble, steps=2, field=(0, 0, 0)), progress=False)


def test_a_field_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("water.xyz", molecule("H2O"))
    command = ("md", "water.xyz", "--model", "acetylacetone-pbe", "--steps", "1", "--field", "0", "0", "0.1")
    assert "field is (0.0, 0.0, 0.1), but SEGNNCalculator knows no external_field" in segnn(*command).output
