"""Spectra of motions that are known: places, areas and polarisations of bands, units, quanta."""

import math

import ase.io
import numpy as np
import pytest
import scipy.constants as si
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixBondLengths
from helpers.command_line import segnn
from scipy.integrate import trapezoid

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError
from segnn_ase.base.extxyz import writable
from segnn_ase.md import MDConfig, run_md
from segnn_ase.md.spectra import infrared, raman, unfolded
from segnn_ase.md.velocities import kinetic_temperature
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.properties.files import save_properties
from segnn_ase.properties.model import PropertyModel
from segnn_ase.properties.targets import Target
from segnn_ase.store.model_file import save_potential

KM_PER_MOL = 42.2561  # of (D/Å)^2/amu, as textbooks have it
DEBYE = 0.2081943  # e Å
KELVIN = 300.0


def oscillator(wavenumber, timestep=1.0, frames=200_000, seed=0):
    """Q, Å amu^(1/2), of a harmonic oscillator with the energy kT, whose phase is lost now and then."""
    rng = np.random.default_rng(seed)
    omega = 2 * np.pi * 100 * si.c * wavenumber
    rate = math.sqrt(si.k * KELVIN / si.atomic_mass)  # of dQ/dt, m/s amu^(1/2)
    lost, phase, amplitude = rng.random(frames) < 2e-3, np.zeros(frames), np.zeros(frames)
    kicks = np.cumsum(lost)
    phase = rng.uniform(0, 2 * np.pi, kicks[-1] + 1)[kicks]
    amplitude = np.sqrt(rng.exponential(2.0, kicks[-1] + 1))[kicks]  # <v^2> = kT on average
    return 1e10 * rate / omega * amplitude * np.cos(omega * 1e-15 * timestep * np.arange(frames) + phase)


def area(one, low, high):
    inside = (one.wavenumbers >= low) & (one.wavenumbers <= high)
    return trapezoid(one.intensities[inside], one.wavenumbers[inside])


@pytest.mark.parametrize("wavenumber, timestep", [(1600, 1.0), (3000, 2.0), (400, 4.0)])
def test_a_band_has_its_place_and_its_area(wavenumber, timestep):
    slope = np.array([0.5, -0.3, 0.2])  # D/Å/amu^(1/2)
    dipoles = oscillator(wavenumber, timestep)[:, None] * slope * DEBYE + [1.0, 2.0, 3.0]
    found = infrared(dipoles, timestep, KELVIN, resolution=20.0)
    assert found.wavenumbers[found.intensities.argmax()] == pytest.approx(wavenumber, abs=found.resolution)
    expected = KM_PER_MOL * (slope**2).sum()
    assert area(found, wavenumber - 300, wavenumber + 300) == pytest.approx(expected, rel=0.1)
    assert found.resolution == pytest.approx(20.0, rel=0.1)


def test_dipoles_that_rest_absorb_nothing():
    assert not infrared(np.ones((100, 3)), 1.0, 300.0).intensities.any()


def test_a_finer_resolution_tells_two_bands_apart():
    dipoles = np.zeros((100_000, 3))
    for wavenumber in (1600, 1640):
        dipoles[:, 0] += np.cos(2 * np.pi * 100 * si.c * wavenumber * 1e-15 * np.arange(len(dipoles)))
    fine, coarse = (infrared(dipoles, 1.0, 300.0, resolution=r) for r in (5.0, 200.0))
    for one, apart in ((fine, True), (coarse, False)):
        between, band = (np.interp(x, one.wavenumbers, one.intensities) for x in (1620, 1600))
        assert (between < 0.1 * band) == apart


def test_scattering_of_a_sphere_is_not_depolarised_and_weighs_more():
    """45 a'^2 against 7 gamma'^2, at equal wavenumbers; the largest is 1."""
    q = oscillator(1000, frames=50_000)[:, None, None]
    p = oscillator(2000, frames=50_000, seed=1)[:, None, None]
    sphere, ellipsoid = np.eye(3), np.diag([2.0, -1.0, -1.0]) / 3  # a' = 1, gamma' = 1
    found = raman(q * sphere + p * ellipsoid, 1.0, KELVIN, resolution=20.0)
    heights = [area(found, w - 200, w + 200) for w in (1000, 2000)]
    laser, kt = 1e7 / 532, KELVIN * si.k / (100 * si.h * si.c)
    weights = [(laser - w) ** 4 / w / (1 - math.exp(-w / kt)) for w in (1000, 2000)]
    assert heights[1] / heights[0] == pytest.approx(7 / 45 * weights[1] / weights[0], rel=0.15)
    assert found.intensities.max() == 1.0 and found.intensities[0] == 0.0


def test_a_rotation_changes_no_spectrum():
    rng = np.random.default_rng(0)
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    dipoles, alpha = rng.normal(size=(500, 3)), rng.normal(size=(500, 3, 3))
    alpha = alpha + alpha.swapaxes(1, 2)
    pairs = (infrared, dipoles, dipoles @ matrix.T), (raman, alpha, matrix @ alpha @ matrix.T)
    for of, before, after in pairs:
        one, other = (of(x, 1.0, 300.0) for x in (before, after))
        np.testing.assert_allclose(one.intensities, other.intensities, rtol=1e-9, atol=1e-12)


def test_quanta_are_taken_out():
    rng = np.random.default_rng(0)
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [0.5, 0.5, 7.0]])
    smooth = np.cumsum(0.1 * rng.normal(size=(200, 3)), axis=0)
    folded = smooth + rng.integers(-3, 4, size=(200, 3)) @ cell
    np.testing.assert_allclose(np.diff(unfolded(folded, cell), axis=0), np.diff(smooth, axis=0), atol=1e-10)


@pytest.mark.parametrize(
    "values, timestep, temperature, reason",
    [
        (np.zeros((10, 3)), 1.0, 300.0, "10 frames; expected at least 64"),
        (np.zeros((100, 2)), 1.0, 300.0, r"finite numbers \(T, 3\)"),
        (np.full((100, 3), np.nan), 1.0, 300.0, "finite numbers"),
        (np.zeros((100, 3)), 0.0, 300.0, "timestep is 0.0"),
        (np.zeros((100, 3)), 1.0, -1.0, "temperature is -1.0"),
    ],
)
def test_what_gives_no_spectrum_is_refused(values, timestep, temperature, reason):
    with pytest.raises(ConfigError, match=reason):
        infrared(values, timestep, temperature)


def vibrating(frames=400, timestep=2.0, **info):
    """CO that vibrates, with its dipole and polarizability."""
    found = []
    for n, x in enumerate(oscillator(1500, timestep=timestep, frames=frames)):
        atoms = Atoms("CO", [(0, 0, 0), (0, 0, 1.1 + x)], info={key: of(n) for key, of in info.items()})
        atoms.info["polarizability"] = (2.0 + x) * np.eye(3)
        atoms.calc = SinglePointCalculator(atoms, dipole=np.array([0.0, 0.0, 0.1 + x]))
        found.append(atoms)
    return found


def made(folder, frames, *options):
    ase.io.write(folder / "md.xyz", frames)
    return segnn("spectrum", folder / "md.xyz", "--out", folder / "s", *options)


def test_the_command_takes_what_frames_carry(tmp_path):
    result = made(tmp_path, vibrating(), "--timestep", 2, "--temperature", 300)
    assert result.exit_code == 0 and "calculator dipole, taken to be in e Å" in result.stdout, result.output
    for name in ("infrared", "raman"):
        rows = np.genfromtxt(tmp_path / f"s.{name}.csv", delimiter=",", names=True)
        wavenumbers, intensities = (rows[column] for column in rows.dtype.names)
        assert wavenumbers[intensities.argmax()] == pytest.approx(1500, abs=60)
    assert (tmp_path / "s.png").stat().st_size > 1000
    before = (tmp_path / "s.infrared.csv").read_bytes()
    again = made(tmp_path, vibrating(), "--timestep", 2, "--temperature", 200)
    assert again.exit_code == 1 and "overwrite it" in again.stderr
    assert (tmp_path / "s.infrared.csv").read_bytes() == before
    assert made(tmp_path, vibrating(), "--timestep", 2, "--temperature", 200, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "frames, options, reason",
    [
        (lambda: vibrating(100), (), "do not say when they are"),
        (lambda: vibrating(100, time_fs=lambda n: 2.0 * n), (), "have no velocities; give it"),
        (lambda: vibrating(100, time_fs=lambda n: 2.0 * n), ("--timestep", 1), "but frames are 2 fs apart"),
        (lambda: vibrating(100, time_fs=lambda n: 2.0 * n + (n > 50)), (), "frames are 2 to 3 fs apart"),
        (lambda: vibrating(20), ("--timestep", 2), "20 frames; expected at least 64"),
        (lambda: [*vibrating(70), Atoms("CO2")], ("--timestep", 2), "other atoms than the first frame"),
        (lambda: [Atoms("CO", [(0, 0, 0), (0, 0, 1.1)])] * 70, ("--timestep", 2, "--temperature", 9), "give a model"),
        (lambda: vibrating(70), ("--timestep", 2, "--temperature", 9, "--resolution", 0), "resolution is 0.0"),
        (lambda: vibrating(70), ("--timestep", 2, "--temperature", 9, "--laser", 3), "laser is 3.0"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, frames, options, reason):
    result = made(tmp_path, frames(), *options)
    assert result.exit_code == 1 and reason in result.stderr, result.output
    assert not list(tmp_path.glob("s.*"))


def test_dipoles_of_two_kinds_are_no_series(tmp_path):
    frames = vibrating(80)
    for atoms in frames[::20]:
        atoms.info["REF_dipole"] = [0.0, 0.0, 9.0]
    result = made(tmp_path, frames, "--timestep", 2, "--temperature", 300)
    assert result.exit_code == 1 and "in some frames here, in others there" in result.stderr


def test_a_stretch_of_carbon_monoxide_that_comes_below_is_told_of(tmp_path):
    frames = [Atoms("CO", [[0, 0, 0], [0, 0, 1.13 + 0.01 * math.cos(n)]]) for n in range(64)]
    for n, atoms in enumerate(frames):
        atoms.info["dipole"] = [0.0, 0.0, math.cos(n)]
    ase.io.write(tmp_path / "co.xyz", frames)
    options = ("--temperature", "300", "--out", str(tmp_path / "s"))
    for timestep, told in ((10, True), (1, False)):
        done = segnn("spectrum", str(tmp_path / "co.xyz"), "--timestep", str(timestep), "--overwrite", *options)
        assert done.exit_code == 0 and ("far apart" in done.stdout) is told, done.output


def test_frames_that_are_too_far_apart_are_told_of(tmp_path):
    frames = vibrating(80)
    for atoms in frames:
        atoms.symbols[0] = "H"
    told = {}
    for timestep in (2, 10):
        folder = tmp_path / str(timestep)
        folder.mkdir()
        told[timestep] = made(folder, frames, "--timestep", timestep, "--temperature", 300).stdout
    assert "nothing is seen above 1501 cm^-1" in told[10] and "nothing is seen" not in told[2]


def test_quanta_of_a_slab_are_those_of_its_periodic_directions():
    smooth = np.cumsum(np.full((50, 3), 0.4), axis=0)
    cell = np.diag([5.0, 6.0, 1.0])
    folded = smooth - np.floor(smooth @ np.linalg.inv(cell)) @ np.diag([5.0, 6.0, 0.0])
    found = unfolded(folded, cell, (True, True, False))
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(smooth, axis=0), atol=1e-10)


@pytest.mark.parametrize("ensemble", ["nve", "langevin"])
def test_the_temperature_is_that_of_the_run(tmp_path, ensemble):
    """A molecule that neither moves nor turns as a whole has its heat in fewer degrees of freedom."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = EMT()
    settings = {"ensemble": ensemble, "steps": 400, "timestep": 0.5, "temperature": 300, "save_every": 4, "seed": 1}
    run_md(
        atoms, MDConfig(trajectory=str(tmp_path / "md.xyz"), log=str(tmp_path / "md.csv"), **settings), progress=False
    )
    frames = ase.io.read(tmp_path / "md.xyz", ":")
    log = np.genfromtxt(tmp_path / "md.csv", delimiter=",", names=True)
    mean = np.mean([kinetic_temperature(frame) for frame in frames])
    assert mean == pytest.approx(log["temperature"].mean(), rel=0.08)
    assert frames[1].info["time_fs"] == 2.0


def test_the_temperature_of_rigid_molecules_is_that_of_the_run(tmp_path):
    """Extended XYZ holds no bonds, which is told."""
    atoms = molecule("H2O")
    atoms.calc = EMT()
    atoms.set_constraint(FixBondLengths([(0, 1), (0, 2), (1, 2)]))
    out = {"trajectory": str(tmp_path / "md.xyz"), "log": str(tmp_path / "md.csv")}
    settings = {"ensemble": "langevin", "steps": 100, "timestep": 0.5, "temperature": 300, "seed": 1}
    run_md(atoms, MDConfig(**out, log_every=1, save_every=1, **settings), progress=False)
    frames, log = ase.io.read(out["trajectory"], ":"), np.genfromtxt(out["log"], delimiter=",", names=True)
    assert writable(atoms)[1] == ["constraint FixBondLengths"] and not frames[0].constraints
    of_frames = np.mean([kinetic_temperature(frame) for frame in frames])
    assert of_frames < 0.8 * log["temperature"].mean()
    for frame in frames:
        frame.info["dipole"] = frame.positions[0]
    told = made(tmp_path, frames).stdout
    assert f"{log['temperature'].mean():.1f} K" in told, told


def test_a_model_says_the_dipoles_of_a_run(tmp_path):
    target = Target("dipole", "structure", (3,), "1x1o", "sum")
    model = PropertyModel(model_config("fast", hidden_irreps="4x0e+4x1o"), [6, 8], [target])
    save_properties(tmp_path / "dipole.pt", model)
    frames = vibrating(80, time_fs=lambda n: 2.0 * n)
    result = made(tmp_path, frames, "--model", tmp_path / "dipole.pt", "--temperature", 300)
    assert result.exit_code == 0 and f"dipole: {tmp_path / 'dipole.pt'}" in result.stdout, result.output
    dipoles = np.array([one["dipole"] for one in model.predict_all(frames)])
    rows = np.genfromtxt(tmp_path / "s.infrared.csv", delimiter=",", names=True)
    expected = infrared(dipoles, 2.0, 300.0).intensities
    np.testing.assert_allclose(rows["absorption_km_cm_per_mol"], expected, rtol=1e-3, atol=1e-6 * expected.max())
    gap = target._replace(name="gap", shape=(), irreps="1x0e")
    gaps = PropertyModel(model_config("fast", hidden_irreps="4x0e"), [6, 8], [gap])
    save_properties(tmp_path / "gap.pt", gaps)
    refused = made(tmp_path, frames, "--model", tmp_path / "gap.pt", "--temperature", 300, "--overwrite")
    assert refused.exit_code == 1 and "which knows gap; expected dipole or polarizability" in refused.stderr


def test_a_potential_that_knows_fields_says_dipoles_and_others_are_refused(tmp_path):
    small = {"hidden_irreps": "4x0e+4x1o+4x2e", "lmax_attr": 1, "radial_hidden": (4,), "core_repulsion": False}
    frames = vibrating(80)
    for name, cues in (("field", ["external_field"]), ("none", [])):
        save_potential(tmp_path / f"{name}.pt", Potential(model_config(cues=cues, **small), [6, 8]).double())
    options = ("--timestep", 2, "--temperature", 300, "--model")
    done = made(tmp_path, frames, *options, tmp_path / "field.pt")
    assert done.exit_code == 0 and "dipole: " in done.stdout, done.output
    rows = np.genfromtxt(tmp_path / "s.infrared.csv", delimiter=",", names=True)
    wavenumbers, intensities = (rows[column] for column in rows.dtype.names)
    assert wavenumbers[intensities.argmax()] == pytest.approx(1500, abs=60)
    refused = made(tmp_path, frames, *options, tmp_path / "none.pt", "--overwrite")
    assert refused.exit_code == 1 and "knows no dipoles" in refused.stderr
    said = segnn("predict", tmp_path / "field.pt", tmp_path / "md.xyz", tmp_path / "out.xyz")
    assert said.exit_code == 0, said.output
    first = ase.io.read(tmp_path / "out.xyz", 0)
    expected = SEGNNCalculator(tmp_path / "field.pt").get_property("dipole", Atoms("CO", frames[0].positions))
    assert np.allclose(first.get_dipole_moment(), expected, atol=1e-6)
