"""The driver of i-PI: the calculator's numbers in atomic units, all beads at once, and inside of i-PI."""

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.stress import voigt_6_to_full_3x3_stress
from helpers.potentials import tiny_potential
from helpers.systems import ethanol, triclinic, water

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, StructureError
from segnn_ase.engines import ipi_driver
from segnn_ase.store.model_file import save_potential

pytestmark = pytest.mark.engines
HARTREE, BOHR = 27.211386, 0.529177210  # eV, Å


def driver_of(folder: Path, atoms, **settings) -> ipi_driver.SEGNNDriver:
    save_potential(folder / "model.pt", tiny_potential())
    ase.io.write(folder / "template.xyz", atoms)
    return ipi_driver.SEGNNDriver(str(folder / "template.xyz"), str(folder / "model.pt"), verbose=True, **settings)


@pytest.mark.parametrize("build", [triclinic, ethanol])
def test_it_gives_what_the_calculator_gives_in_atomic_units(tmp_path, build):
    atoms = build()
    driver = driver_of(tmp_path, atoms, pbc=bool(atoms.pbc.all()), domain="ignore", dtype="float64")
    beads = [atoms.copy() for _ in range(3)]
    for seed, bead in enumerate(beads):
        bead.rattle(0.05, seed=seed)
    cells, places = [bead.cell.array.T / BOHR for bead in beads], [bead.positions / BOHR for bead in beads]
    together = driver(cells, places)
    calculator = SEGNNCalculator(tmp_path / "model.pt", dtype="float64", domain="ignore")
    for bead, cell, place, found in zip(beads, cells, places, together, strict=True):
        energy, forces, virial, extras = driver(cell, place)
        assert energy * HARTREE == pytest.approx(calculator.get_property("energy", bead), abs=1e-5)
        right = calculator.get_property("forces", bead)
        np.testing.assert_allclose(forces * HARTREE / BOHR, right, rtol=0, atol=1e-5 * np.abs(right).max())
        if atoms.pbc.all():
            stress = voigt_6_to_full_3x3_stress(calculator.get_property("stress", bead))
            np.testing.assert_allclose(virial * HARTREE, -stress * bead.get_volume(), rtol=1e-5, atol=1e-6)
        else:
            assert not virial.any()
        assert extras == found[3] == '{"outside": []}'
        for one, many in zip((energy, forces, virial), found[:3], strict=True):
            np.testing.assert_allclose(one, many, rtol=0, atol=1e-12)


def test_what_is_outside_is_told(tmp_path):
    atoms = ase.io.read(Path(__file__).parents[2] / "potentials" / "silicon-pbe" / "reference.xyz", "0")
    ase.io.write(tmp_path / "template.xyz", atoms)
    driver = ipi_driver.SEGNNDriver(str(tmp_path / "template.xyz"), "silicon-pbe", domain="ignore")
    cell, place = atoms.cell.array.T / BOHR, atoms.positions / BOHR
    near = place.copy()
    near[1] = near[0] + 0.6 * (near[1] - near[0])
    told = [json.loads(extras)["outside"] for *_, extras in driver([cell, cell], [place, near])]
    assert told[0] == [] and told[1]


def test_where_it_is_periodic_is_told(tmp_path):
    """Of i-PI's own files ASE reads no cell."""
    atoms = bulk("Cu", cubic=True)
    driver = driver_of(tmp_path, atoms)
    lines = (tmp_path / "template.xyz").read_text().splitlines()
    lines[1] = "# CELL(abcABC): 3.6 3.6 3.6 90 90 90 positions{angstrom} cell{angstrom}"
    (tmp_path / "template.xyz").write_text("\n".join(lines) + "\n")
    model, cell, place = str(tmp_path / "model.pt"), atoms.cell.array.T / BOHR, atoms.positions / BOHR
    expected, *_ = driver(cell, place)
    with pytest.raises(ConfigError, match=r"pbc is None; expected True or False, as .* has no cell"):
        ipi_driver.SEGNNDriver(str(tmp_path / "template.xyz"), model)
    with pytest.raises(ConfigError, match="pbc is 'maybe'"):
        ipi_driver.SEGNNDriver(str(tmp_path / "template.xyz"), model, pbc="maybe")
    for pbc in (True, "True", "F"):
        energy, _, virial, _ = ipi_driver.SEGNNDriver(str(tmp_path / "template.xyz"), model, pbc=pbc)(cell, place)
        assert (energy == pytest.approx(expected, rel=1e-6)) is (pbc != "F") and virial.any() == (pbc != "F")


def test_what_is_wrong_is_said(tmp_path):
    driver = driver_of(tmp_path, water(), pbc=False)
    with pytest.raises(StructureError, match="i-PI has 2 atoms; expected 3, as the template has"):
        driver(np.eye(3) * 20, np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="unknown keyword 'precision'"):
        driver_of(tmp_path, water(), pbc=False, precision="double")


INPUT = """<simulation verbosity='low'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [step, potential{{electronvolt}}, kinetic_cv{{electronvolt}}] </properties>
    <trajectory filename='pos' stride='1' format='xyz'> positions{{angstrom}} </trajectory>
    <trajectory filename='domain' stride='1' extra_type='outside'> extras </trajectory>
  </output>
  <total_steps> {steps} </total_steps>
  <ffdirect name='segnn'>
    <pes> custom </pes>
    <pes_path> {path} </pes_path>
    <parameters> {{template: template.xyz, model: {model}, domain: ignore}} </parameters>
    <batch_size> {beads} </batch_size>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> template.xyz </file>
      <velocities mode='thermal' units='kelvin'> {kelvin} </velocities>
    </initialize>
    <forces> <force forcefield='segnn'/> </forces>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> {timestep} </timestep>
        <thermostat mode='pile_l'> <tau units='femtosecond'> 50 </tau> </thermostat>
      </dynamics>
    </motion>
    <ensemble> <temperature units='kelvin'> {kelvin} </temperature> </ensemble>
  </system>
</simulation>
"""


def run_ipi(folder: Path, **settings) -> np.ndarray:
    """Steps, potential and kinetic energies, eV, of a simulation of template.xyz."""
    (folder / "input.xml").write_text(INPUT.format(path=ipi_driver.__file__, **settings))
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return np.loadtxt(folder / "run.out")


@pytest.mark.slow
def test_it_runs_inside_of_ipi(tmp_path):
    atoms = ethanol()
    atoms.set_cell([15.0, 15.0, 15.0])
    atoms.pbc = True
    driver_of(tmp_path, atoms)
    table = run_ipi(tmp_path, model="model.pt", beads=4, steps=3, kelvin=300, timestep=0.25)
    calculator = SEGNNCalculator(tmp_path / "model.pt", domain="ignore")
    beads = [positions(tmp_path / f"run.pos_{k}.xyz", len(atoms)) for k in range(4)]
    for step, row in enumerate(table):
        energies = []
        for bead in beads:
            atoms.positions[:] = bead[step]
            energies.append(calculator.get_property("energy", atoms))
        assert row[1] == pytest.approx(np.mean(energies), abs=1e-3)  # of positions with six digits
    assert np.ptp([bead[-1] for bead in beads], axis=0).max() > 1e-3  # they move apart


def positions(path: Path, n: int) -> np.ndarray:
    """Of the frames of i-PI's xyz."""
    lines = path.read_text().splitlines()
    rows = [line.split()[1:4] for k, line in enumerate(lines) if k % (n + 2) > 1]
    return np.array(rows, dtype=float).reshape(-1, n, 3)


@pytest.mark.slow
def test_a_cold_crystal_has_the_energy_of_its_quantum_vibrations(tmp_path):
    """Of harmonic modes w at P beads potential and kinetic energy are kT/2 sum_k w^2 / (w^2 + w_k^2), w_k those of the
    free ring (Tuckerman, Statistical Mechanics, section 12.6)."""
    atoms, kelvin, beads = bulk("Si", cubic=True, a=5.4734), 100.0, 8
    calculator = SEGNNCalculator("silicon-pbe", dtype="float64")
    hessian = calculator.get_hessian(atoms).reshape(24, 24) / atoms.get_masses()[0]
    squares = np.linalg.eigvalsh(hessian)[3:] * units._e / units._amu * 1e20  # 1/s^2, without translations
    kT, hbar = units.kB * kelvin, units._hbar / units._e
    ring = 2 * beads * kT / hbar * np.sin(np.pi * np.arange(beads) / beads)
    exact = 0.5 * kT * np.sum(squares[:, None] / (squares[:, None] + ring**2))
    ase.io.write(tmp_path / "template.xyz", atoms)
    table = run_ipi(tmp_path, model="silicon-pbe", beads=beads, steps=4000, kelvin=kelvin, timestep=1.5)
    potential, kinetic = table[500:, 1:].mean(axis=0)
    potential -= calculator.get_property("energy", atoms)
    assert exact > 2.0 * 21 * 0.5 * kT  # far from classical
    assert potential == pytest.approx(exact, rel=0.04)
    assert kinetic == pytest.approx(exact + 1.5 * kT, rel=0.05)  # i-PI counts translations, too
