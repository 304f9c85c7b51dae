"""The shipped potentials: they reproduce their reference structures, and their cards tell what they are."""

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

NAMES = ("acetylacetone-pbe", "silicon-pbe", "water-pbe0")


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
