"""The shipped potentials: they reproduce their reference structures, and their cards tell what they are."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from segnn_ase import SEGNNCalculator, load_potential
from segnn_ase.base.errors import DomainError, MDError
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.md.velocities import set_velocities
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.store.shipped import find_model, shipped_potentials

NAMES = ("acetylacetone-pbe", "lithium-pbe", "molybdenum-pbe", "silicon-pbe", "water-pbe0")
FOLDER = Path(__file__).parent.parent / "potentials"


@pytest.fixture
def shipping(monkeypatch):
    """The modules that put potentials into their folders."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cards
    import ship
    import starts

    return SimpleNamespace(cards=cards, ship=ship, starts=starts)


def test_all_are_found_by_name():
    assert set(NAMES) <= set(shipped_potentials())
    for name in NAMES:
        assert load_potential(name).species


@pytest.mark.parametrize("name", NAMES)
def test_card_and_files(name):
    folder = find_model(name).parent
    assert (folder / "model.pt").stat().st_size < 4_000_000
    assert (folder / "train.toml").is_file()
    card = (folder / "README.md").read_text()
    for word in ("Data", "Licence", "Level of theory", "Errors", "Valid for", "Not for"):
        assert word in card
    errors = load_with_metadata(name)[1]["errors"]
    assert any("test" in key for key in errors)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_card_are_those_of_the_file(name, shipping):
    card = (FOLDER / name / "README.md").read_text()
    lines = shipping.cards.of_model(*load_with_metadata(name))
    assert shipping.cards.filled(card, "model", lines) == card
    forces = next(row["forces_rmse"] for key, row in load_with_metadata(name)[1]["errors"].items() if "test" in key)
    assert f"forces {1e3 * forces:.1f} / " in card


def test_results_go_into_the_card(shipping, tmp_path):
    """Each into its place, of this potential alone; other text stays."""
    folder = tmp_path / "silicon-pbe"
    shutil.copytree(FOLDER / "silicon-pbe", folder)
    run = {"potential": "silicon-pbe", "atoms": 64, "ps": 50, "dtype": "float32", "timestep_fs": 2.0, "slope": 1.2e-8}
    rows = [{**run, "run": "npt", "temperature": 501.0, "pressure": 0.01}, {"potential": "water-pbe0"}]
    (tmp_path / "conservation.json").write_text(json.dumps({"rows": rows}))
    a = {"potential": "silicon-pbe", "property": "C11", "unit": "GPa", "model": 150.2, "dft": 153, "experiment": None}
    a["sources"] = "PBE, somebody"
    (tmp_path / "properties_si.json").write_text(json.dumps({"rows": [a]}))
    before = (folder / "README.md").read_text()
    shipping.cards.write_card(folder, str(tmp_path / "conservation.json"), str(tmp_path / "properties_si.json"))
    after = (folder / "README.md").read_text()
    told = "64 atoms, 50 ps, float32, 2 fs: slope of the conserved energy 1.2e-08 eV/atom/ps, 501 K, 0.01 GPa."
    assert f"\n  - `npt`: {told}\n<!-- end -->" in after
    assert "\n| C11 | 150.2 | 153 |  | GPa | PBE, somebody |\n<!-- end -->" in after
    assert before.partition("<!-- conservation -->")[0] == after.partition("<!-- conservation -->")[0]
    with pytest.raises(ValueError, match=r"other.json: its name has none of conservation, properties"):
        (tmp_path / "other.json").write_text('{"rows": []}')
        shipping.cards.write_card(folder, str(tmp_path / "other.json"))


def test_every_potential_is_in_the_table(shipping):
    assert set(shipped_potentials()) <= set(shipping.ship.POTENTIALS)
    for name in shipped_potentials():
        entry, species = shipping.ship.POTENTIALS[name], load_potential(name).species
        for structure in (entry.first, entry.second):
            assert set(structure.build().numbers) == set(species)


def test_restart_files_of_earlier_versions_name_the_same_weights():
    """Settings that came later, and are as it was before, are no part of what tells potentials apart."""
    assert SEGNNCalculator("silicon-pbe").parameters["weights"] == ["6eed2872d8f72ca2"]


def test_molecules_are_built_whole_and_breaking_is_seen(shipping):
    starts = shipping.starts
    box = starts.electrolyte(1, density=0.9)
    assert box.get_chemical_formula() == "C11H20O9" and len(starts.bonds(box)) == 2 * 38
    assert abs(box.get_masses().sum() / units.mol / (1e-24 * box.get_volume()) - 0.9) < 1e-9
    starts.check_molecules(box, box)
    broken, met = box.copy(), starts.water_dimer()
    broken.positions[-1] += [0.9, 0.9, 0]
    with pytest.raises(RuntimeError, match=r"a molecule broke or two met: .*C.*H39"):
        starts.check_molecules(broken, box)
    met.positions[4] = met.positions[1] + [0, 0.0, 1.1]
    with pytest.raises(RuntimeError, match=r"two met|closer than 1\.2 Å"):
        starts.check_molecules(met, starts.water_dimer())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-7), ("float32", 1e-3)])
def test_reference_structures(name, dtype, tolerance):
    calculator = SEGNNCalculator(name, dtype=dtype, domain="ignore")
    frames = ase.io.read(find_model(name).parent / "reference.xyz", ":")
    assert len(frames) == 2
    for stored in frames:
        atoms = stored.copy()
        atoms.calc = calculator
        assert abs(atoms.get_potential_energy() - stored.get_potential_energy()) < tolerance * len(atoms)
        np.testing.assert_allclose(atoms.get_forces(), stored.get_forces(), atol=tolerance)
        if atoms.pbc.all():
            np.testing.assert_allclose(atoms.get_stress(), stored.get_stress(), atol=tolerance)
        outside = [way.kind for way in calculator.results["outside_domain"]]
        dimer = name == "water-pbe0" and len(atoms) == 6  # it knows the liquid only
        assert ("neighbors" in outside) if dimer else not outside
        # the dimer has two H in the core
        assert (
            0 < calculator.results["energy_std"] < (0.04 if dimer else 0.03) * len(atoms)
            and (calculator.results["forces_std"] > 0).all()
        )


def nve_energies(dtype: str, timestep: float, duration: float) -> tuple[np.ndarray, np.ndarray]:
    """Times (ps) and total energies per atom (eV) of an NVE run of acetylacetone near 300 K."""
    atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
    atoms.calc = SEGNNCalculator("acetylacetone-pbe", dtype=dtype)
    set_velocities(atoms, 300, np.random.default_rng(1))
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    energies = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy() / len(atoms)))
    dynamics.run(round(duration / timestep))
    return 1e-3 * timestep * np.arange(len(energies)), np.array(energies)


@pytest.mark.slow
def test_T14_nve_conserves_energy():
    """Slope of the total energy of a trained model, and fluctuations that shrink with the square of the step."""
    for dtype, limit in (("float64", 1e-6), ("float32", 1e-5)):
        time, energy = nve_energies(dtype, 0.25, 400.0)
        # over a window this short the slope also sees the (bounded) fluctuation: allow its own standard error
        (slope, _), covariance = np.polyfit(time, energy, 1, cov=True)
        assert abs(slope) < limit + 5 * np.sqrt(covariance[0, 0])
    rough = nve_energies("float64", 1.0, 100.0)[1].std()
    fine = nve_energies("float64", 0.5, 100.0)[1].std()
    assert 3.0 < rough / fine < 5.0


def melting_silicon() -> Atoms:
    atoms = bulk("Si", cubic=True, a=5.47).repeat(2)
    set_velocities(atoms, 6000, np.random.default_rng(0))
    return atoms


def colliding_molecules() -> Atoms:
    one = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
    other = one.copy()
    other.translate([8.0, 0, 0])
    pair = one + other
    pair.set_momenta(pair.get_masses()[:, None] * np.repeat([[0.05, 0, 0], [-0.05, 0, 0]], len(one), axis=0))
    return pair


@pytest.mark.parametrize(
    ("name", "build", "settings", "message"),
    [
        ("silicon-pbe", melting_silicon, {"ensemble": "langevin", "temperature": 6000, "timestep": 1.0}, "Si"),
        (
            "acetylacetone-pbe",
            colliding_molecules,
            {"ensemble": "nve", "timestep": 0.5},
            "neighbours; in training it had",
        ),
    ],
)
def test_a_run_that_leaves_the_domain_stops(name, build, settings, message, tmp_path):
    atoms = build()
    atoms.calc = SEGNNCalculator(name, domain="ignore")
    names = {"trajectory": tmp_path / "md.xyz", "restart": tmp_path / "md.npz"}
    with pytest.raises(
        MDError, match=rf"outside what .* trained on: .*{message}.*What would help: labels for"
    ) as caught:
        run_md(atoms, MDConfig(steps=2000, stop_outside_domain=True, **settings, **names), progress=False)
    step = int(str(caught.value).split()[3])
    assert ase.io.read(tmp_path / "md_last_good.extxyz").info["step"] == step - 1 > 0
    atoms.get_forces()  # the atoms hold the last good frame
    assert not atoms.calc.results["outside_domain"]
    refused = ase.io.read(tmp_path / "md_refused.extxyz")
    refused.calc = SEGNNCalculator(name, domain="raise")
    with pytest.raises(DomainError):
        refused.get_forces()
