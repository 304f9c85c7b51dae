"""Molecular dynamics: conservation, ensembles, exact restarts after any kind of death, guards, g(r)."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.io import read
from helpers.dynamics import VARIANTS, Morse, config, contents, crystal, run, state, trimer
from helpers.systems import NAMED

from segnn_ase.base.errors import ConfigError, MDError, OutOfTime, StructureError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.md import ensembles, velocities
from segnn_ase.md.analysis import energy_slope, radial_distribution
from segnn_ase.md.outputs import COLUMNS
from segnn_ase.md.run import run_md


def test_energy_fluctuates_with_the_square_of_the_timestep():
    spread = {}
    for dt in (1.0, 2.0, 4.0):
        result = run(crystal(), config(timestep=dt, steps=round(400 / dt), log_every=1))
        spread[dt] = result.log["total"].std()
        assert abs(result.energy_slope) < 1e-4
    assert 3.3 < spread[2.0] / spread[1.0] < 4.7
    assert 3.3 < spread[4.0] / spread[2.0] < 4.7


@pytest.mark.parametrize("name", ["langevin", "bussi", "nhc", "npt", "npt_full"])
def test_mean_temperature(name):
    result = run(crystal(), config(steps=1500, temperature=400, friction=0.02, log_every=5, seed=3, **VARIANTS[name]))
    settled = result.log["temperature"][100:].mean()
    assert settled == pytest.approx(400, abs=25)
    conserved = result.log["conserved"]
    if name == "langevin":
        assert np.isnan(conserved).all() and np.isnan(result.energy_slope)
    else:
        assert np.ptp(conserved) < 0.05 * np.ptp(result.log["total"])


@pytest.mark.parametrize("ensemble, error", [("bussi", 0.25), ("nhc", 0.1)])
def test_thermostat_counts_only_what_moves(ensemble, error):
    """Of a molecule at rest 3N - 6 degrees of freedom are heated; ASE's count would make it three times as hot."""
    atoms = trimer()
    result = run(atoms, config(ensemble=ensemble, steps=4000, temperature=100, tdamp=100, seed=1))
    assert result.log["kinetic"].mean() == pytest.approx(1.5 * units.kB * 100, rel=error)
    assert result.mean_temperature == pytest.approx(100, rel=error)


def test_full_barostat_has_six_degrees_of_freedom():
    """ASE counts nine, which gives the cell 1.5 times the temperature and twice the fluctuation of the volume."""
    atoms = crystal()
    settings = config(ensemble="npt", npt_cell="full", timestep=4.0, pdamp=100.0)
    rng = np.random.default_rng(0)
    velocities.set_velocities(atoms, 300, rng)
    dynamics = ensembles.make_dynamics(atoms, settings, rng, velocities.degrees_of_freedom(atoms, centre_moves=False))
    energies = []
    for _ in range(1500):
        dynamics.step()
        energies.append(dynamics._get_cell_kinetic_energy())
    assert np.mean(energies) == pytest.approx(0.5 * 6 * units.kB * 300, rel=0.2)


@pytest.mark.parametrize("cell", ["isotropic", "full"])
def test_pressure_moves_the_volume(cell):
    volumes = {}
    for pressure in (-3.0, 15.0):
        settings = {"ensemble": "npt", "npt_cell": cell, "pressure": pressure, "pdamp": 100, "steps": 600}
        result = run(crystal(), config(**settings))
        volumes[pressure] = result.log["volume"][40:].mean()
        assert result.log["pressure"][40:].mean() == pytest.approx(pressure, abs=2.5)
    assert volumes[15.0] < crystal().get_volume() * 0.98 and volumes[15.0] < volumes[-3.0]


@pytest.mark.parametrize("name", NAMED)
def test_energy_is_conserved_in_every_kind_of_cell(name, small_potential, tmp_path):
    """The network on each named system at 100 K; it is stopped halfway and goes on from its files."""
    atoms, settings = NAMED[name](), config(tmp_path, steps=4, timestep=0.02, temperature=100, log_every=1)
    atoms.calc = SEGNNCalculator(small_potential("fast"), accelerate="off")
    run(atoms, settings)
    atoms = NAMED[name]()
    atoms.calc = SEGNNCalculator(small_potential("fast"), accelerate="off")
    result = run(atoms, settings.model_copy(update={"steps": 8}))
    moved = np.ptp(result.log["kinetic"])
    assert len(result.log["total"]) == 9 and np.ptp(result.log["total"]) < max(0.02 * moved, 1e-9 * len(atoms))
    assert np.allclose(atoms.get_center_of_mass(), NAMED[name]().get_center_of_mass(), atol=1e-9)


def test_works_with_calculators_of_ase():
    atoms = bulk("Ar", a=5.3, cubic=True) * 2
    atoms.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=5.2, smooth=True)
    result = run(atoms, config(steps=60, timestep=5.0, temperature=30, log_every=1))
    assert np.ptp(result.log["total"]) < 0.02 * np.ptp(result.log["potential"])


def crash():
    raise RuntimeError("power failure")


@pytest.mark.parametrize("suffix", [".traj", ".extxyz"])
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_is_the_same_to_the_bit(tmp_path, name, suffix):
    settings = {"frames": f"md{suffix}", "save_every": 1, "log_every": 3, "checkpoint_every": 20, "seed": 5}
    whole, parts = (config(tmp_path / folder, steps=70, **settings, **VARIANTS[name]) for folder in ("whole", "parts"))
    uninterrupted, atoms = crystal(), crystal()
    expected = run(uninterrupted, whole)
    run(atoms, parts.model_copy(update={"steps": 13}))
    doomed = crystal(plan={80 if name.startswith("npt") else 52: crash})
    with pytest.raises(RuntimeError, match="power failure"):
        run(doomed, parts)
    lengths = [len(content) for content in contents(parts)]
    result = run(atoms := crystal(), parts)
    assert state(atoms) == state(uninterrupted)
    assert contents(parts) == contents(whole)
    assert all(old < len(new) for old, new in zip(lengths, contents(parts), strict=True))
    assert [frame.info["step"] for frame in read(parts.trajectory, ":")] == list(range(71))
    for column in COLUMNS:
        np.testing.assert_array_equal(result.log[column], expected.log[column])
    assert result.energy_slope == pytest.approx(expected.energy_slope, nan_ok=True, rel=0, abs=0)


KILLER = """
import os, random, signal, sys, time
sys.path[:0] = {tests!r}
from pathlib import Path
from helpers.dynamics import config, crystal, run

moments, deaths, alive = random.Random(1), 0, True
while alive:
    process = os.fork()
    if process == 0:
        run(crystal(delay=0.001), config(Path({folder!r}), **{settings!r}))
        os._exit(0)
    time.sleep(moments.uniform(0.0, 0.4))
    os.kill(process, signal.SIGKILL)
    alive = os.waitpid(process, 0)[1] == signal.SIGKILL
    deaths += alive
print(deaths)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    settings = {"ensemble": "langevin", "steps": 300, "save_every": 1, "log_every": 1, "checkpoint_every": 7, "seed": 2}
    settings |= {"frames": "md.traj"}
    whole, killed = config(tmp_path / "whole", **settings), config(tmp_path / "killed", **settings)
    run(crystal(), whole)
    code = KILLER.format(tests=sys.path, folder=str(tmp_path / "killed"), settings=settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # fork wants a single thread
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_save(tmp_path, number):
    whole, stopped = (config(tmp_path / folder, steps=40, **VARIANTS["nhc"]) for folder in ("whole", "stopped"))
    run(uninterrupted := crystal(), whole)
    before = signal.getsignal(number)
    atoms = crystal(plan={20: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(KeyboardInterrupt, match="after step 17 of 40; the same call goes on"):
        run(atoms, stopped)
    assert signal.getsignal(number) is before
    result = run(atoms := crystal(), stopped)
    assert state(atoms) == state(uninterrupted) and contents(stopped) == contents(whole)
    assert result.steps == 40


def test_out_of_time_it_stops_saved_and_goes_on_to_the_same_bits(tmp_path):
    whole, parts = (config(tmp_path / folder, steps=6, log_every=1, **VARIANTS["nhc"]) for folder in ("whole", "parts"))
    run(uninterrupted := crystal(), whole)
    for step in range(1, 6):
        with pytest.raises(OutOfTime, match=f"after step {step} of 6; the same call goes on from"):
            run(crystal(), parts.model_copy(update={"max_minutes": 1e-9}))
    run(atoms := crystal(), parts.model_copy(update={"max_minutes": 1.0}))  # another budget is no other run
    assert state(atoms) == state(uninterrupted) and contents(parts) == contents(whole)


def test_finished_run_returns_its_result_again(tmp_path):
    settings = config(tmp_path, steps=30)
    first = run(crystal(), settings)
    again = run(atoms := crystal(), settings)
    assert atoms.calc.count <= 2 and np.isnan(again.ms_per_step)
    np.testing.assert_array_equal(again.log["total"], first.log["total"])
    np.testing.assert_array_equal(read(settings.trajectory, -1).info["step"], 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_without_a_log_the_energy_is_still_measured_from_the_first_step(name, tmp_path):
    settings = config(steps=6, log_every=1, restart=str(tmp_path / "md.npz"), **VARIANTS[name])
    first = run(crystal(), settings)
    again = run(crystal(), settings.model_copy(update={"steps": 9}))
    np.testing.assert_array_equal(again.log["step"], [0, 7, 8, 9])
    assert again.log["total"][0] == first.log["total"][0] and again.n_atoms == 32


def test_log_and_trajectory_tell_the_same(tmp_path):
    settings = config(tmp_path, "md.traj", steps=20, log_every=5, save_every=10)
    result = run(atoms := crystal(), settings)
    assert Path(settings.log).read_text().splitlines()[0] == ",".join(COLUMNS)
    table = np.genfromtxt(settings.log, delimiter=",", names=True)
    np.testing.assert_array_equal(table["total"], table["potential"] + table["kinetic"])
    np.testing.assert_array_equal(table["time_fs"], [0, 10, 20, 30, 40])
    last = read(settings.trajectory, -1)
    assert state(last) == state(atoms)
    assert last.get_potential_energy() == table["potential"][-1] == result.log["potential"][-1]
    np.testing.assert_array_equal(last.get_forces(), atoms.get_forces())
    kinetic = 2 / 3 * last.get_kinetic_energy() / last.get_volume() / units.GPa
    pressure = kinetic - last.get_stress()[:3].mean() / units.GPa
    assert table["pressure"][-1] == pytest.approx(pressure)
    assert result.ns_per_day == pytest.approx(settings.timestep * 1e-6 * 86400e3 / result.ms_per_step)


def test_results_of_the_input_file_are_not_kept_in_frames(tmp_path):
    atoms = crystal()
    atoms.info["energy"] = 1.0
    atoms.arrays["forces"] = np.ones((32, 3))
    run(atoms, settings := config(tmp_path, steps=0))
    frame = read(settings.trajectory)
    assert frame.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
    assert atoms.info["energy"] == 1.0


def test_first_velocities():
    rng = np.random.default_rng(0)
    water, dimer, metal = molecule("CH3CH2OH"), molecule("N2"), crystal()
    for atoms, dof in ((water, 21), (dimer, 1), (metal, 93)):
        kinetic = []
        for _ in range(300):
            velocities.set_velocities(atoms, 300, rng)
            kinetic.append(atoms.get_kinetic_energy())
            np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-10)
            if not atoms.pbc.any():
                np.testing.assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-10)
        assert velocities.degrees_of_freedom(atoms, centre_moves=False) == dof
        assert velocities.degrees_of_freedom(atoms, centre_moves=True) == 3 * len(atoms)
        error = 4 * np.sqrt(2 / dof / 300)
        assert np.mean(kinetic) == pytest.approx(dof / 2 * units.kB * 300, rel=error)


def test_velocities_are_kept_on_request():
    momenta = np.random.default_rng(0).standard_normal((32, 3))
    for choice, kept in (("auto", True), ("keep", True), ("maxwell", False)):
        atoms = crystal()
        atoms.set_momenta(momenta)
        run(atoms, config(steps=0, velocities=choice))
        assert (state(atoms)[1] == momenta.tobytes()) is kept
    run(atoms := crystal(), config(steps=0, velocities="keep"))
    assert not atoms.get_momenta().any()


def test_fixed_atoms_stay():
    atoms = crystal()
    atoms.set_constraint(FixAtoms([0, 5]))
    start = atoms.get_positions()
    result = run(atoms, config(ensemble="langevin", steps=50))
    np.testing.assert_array_equal(atoms.positions[[0, 5]], start[[0, 5]])
    assert result.log["kinetic"][0] == pytest.approx(result.log["temperature"][0] * 45 * units.kB)


def fail():
    raise StructureError("atoms Cu 3 and Cu 4 are 0.01 Å apart")


def evaluation(step: int) -> int:
    return step + 2  # the first step takes two, the other one for the stress in the log


@pytest.mark.parametrize(
    "event, message", [(lambda: 1e3, "above max_temperature"), (lambda: np.nan, "temperature is nan"), (fail, "Cu 3")]
)
def test_guards_stop_with_the_last_good_frame(tmp_path, event, message):
    good = crystal()
    run(good, config(steps=24, log_every=100))
    atoms = crystal(plan={evaluation(25): event})
    settings = config(tmp_path, steps=100, log_every=100, max_temperature=3000)
    with pytest.raises(MDError, match=message) as caught:
        run(atoms, settings)
    assert "step 25" in str(caught.value) and "md_last_good.extxyz" in str(caught.value)
    assert state(atoms) == state(good)
    saved = read(tmp_path / "md_last_good.extxyz")
    np.testing.assert_allclose(saved.positions, good.positions, atol=1e-7)
    assert saved.info["step"] == 24


class Leaky(Morse):
    """Forces that are not the derivative of the energy."""

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        if "forces" in self.results:
            self.results["forces"] *= 1.2


def test_energy_drift_stops_nve():
    atoms = crystal()
    run(atoms, config(steps=100, max_energy_drift=0.001))
    atoms = crystal()
    atoms.calc = Leaky()
    with pytest.raises(MDError, match=r"max_energy_drift = 0.001"):
        run(atoms, config(steps=100, max_energy_drift=0.001))


class Committee(Morse):
    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results["forces_std"] = np.full((32, 3), 0.01 * self.count)  # one evaluation a step


def test_spread_of_a_committee_stops():
    atoms = crystal()
    atoms.calc = Committee()
    with pytest.raises(MDError, match=r"stopped at step 9 .*max_forces_std"):
        run(atoms, config(steps=100, max_forces_std=0.105, log_every=100))
    with pytest.raises(ConfigError, match="neither a committee"):
        run(crystal(), config(steps=1, max_forces_std=0.1))


class Unsure(Morse):
    """Uncertain in some steps."""

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        uncertain = self.count in (5, 6, 7, 20, 21, 22, 23)
        self.results["forces_std"] = np.full((32, 3), 1.0 if uncertain else 0.01)


@pytest.mark.parametrize(("allowed", "stopped"), [(0, 3), (2, 5), (3, 21), (4, None)])
def test_steps_in_a_row_may_be_uncertain(allowed, stopped):
    atoms = crystal()
    atoms.calc = Unsure()
    asked = config(steps=40, max_forces_std=0.1, outside_steps=allowed, log_every=100)
    if stopped is None:
        assert run(atoms, asked).steps == 40
    else:
        with pytest.raises(MDError, match=rf"stopped at step {stopped} .*max_forces_std"):
            run(atoms, asked)


def test_what_cannot_move_or_stay_as_cold_is_refused():
    atoms = crystal()
    atoms.set_constraint(FixAtoms(range(len(atoms))))
    with pytest.raises(ConfigError, match="of 96 degrees of freedom constraints leave 0: free an atom"):
        run(atoms, config(steps=1))
    with pytest.raises(ConfigError, match=r"temperature is 2000 K, but max_temperature.*is 1000 K: raise"):
        run(crystal(), config(ensemble="langevin", steps=1, temperature=2000, max_temperature=1000))


def test_outputs_of_other_runs_are_not_overwritten(tmp_path):
    settings = config(tmp_path, steps=3, restart=None)
    run(crystal(), settings)
    with pytest.raises(ConfigError, match=r"log is .*md.csv.*--overwrite, overwrite=True"):
        run(crystal(), settings)
    before = contents(settings)
    run(crystal(), settings, overwrite=True)
    assert contents(settings) == before


def test_restart_refuses_another_run(tmp_path):
    settings = config(tmp_path, steps=10)
    run(crystal(), settings)
    with pytest.raises(ConfigError, match=r"timestep was 2.0 and is 1.0; temperature was 300.0 and is 250.0"):
        run(crystal(), settings.model_copy(update={"timestep": 1.0, "temperature": 250.0}))
    with pytest.raises(ConfigError, match="steps was 10 and is 5"):
        run(crystal(), settings.model_copy(update={"steps": 5}))
    other = crystal()
    other.numbers[3] = 47
    with pytest.raises(ConfigError, match="numbers of the atoms"):
        run(other, settings)
    Path(settings.trajectory).write_bytes(b"")
    with pytest.raises(MDError, match=r"md.extxyz has 0 bytes"):
        run(crystal(), settings)


def test_progress_goes_to_stderr(capfd):
    run_md(crystal(), config(steps=20))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "20/20" in captured.err and "ns/day" in captured.err and "eV/atom" in captured.err
    run(crystal(), config(steps=20))
    assert capfd.readouterr() == ("", "")


def test_energy_slope():
    time_fs = np.array([0.0, 1000.0, 2000.0, 4000.0])
    assert energy_slope(time_fs, 3.0 + 2e-6 * time_fs) == pytest.approx(2e-3)
    assert np.isnan(energy_slope([0.0], [1.0]))


def test_rdf_of_an_ideal_gas_is_one():
    rng = np.random.default_rng(0)
    cell = np.array([[9.0, 0, 0], [2, 8, 0], [0, 1, 10]])
    frames = [
        Atoms(
            "He40Ne60", positions=rng.random((100, 3)) @ (cell * (1 + 0.02 * k)), cell=cell * (1 + 0.02 * k), pbc=True
        )
        for k in range(6)
    ]
    curves = radial_distribution(frames, ["He-He", "He-Ne", "Ne-He"], 6.0, 12)
    for r, g in curves.values():
        assert r[0] == 0.25 and r[-1] == 5.75
        assert g[3:8].mean() == pytest.approx(1.0, abs=0.05)
    assert curves["He-He"][1][3:8].mean() == pytest.approx(39 / 40, abs=0.03)
    np.testing.assert_allclose(curves["He-Ne"][1], curves["Ne-He"][1])


@pytest.mark.parametrize("repeat", [1, 3])
def test_rdf_of_fcc(repeat):
    a, bins = 3.6, 720
    atoms = bulk("Cu", a=a) * repeat
    r, g = radial_distribution([atoms], ["Cu-Cu"], 2 * a, bins)["Cu-Cu"]
    width = r[1] - r[0]
    peaks = np.flatnonzero(g)
    distances = a * np.sqrt(np.arange(1, 8) / 2)  # shells of fcc
    assert [float(np.abs(r[peaks] - d).min()) < width for d in distances] == [True] * 7
    shells = 4 / 3 * np.pi * ((r + width / 2) ** 3 - (r - width / 2) ** 3)
    neighbours = np.cumsum(4 / a**3 * g * shells)
    for limit, number in ((1.1, 12), (1.5, 18 + 24), (1.65, 18 + 24 + 12 + 24)):
        radius = limit * a / np.sqrt(2) if number == 12 else limit * a
        count = neighbours[r < radius][-1]
        assert count == pytest.approx(number if number == 12 else shell_count(a, radius))


def shell_count(a: float, radius: float) -> int:
    grid = np.array(list(itertools.product(range(-5, 6), repeat=3)))
    lattice = grid[grid.sum(axis=1) % 2 == 0] * a / 2
    lengths = np.linalg.norm(lattice, axis=1)
    return int(((lengths < radius) & (lengths > 0)).sum())
