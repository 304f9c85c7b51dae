"""The doctor: each kind of spoilt data is named, and sound data are left in peace."""

import re
import sys
from collections import Counter
from functools import cache

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress
from ase.units import Bohr, GPa, Hartree, fs, kB, kcal, mol
from helpers.command_line import assert_one_line_error, segnn
from helpers.frames import emt_atoms
from helpers.systems import NAMED, rattled, rotation, transformed
from matplotlib.image import imread

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.check import pairs
from segnn_ase.check.consistency import find_offset
from segnn_ase.check.doctor import check, check_frames, examine
from segnn_ase.check.findings import Sets, where_of
from segnn_ase.check.labels import looks_like
from segnn_ase.check.matching import SAME, compare, displacement
from segnn_ase.check.repair import repair
from segnn_ase.check.report import write_report
from segnn_ase.check.sets_of_frames import same_labels
from segnn_ase.check.strained_series import stress_offset
from segnn_ase.check.surroundings import DETACHED, detached_atoms, survey
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.structure.neighbors import neighbor_list
from segnn_ase.train.prepare import read_data
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import train


def labelled(atoms: Atoms, results: dict | None = None, **replaced) -> Atoms:
    """A copy with EMT's labels or those given, some replaced; None leaves one out."""
    out = atoms.copy()
    if results is None:
        out.calc = EMT()
        results = {"energy": out.get_potential_energy(), "forces": out.get_forces()}
        if out.pbc.all():
            results["stress"] = out.get_stress()
    merged = {name: value for name, value in {**results, **replaced}.items() if value is not None}
    out.calc = SinglePointCalculator(out, **merged)
    return out


@cache
def alloys() -> tuple[Atoms, ...]:
    """Rattled and strained cells of 16 atoms of Cu, Al and three of their mixtures."""
    images = []
    for n in range(60):
        rng = np.random.default_rng(n)
        atoms = bulk("Cu", cubic=True, a=3.8).repeat((2, 2, 1))
        atoms.numbers[rng.permutation(16)[: 4 * (n % 5)]] = 13
        strain = rng.normal(scale=0.02, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.rattle(0.12, rng=rng)
        images.append(labelled(atoms))
    return tuple(images)


@cache
def molecules() -> tuple[Atoms, ...]:
    """Distorted ethanol, turned at random."""
    images = emt_atoms(80, lambda: molecule("CH3CH2OH"), stdev=0.07)
    return tuple(labelled(transformed(a, rotation(n)), None) for n, a in enumerate(images))


@cache
def trajectory() -> tuple[Atoms, ...]:
    """Copper at 600 K every 5 fs."""
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 1))
    atoms.calc = EMT()
    spread = np.sqrt(1200 * kB * atoms.get_masses())[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(16, 3)))
    run, images = VelocityVerlet(atoms, 5 * fs), []
    run.attach(lambda: images.append(labelled(atoms)))
    run.run(79)
    return tuple(images)


SOUND = {"alloys": alloys, "molecules": molecules, "trajectory": trajectory}


def scaled(factor: float, *names: str):
    return lambda a: labelled(a, a.calc.results, **{name: factor * a.calc.results[name] for name in names})


def shuffled(atoms: Atoms) -> Atoms:
    order = np.random.default_rng(len(atoms)).permutation(len(atoms))
    return labelled(atoms, atoms.calc.results, forces=atoms.calc.results["forces"][order])


def renamed(atoms: Atoms) -> Atoms:
    out = atoms.copy()
    out.info["E_total"] = atoms.calc.results["energy"]
    out.arrays["Forces_dft"] = atoms.calc.results["forces"]
    return out


def voigt_order_of_vasp(atoms: Atoms) -> Atoms:
    return labelled(atoms, atoms.calc.results, stress=atoms.calc.results["stress"][[0, 1, 2, 5, 3, 4]])


def with_nan(atoms: Atoms) -> Atoms:
    forces = atoms.calc.results["forces"].copy()
    forces[1, 2] = np.nan
    return labelled(atoms, atoms.calc.results, forces=forces)


def findings_of(images, **options) -> list:
    sets = Sets([frame_from_atoms(a, source=f"x.xyz, frame {n}") for n, a in enumerate(images)], **options)
    return examine(sets).findings


def errors_in(findings) -> set[str]:
    return {f.code for f in findings if f.severity == "error"}


def codes_in(findings) -> set[str]:
    return {f.code for f in findings}


@pytest.mark.parametrize("name", SOUND)
def test_sound_data_have_no_error(name):
    findings = findings_of(SOUND[name]())
    assert not errors_in(findings)
    # a trajectory has alike frames, and every frame of EMT metals comes without isolated atoms
    expected = {"alloys": set(), "molecules": set(), "trajectory": {"near copies"}}[name]
    assert {f.code for f in findings if f.severity == "warning"} == expected


@pytest.mark.parametrize("build", [lambda: molecule("H2O"), lambda: bulk("Cu", cubic=True)])
@pytest.mark.parametrize("n", [1, 3, 12])
def test_tiny_sets_have_no_error(n, build):
    assert not errors_in(findings_of(emt_atoms(n, build)))


SPOILT = {
    "stress in kbar": (scaled(10 / GPa, "stress"), "units of stress"),
    "stress in GPa": (scaled(1 / GPa, "stress"), "units of stress"),
    "stress flipped": (scaled(-1, "stress"), "sign of stress"),
    "stress as in VASP": (scaled(-10 / GPa, "stress"), "units of stress"),
    "shears of VASP": (voigt_order_of_vasp, "order of stress"),
    "forces negated": (scaled(-1, "forces"), "negated forces"),
    "forces in kcal/mol": (scaled(mol / kcal, "forces"), "units of energy and forces"),
    "energies in kcal/mol": (scaled(mol / kcal, "energy"), "units of energy and forces"),
    "energies in Hartree": (scaled(1 / Hartree, "energy"), "units of energy and forces"),
    "forces shuffled": (shuffled, "unrelated forces"),
}


def has_what_is_spoilt(flaw: str, data: str) -> bool:
    return data != "molecules" or not flaw.startswith(("stress", "shears"))


@pytest.mark.parametrize(("flaw", "data"), [(f, d) for f in SPOILT for d in SOUND if has_what_is_spoilt(f, d)])
def test_spoilt_labels_are_named(flaw, data):
    spoil, code = SPOILT[flaw]
    assert errors_in(findings_of([spoil(a) for a in SOUND[data]()])) == {code}


def test_the_unit_is_told_from_the_size():
    (finding,) = (f for f in findings_of([scaled(mol / kcal, "forces")(a) for a in alloys()]) if f.severity == "error")
    assert "forces in kcal/mol/Å, energies in eV" in finding.message
    (finding,) = (f for f in findings_of([scaled(-10 / GPa, "stress")(a) for a in alloys()]) if f.severity == "error")
    assert "sign opposite" in finding.message and "kbar" in finding.message
    assert finding.repair == ("scale stress", pytest.approx(-GPa / 10))


@pytest.mark.parametrize(("frames", "found"), [(60, {"units of energy and forces"}), (30, set())])
def test_forces_per_bohr_need_many_frames(frames, found):
    """Of few, factors near 1 are not believed."""
    assert errors_in(findings_of([scaled(Bohr, "forces")(a) for a in alloys()[:frames]])) == found


def test_stress_is_judged_by_energies_of_strained_cells():
    images = []
    for n in range(12):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, rng=np.random.default_rng(0))
        atoms.set_cell(atoms.cell.array * (1 + 0.003 * n), scale_atoms=True)
        images.append(labelled(atoms))
    images += emt_atoms(20, lambda: bulk("Cu", cubic=True))
    assert not errors_in(findings_of(images))
    (finding,) = (f for f in findings_of([scaled(-1, "stress")(a) for a in images]) if f.code == "sign of stress")
    assert "pairs of strained structures" in finding.message


def stretched(pressure: float) -> list[Atoms]:
    """Copper pulled along x and y by up to 8 % in nine steps each, every atom displaced; too large a pressure."""
    images = []
    for axis in (0, 1):
        for n, strain in enumerate(np.linspace(-0.08, 0.08, 9)):
            atoms = bulk("Cu", cubic=True)
            cell = atoms.cell.array.copy()
            cell[axis] *= 1 + strain
            atoms.set_cell(cell, scale_atoms=True)
            atoms.rattle(0.01, rng=np.random.default_rng(10 * axis + n))
            atoms = labelled(atoms)
            images.append(
                labelled(atoms, atoms.calc.results, stress=atoms.get_stress() + pressure * np.repeat([1, 0], 3))
            )
    return images


@pytest.mark.parametrize("pressure", [0.0, 0.05, -0.2, 0.3])
def test_a_constant_pressure_in_the_stress(pressure):
    """As of plane waves too few for changing cells; found from the energies of series of strained structures."""
    found = [f for f in findings_of([*stretched(pressure * GPa), *trajectory()]) if f.code == "offset of stress"]
    offset = stress_offset([frame_from_atoms(a) for a in stretched(pressure * GPa)])
    assert offset.pressure / GPa == pytest.approx(pressure, abs=0.05)
    assert (offset.series, len(offset.frames)) == (2, 17)
    if abs(pressure) < 0.1:
        assert not found
    else:
        assert "--stress-weight 0" in found[0].advice and "--fix" in found[0].advice
        assert found[0].severity == "warning" and re.search(r"is 0\.\d\d ± 0\.0\d GPa", found[0].message)
        assert ("above" in found[0].message) == (pressure > 0)
        assert set(found[0].frames) <= {f"x.xyz, frame {n}" for n in range(18)}


def scaled_cells(atoms: Atoms, strains) -> list[Atoms]:
    images = []
    for strain in strains:
        image = atoms.copy()
        image.set_cell(atoms.cell.array * (1 + strain), scale_atoms=True)
        images.append(labelled(image))
    return images


def relaxation() -> list[Atoms]:
    """Atoms that move with the cell, from a rattled and stretched structure."""
    atoms, images = bulk("Cu", cubic=True, a=3.75), []
    atoms.symbols[::2] = "Au"
    atoms.rattle(0.03, rng=np.random.default_rng(0))
    atoms.calc = EMT()
    run = BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.02)
    run.attach(lambda: images.append(labelled(atoms)))
    run.run(fmax=0.002, steps=200)
    return images


def rigid_dimers() -> list[Atoms]:
    """Only the distances between molecules follow the cell."""
    images = []
    for strain in np.linspace(-0.02, 0.02, 9):
        atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.1]], cell=[3.2 * (1 + strain)] * 2 + [5.6 * (1 + strain)], pbc=True)
        images.append(labelled(atoms))
    return images


LEFT_HANDED = Atoms("Cu", cell=[[0, 2, 2], [2, 2, 0], [2, 0, 2]], pbc=True)
SOUND_SERIES = {
    "relaxation": relaxation,
    "rigid dimers": rigid_dimers,
    "wide": lambda: scaled_cells(bulk("Al", cubic=True), np.linspace(-0.3, 0.3, 9)),
    "few": lambda: scaled_cells(bulk("Al", cubic=True), np.linspace(-0.15, 0.15, 6)),
    "left-handed": lambda: scaled_cells(
        Atoms("Cu", cell=[[0, 2, 2], [2, 2, 0], [2, 0, 2]], pbc=True), np.linspace(-0.1, 0, 8)
    ),
}


@pytest.mark.parametrize("name", SOUND_SERIES)
def test_sound_series_have_no_pressure_too_much(name):
    frames = [frame_from_atoms(a) for a in SOUND_SERIES[name]()]
    assert find_offset(frames) == []


@pytest.mark.parametrize("number", [8, 121])
def test_a_pressure_is_found_in_few_and_in_many(number):
    frames = [frame_from_atoms(a) for a in scaled_cells(bulk("Cu"), np.linspace(-0.03, 0.03, number))]
    (finding,) = find_offset([f._replace(stress=f.stress + GPa * np.eye(3)) for f in frames])
    assert "is 1.00 ± 0.0" in finding.message and not find_offset(frames)


@pytest.mark.parametrize("pressure", [0.3, -2.6])
def test_a_constant_pressure_is_taken_off(pressure, tmp_path):
    ase.io.write(tmp_path / "a.xyz", [*stretched(pressure * GPa), *trajectory()])
    done = repair(check(tmp_path / "a.xyz"), tmp_path / "b.xyz")
    (size,) = re.findall(r"added (.*) GPa to the diagonal", " ".join(done))
    assert float(size) == pytest.approx(-pressure, abs=0.05)
    report = check(tmp_path / "b.xyz")
    assert "offset of stress" not in codes_in(report.findings)
    expected = [a.get_stress() for a in stretched(0.0)]
    assert np.allclose([f.stress[0, 0] for f in report.sets.train[:18]], [s[0] for s in expected], atol=0.05 * GPa)
    assert np.allclose([f.stress[0, 1] for f in report.sets.train[:18]], [s[5] for s in expected], atol=1e-6)


@pytest.mark.parametrize("shift", [0.1, -0.3])
def test_two_levels_of_theory(shift):
    images = [
        labelled(a, a.calc.results, energy=a.calc.results["energy"] + shift * len(a) * (n % 3 == 0))
        for n, a in enumerate(alloys())
    ]
    (finding,) = (f for f in findings_of(images) if f.severity == "error")
    assert finding.code == "mixed levels"
    assert finding.frames == tuple(f"x.xyz, frame {n}" for n in range(0, 60, 3))


def test_another_kind_of_structure_is_no_other_level():
    """Larger cells, all of them shifted: perhaps they are just different."""
    larger = [a.repeat((1, 1, 2)) for a in alloys()[::6]]
    for n, atoms in enumerate(larger):
        atoms.rattle(0.1, rng=np.random.default_rng(n))
    larger = [labelled(a) for a in larger]
    larger = [labelled(a, a.calc.results, energy=a.calc.results["energy"] + 0.3 * len(a)) for a in larger]
    (finding,) = (f for f in findings_of([*alloys(), *larger]) if f.code in ("energies apart", "mixed levels"))
    assert finding.severity == "warning"
    assert finding.frames == tuple(f"x.xyz, frame {n}" for n in range(60, 70))


@pytest.mark.parametrize("old", [8, 6])
def test_one_wrong_element(old):
    images = list(molecules())
    wrong = images[7].copy()
    wrong.numbers[np.flatnonzero(wrong.numbers == old)[0]] = 14 - old
    images[7] = labelled(wrong, images[7].calc.results)
    found = {f.code: f.frames for f in findings_of(images)}
    assert found["lone composition"] == ("x.xyz, frame 7",)
    images[7] = labelled(Atoms([7, *wrong.numbers[1:]], wrong.positions), images[7].calc.results)
    assert {f.code: f.frames for f in findings_of(images)}["lone element"] == ("x.xyz, frame 7",)


def test_forces_shuffled_or_lost_in_one_frame():
    for spoil, severity in ((shuffled, "warning"), (scaled(0.0, "forces"), "error")):
        images = [spoil(a) if n == 11 else a for n, a in enumerate(alloys())]
        (finding,) = (f for f in findings_of(images) if f.code == "odd forces")
        assert finding.frames == ("x.xyz, frame 11",) and finding.severity == severity


def test_energy_outliers():
    images = list(alloys())
    for away, severity in ((60.0, "warning"), (3000.0, "error")):
        images[5] = labelled(images[5], images[5].calc.results, energy=alloys()[5].calc.results["energy"] + away)
        (finding,) = (f for f in findings_of(images) if f.code == "energy outliers")
        assert finding.frames == ("x.xyz, frame 5",) and finding.severity == severity


def test_short_distances_and_constraints():
    images = list(alloys())
    for n, distance in ((2, 1.0), (3, 0.1)):
        close = images[n].copy()
        close.positions[1] = close.positions[0] + [distance, 0, 0]
        images[n] = labelled(close, images[n].calc.results)
    held = images[4].calc.results["forces"].copy()
    held[:5] = 0
    images[4] = labelled(images[4], images[4].calc.results, forces=held)
    found = {(f.code, f.severity): f.frames for f in findings_of(images)}
    assert found["short distances", "error"] == ("x.xyz, frame 3",)
    assert found["short distances", "warning"] == ("x.xyz, frame 2",)
    assert found["constrained forces", "warning"] == ("x.xyz, frame 4",)


def test_net_forces_and_periodicity():
    images = [labelled(a, a.calc.results, forces=a.calc.results["forces"] + [0.002, 0, 0]) for a in molecules()]
    (finding,) = (f for f in findings_of(images) if f.code == "net forces")
    assert "0.0020 an atom" in finding.message and finding.severity == "note"
    boxed = images[0].copy()
    boxed.set_cell([20.0] * 3)
    boxed.pbc = True
    images[0] = labelled(boxed, images[0].calc.results)
    assert "mixed periodicity" in codes_in(findings_of(images))


def torn(atoms: Atoms, away=(8.0, 8.0, 8.0), *, size: float = 1.0) -> Atoms:
    """The last atom moved away, its force of `size` times what it was."""
    out, forces = atoms.copy(), atoms.calc.results["forces"].copy()
    out.positions[-1] += away
    forces[-1] *= size
    return labelled(out, atoms.calc.results, forces=forces - forces.mean(0))


def detached(images) -> dict:
    return {f.severity: f.frames for f in findings_of(images) if f.code == "detached atoms"}


def test_a_torn_molecule_with_the_forces_of_the_whole_one():
    images = list(molecules())
    images[7] = torn(images[7])
    assert detached(images) == {"error": ("x.xyz, frame 7",)}
    images[7].set_cell([40.0] * 3)
    assert detached(images) == {"error": ("x.xyz, frame 7",)}
    images[7].pbc = True
    assert detached(images) == {"error": ("x.xyz, frame 7",)}
    images[7] = labelled(images[7], images[7].calc.results, forces=None)
    assert detached(images) == {"warning": ("x.xyz, frame 7",)}


def test_an_atom_that_left_is_looked_at_only():
    """Its forces are those of an atom that is alone."""
    images = list(molecules())
    images[7] = torn(images[7])
    images[7] = labelled(images[7])  # EMT has no forces so far away
    assert detached(images) == {"warning": ("x.xyz, frame 7",)}


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_dissociation_curves_are_no_error(size):
    images = [torn(a, (3.0 + 0.5 * n, 0, 0), size=size) if n < 20 else a for n, a in enumerate(molecules())]
    assert set(detached(images)) == {"warning"}


def pairs_of(symbol: str, distances, core: float = 0.0) -> list[Atoms]:
    """Dimers in a box, with a repulsion core exp(-8 (r - 1)) beside EMT's labels."""
    found = []
    for r in distances:
        atoms = labelled(Atoms(f"{symbol}2", [[0, 0, 0], [r, 0, 0]], cell=[14, 13, 12], pbc=True))
        energy, push = atoms.get_potential_energy(), core * np.exp(-8.0 * (r - 1.0))
        forces = atoms.get_forces() + 8.0 * push * np.array([[-1.0, 0, 0], [1.0, 0, 0]])
        found.append(labelled(atoms, {"energy": energy + push, "forces": forces}))
    return found


@pytest.mark.parametrize(
    ("symbol", "bulks", "distances", "core"),
    [
        ("Al", 60, np.linspace(1.8, 6.0, 8), 0.0),
        ("Cu", 60, np.linspace(0.9, 3.0, 20), 40.0),
        ("Pt", 60, np.linspace(2.0, 5.5, 6), 0.0),
    ],
)
def test_curves_of_pairs_beside_a_solid_are_no_error(symbol, bulks, distances, core):
    """Neither as they are, nor does the doctor then overlook what is wrong with the solid."""
    solid = [labelled(rattled(bulk(symbol, cubic=True).repeat(2), seed=n, stdev=0.1)) for n in range(bulks)]
    assert not errors_in(findings_of([*solid, *pairs_of(symbol, distances, core)]))
    wrong = [scaled(mol / kcal, "forces")(atoms) for atoms in [*solid, *pairs_of(symbol, distances, core)]]
    assert "units of energy and forces" in errors_in(findings_of(wrong))
    solid[-1] = labelled(solid[-1], solid[-1].calc.results, energy=solid[-1].get_potential_energy() + 320.0)
    assert "energy outliers" in errors_in(findings_of([*solid, *pairs_of(symbol, distances, core)]))


def test_collisions_in_a_solid_are_no_error():
    solid = [labelled(rattled(bulk("Cu", cubic=True).repeat(2), seed=n, stdev=0.1)) for n in range(60)]
    for n, r in enumerate(np.linspace(0.8, 1.8, 12)):
        atoms = solid[n].copy()
        atoms.positions[1] = atoms.positions[0] + [r, 0.0, 0.0]
        atoms = labelled(atoms)
        push = 40.0 * np.exp(-8.0 * (r - 1.0))
        forces = atoms.get_forces()
        forces[:2] += 8.0 * push * np.array([[-1.0, 0, 0], [1.0, 0, 0]])
        solid.append(labelled(atoms, {"energy": atoms.get_potential_energy() + push, "forces": forces}))
    assert not errors_in(findings_of(solid))


def test_atoms_far_apart_by_nature_are_no_detached_ones():
    """Isolated atoms, ions far apart (forces of unit charges), argon and wide cells of a metal."""
    alone = [labelled(Atoms(z, cell=[15.0] * 3, pbc=True), {"energy": 0.0, "forces": [[0.0] * 3]}) for z in "CHO"]
    assert not detached([*molecules(), *alone])
    pull = 14.39 / 7.0**2
    ions = labelled(Atoms("NaCl", [[0, 0, 0], [7.0, 0, 0]]), {"energy": 0.0, "forces": [[pull, 0, 0], [-pull, 0, 0]]})
    assert set(detached([*molecules(), ions])) == {"warning"}
    for atoms in (bulk("Ar", a=5.3, cubic=True), bulk("Cs", a=6.5, cubic=True), bulk("Cu", a=4.5, cubic=True)):
        frames = [rattled(atoms, seed=n) for n in range(20)]
        assert not detached([labelled(a, {"energy": 0.0, "forces": np.ones((len(a), 3))}) for a in frames])
    gas = [labelled(Atoms("He2", [[0, 0, 0], [9.0 + n, 0, 0]]), {"energy": 0.0}) for n in range(9)]
    assert set(detached(gas)) == {"note"}


def test_energies_of_few_digits():
    for spoil in (lambda e: round(e, 2), lambda e: float(np.float32(e - 30000))):
        images = [labelled(a, a.calc.results, energy=spoil(a.calc.results["energy"])) for a in molecules()]
        assert "coarse energies" in codes_in(findings_of(images))
    assert "coarse energies" not in codes_in(findings_of(molecules()))


# E0


@pytest.mark.parametrize(
    ("atoms", "code", "severity"),
    [
        ({"C": 5.0, "H": 5.0}, "missing E0", "error"),
        ({"C": 5.0, "H": 3.2, "O": 4.6}, None, None),
        ({"C": -1000.0, "H": -13.0, "O": -2000.0}, "absurd E0", "error"),
        ({"C": 500.0, "H": 13.0, "O": 900.0}, "absurd E0", "error"),
        ({}, "E0", "note"),
    ],
)
def test_reference_energies(atoms, code, severity):
    isolated = [frame_from_atoms(labelled(Atoms(z), {"energy": e})) for z, e in atoms.items()] or None
    found = {f.code: f.severity for f in findings_of(molecules(), isolated=isolated) if "E0" in f.code}
    assert found == ({code: severity} if code else {})


def test_elements_that_only_the_test_set_has():
    train_frames = [frame_from_atoms(a) for a in emt_atoms(12)]
    test_frames = [frame_from_atoms(a, source="t.xyz, frame 0") for a in emt_atoms(1, lambda: molecule("CH4"))]
    (finding,) = (f for f in check_frames(Sets(train_frames, [], test_frames)) if f.severity == "error")
    assert finding.code == "unseen elements" and " C," in finding.message and finding.frames == ("t.xyz, frame 0",)


# copies and splits


def permuted(atoms: Atoms) -> Atoms:
    order = np.random.default_rng(0).permutation(len(atoms))
    forces = atoms.calc.results["forces"][order]
    return labelled(atoms[order], atoms.calc.results, forces=forces, stress=None)


def moved(size: float):
    def move(atoms: Atoms) -> Atoms:
        out = atoms.copy()
        out.rattle(size, rng=np.random.default_rng(1))
        return labelled(out)

    return move


def turned(atoms: Atoms) -> Atoms:
    return labelled(transformed(atoms, rotation(5), (3.0, -2.0, 1.0)))


def mirrored(atoms: Atoms) -> Atoms:
    return labelled(transformed(atoms, rotation(5, improper=True)))


def wrapped(atoms: Atoms) -> Atoms:
    out = atoms.copy()
    out.positions += [1.0, 2.0, 3.0]
    out.wrap()
    return labelled(out, atoms.calc.results)


@pytest.mark.parametrize("data", ["alloys", "molecules"])
@pytest.mark.parametrize(
    ("copy", "kind"),
    [(turned, "exact"), (wrapped, "exact"), (permuted, "symmetry"), (mirrored, "symmetry"), (moved(0.02), "near")],
    ids=["turned", "wrapped", "permuted", "mirrored", "moved"],
)
def test_copies_of_every_kind_are_found_across_sets(copy, kind, data):
    images = SOUND[data]()
    known, others = ([frame_from_atoms(a) for a in images[start::2]] for start in (0, 1))
    test_frames = [*others[:9], frame_from_atoms(copy(images[8]), source="t.xyz, frame 9")]
    found = [f for f in check_frames(Sets(known, [], test_frames)) if "across" in f.code]
    assert [(f.code, f.frames, f.severity) for f in found] == [
        (f"{kind} copies across sets", ("t.xyz, frame 9",), "warning")
    ]


def test_a_frame_moved_farther_is_no_copy():
    a = alloys()[0]
    b = moved(0.1)(a)
    assert displacement(a, b) == pytest.approx(0.1, rel=0.3)
    assert compare(a, b, 0.03, True) == ""
    assert compare(a, moved(0.02)(a), 0.03, True) == "near"


def prints_of(*structures: Atoms) -> list[np.ndarray]:
    return [around.fingerprint for around in survey(list(structures)).around]


def test_chemical_order_makes_another_structure():
    """The same lattice sites with other elements on them."""
    a, b = (bulk("Cu", cubic=True).repeat(2) for _ in range(2))
    a.numbers[[0, 1]], b.numbers[[0, 4]] = 13, 13
    one, two = prints_of(a, b)
    assert np.sqrt(np.mean((one - two) ** 2)) > 50 * SAME


def test_fingerprints_change_by_no_more_than_the_structure():
    a = alloys()[0]
    for size in (1e-6, 1e-3, 0.02):
        one, two = prints_of(a, moved(size)(a))
        assert np.sqrt(np.mean((one - two) ** 2)) < 2 * size


def test_a_test_set_taken_from_the_training_set(tmp_path):
    ase.io.write(tmp_path / "train.xyz", molecules())
    ase.io.write(tmp_path / "test.xyz", molecules()[::5])
    report = check(tmp_path / "train.xyz", test=(tmp_path / "test.xyz",))
    (finding,) = (f for f in report.findings if f.code == "exact copies across sets")
    assert "16 of 16 test frames" in finding.message and len(finding.frames) == 16
    assert finding.severity == "warning"  # no training touches them
    report = check(tmp_path / "train.xyz", valid=(tmp_path / "test.xyz",))
    assert errors_in(report.findings) == {"exact copies across sets"}


@pytest.mark.parametrize("role", ["train", "valid", "test"])
def test_flaws_of_test_frames_alone_spoil_no_training(role):
    """An energy far off and atoms on one another."""
    close = molecules()[40].copy()
    close.positions[1] = close.positions[0] + [0.1, 0, 0]
    bad = [
        scaled(1000.0, "energy")(molecules()[41]),
        labelled(close, molecules()[40].calc.results),
    ]
    frames = {"train": molecules()[:40], "valid": molecules()[42:60], "test": molecules()[60:]}
    frames[role] = [*frames[role], *bad]
    sets = {
        name: [frame_from_atoms(a, source=f"{name}.xyz, frame {n}") for n, a in enumerate(some)]
        for name, some in frames.items()
    }
    found = {f.code: f.severity for f in check_frames(Sets(**sets)) if f.code in ("energy outliers", "short distances")}
    assert found == dict.fromkeys(("energy outliers", "short distances"), "warning" if role == "test" else "error")


def test_test_files_of_two_levels_of_theory_stop_no_training():
    tests = [frame_from_atoms(a, source=f"pbe.xyz, frame {n}") for n, a in enumerate(molecules()[60:66])]
    for n, atoms in enumerate(molecules()[60:66]):
        energy = atoms.get_potential_energy() + 3.0
        tests.append(frame_from_atoms(labelled(atoms, atoms.calc.results, energy=energy), source=f"cc.xyz, frame {n}"))
    train = [frame_from_atoms(a, source=f"t.xyz, frame {n}") for n, a in enumerate(molecules()[:40])]
    found = {f.code: f.severity for f in check_frames(Sets(train, [], tests))}
    assert found["contradiction"] == "warning" and "error" not in found.values()


def test_duplicates_and_contradictions_within_a_set():
    images = [*molecules(), molecules()[3], molecules()[4]]
    images[-1] = labelled(images[-1], images[-1].calc.results, energy=images[-1].calc.results["energy"] + 0.5)
    found = {f.code: f for f in findings_of(images)}
    assert found["duplicates"].frames == ("x.xyz, frame 80",) and found["duplicates"].severity == "warning"
    assert found["contradiction"].frames == ("x.xyz, frame 4", "x.xyz, frame 81")


@pytest.mark.parametrize(("size", "severity"), [(0.9e-3, None), (2e-3, "warning"), (20e-3, "error")])
def test_contradictions_by_their_size(size, severity):
    """Spins that the labels depend on make a difference of a meV/atom; eV/atom."""
    last = labelled(molecules()[4], {"energy": molecules()[4].get_potential_energy() + 9 * size})
    found = {f.code: f.severity for f in findings_of([*molecules(), last])}
    assert found.get("contradiction") == severity and ("duplicates" in found) == (severity is None)


def test_frames_may_differ_in_what_a_potential_is_told(tmp_path):
    """Under names that are not ASE's they are given."""
    images = []
    for n, one in enumerate([*molecules(), molecules()[4]]):
        energy = one.get_potential_energy() + 0.02 * 9 * (n == 80)
        images.append(labelled(one, one.calc.results, energy=energy))
        images[-1].info["pressure_of_light"] = float(n == 80)
    ase.io.write(tmp_path / "frames.xyz", images)
    found = segnn("check", tmp_path / "frames.xyz")
    assert "contradiction" in found.output and found.exit_code == 1
    named = segnn("check", tmp_path / "frames.xyz", "--cues", "pressure_of_light,kind=scalar,per=graph")
    assert "contradiction" not in named.output and named.exit_code == 0, named.output
    misspelt = segnn("check", tmp_path / "frames.xyz", "--cues", "presure_of_light")
    assert "setting 'model.cues.0' is" in misspelt.output and misspelt.exit_code == 1, misspelt.output


@pytest.mark.parametrize("data", ["alloys", "molecules"])
def test_copies_that_moved_a_little_have_other_forces(data):
    """By 5 mÅ, within what counts as the same structure; forces change by a multiple of what labels may."""
    atoms = SOUND[data]()[4].repeat(2) if data == "alloys" else SOUND[data]()[4]
    one, other = labelled(atoms), atoms.copy()
    other.positions[0, 0] += 0.004
    other = labelled(other)
    assert np.abs(one.get_forces() - other.get_forces()).max() > 0.01
    assert same_labels(frame_from_atoms(one), frame_from_atoms(other))
    assert not same_labels(frame_from_atoms(one), frame_from_atoms(scaled(-1, "forces")(other)))


def turned_with_labels(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    """A turned copy, its forces and stress turned with it."""
    results = dict(atoms.calc.results, forces=atoms.calc.results["forces"] @ matrix.T)
    if "stress" in results:
        results["stress"] = full_3x3_to_voigt_6_stress(matrix @ atoms.get_stress(voigt=False) @ matrix.T)
    return labelled(transformed(atoms, matrix, (3.0, -2.0, 1.0)), results)


CONTRADICTIONS = {
    "forces negated": scaled(-1, "forces"),
    "stress negated": scaled(-1, "stress"),
    "structure turned, not its forces": lambda a: labelled(transformed(a, rotation(5)), a.calc.results, stress=None),
    "forces turned, not the structure": lambda a: labelled(
        a, a.calc.results, forces=a.calc.results["forces"] @ rotation(5)
    ),
}


@pytest.mark.parametrize(
    ("flaw", "data"), [(f, d) for f in CONTRADICTIONS for d in ("alloys", "molecules") if has_what_is_spoilt(f, d)]
)
def test_forces_of_copies_are_compared_as_vectors(flaw, data, tmp_path):
    """Frame 6 is spoilt, the last one is the same structure with right labels: neither may be dropped unasked."""
    images = list(SOUND[data]())
    images[6], last = CONTRADICTIONS[flaw](images[6]), images[6]
    ase.io.write(tmp_path / "x.xyz", [*images, last])
    report = check(tmp_path / "x.xyz")
    (finding,) = (f for f in report.findings if f.code == "contradiction")
    assert finding.severity == "error" and len(finding.frames) == 2
    assert [s.rpartition(" ")[2] for s in finding.frames] == ["6", str(len(images))]
    assert "duplicates" not in codes_in(report.findings)
    repair(report, tmp_path / "fixed.xyz")
    assert len(ase.io.read(tmp_path / "fixed.xyz", ":")) == len(images) + 1


@pytest.mark.parametrize("data", ["alloys", "molecules"])
def test_turned_copies_with_turned_labels_are_duplicates(data):
    images = SOUND[data]()
    found = {f.code: f.frames for f in findings_of([*images, turned_with_labels(images[6], rotation(5))])}
    assert found["duplicates"] == (f"x.xyz, frame {len(images)}",) and "contradiction" not in found


def test_linear_molecules_that_repeat_are_duplicates():
    """Their rotation is not determined, and forces across the axis are compared all the same."""
    forces = np.random.default_rng(0).normal(size=(3, 3))
    one = labelled(molecule("CO2"), {"energy": 1.0, "forces": forces})
    other = labelled(molecule("CO2"), {"energy": 1.0, "forces": -forces})
    assert "duplicates" in codes_in(findings_of([one, one]))
    assert errors_in(findings_of([one, other])) == {"contradiction"}


def test_two_copies_against_two_are_a_contradiction():
    wrong = scaled(-1, "forces")(molecules()[5])
    found = {f.code: f.frames for f in findings_of([*molecules(), wrong, molecules()[5], wrong])}
    assert {"x.xyz, frame 5", "x.xyz, frame 80"} <= set(found["contradiction"])
    assert "x.xyz, frame 80" not in found.get("duplicates", ())


def test_of_two_copies_the_one_with_fewer_labels_is_dropped():
    images = list(molecules())
    full, images[6] = images[6], labelled(images[6], images[6].calc.results, forces=None)
    found = {f.code: f.frames for f in findings_of([*images, full])}
    assert found["duplicates"] == ("x.xyz, frame 6",)
    images[6] = labelled(full, {"forces": full.calc.results["forces"]})
    full = labelled(full, {"energy": full.calc.results["energy"]})
    assert "duplicates" not in codes_in(findings_of([*images, full]))


def test_a_trajectory_is_to_be_split_into_blocks():
    frames = [frame_from_atoms(a) for a in trajectory()]
    chosen = set(np.random.default_rng(0).permutation(80)[:16].tolist())
    at_random = Sets([f for n, f in enumerate(frames) if n not in chosen], [frames[n] for n in sorted(chosen)])
    blocks = Sets(frames[:60], frames[64:])
    assert "interleaved split" in codes_in(check_frames(at_random))
    assert "interleaved split" not in codes_in(check_frames(blocks))
    assert "trajectory" in codes_in(check_frames(Sets(frames)))
    mixed = [frames[n] for n in np.random.default_rng(1).permutation(80)]
    assert "trajectory" not in codes_in(check_frames(Sets(mixed)))


# reading


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("E_total", -3.0, "energy"),
        ("Forces_dft", np.zeros((4, 3)), "forces"),
        ("stress_kbar", np.zeros(6), "stress"),
        ("dftVirial", np.zeros((3, 3)), "stress"),
        ("dihedral_energy_label", "high", None),
        ("momenta", np.zeros((4, 3)), None),
        ("density", 1.0, None),
        ("forces", np.zeros(3), None),
    ],
)
def test_names_that_look_like_labels(name, value, kind):
    assert looks_like(name, value, 4) == kind


def test_renamed_keys_are_named_and_repaired(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [renamed(a) for a in molecules()])
    report = check(tmp_path / "a.xyz")
    assert errors_in(report.findings) == {"unread labels", "no labels"}
    assert "'E_total'" in report.markdown() and "'Forces_dft'" in report.markdown()
    done = repair(report, tmp_path / "b.xyz")
    assert "read energy from 'E_total'" in done
    assert not check(tmp_path / "b.xyz").errors
    again = ase.io.read(tmp_path / "b.xyz", ":")
    assert np.allclose([a.get_potential_energy() for a in again], [a.get_potential_energy() for a in molecules()])
    assert "Forces_dft" not in again[0].arrays


def test_mixed_keys_and_missing_labels(tmp_path):
    images = [a if n % 2 else renamed(a) for n, a in enumerate(molecules())]
    for atoms in images[::4]:
        atoms.info["REF_energy"] = atoms.info.pop("E_total")
    ase.io.write(tmp_path / "a.xyz", images)
    found = Counter(f.code for f in check(tmp_path / "a.xyz").findings)
    assert found["mixed keys"] == 1 and found["missing labels"] == 2 and found["unread labels"] == 2


def run_of_copper(n: int = 12) -> list[Atoms]:
    """Frames that move, with labels of their own under ASE's names and those of the first under others."""
    images = [a.copy() for a in trajectory()[::6][:n]]
    for atoms, own in zip(images, trajectory()[::6], strict=False):
        atoms.info["REF_energy"] = trajectory()[6].calc.results["energy"]
        atoms.arrays["REF_forces"] = trajectory()[6].calc.results["forces"]
        atoms.calc = SinglePointCalculator(atoms, **own.calc.results)
    return images


@pytest.mark.parametrize("also", [0, 5])
def test_labels_of_another_structure_are_an_error(tmp_path, also):
    """Alone, or among frames with labels of their own."""
    images = [*run_of_copper(), *trajectory()[1 : 1 + also]]
    ase.io.write(tmp_path / "a.xyz", images)
    found = [f for f in check(tmp_path / "a.xyz").findings if f.code == "stale labels"]
    assert [f.severity for f in found] == ["error", "error"] and "energy" in found[0].message
    assert all("frame 0-11]" in f"{where_of(f.frames)}]" for f in found)
    settings = {"data": {"train": str(tmp_path / "a.xyz")}, "out": str(tmp_path / "m.pt"), "training": {"epochs": 1}}
    with pytest.raises(DataError, match=r"energy equal to the digit .*forces equal to the digit"):
        train(TrainConfig.parse(settings), progress=False)


def test_energies_alone_that_are_those_of_another_structure():
    images = [labelled(a, a.calc.results, energy=-3.0) for a in trajectory()[:20]]
    assert "stale labels" in errors_in(findings_of(images))


def test_equal_energies_that_are_right():
    turned = [transformed(molecules()[0], rotation(n)) for n in range(6)]
    turned = [labelled(a, {"energy": molecules()[0].calc.results["energy"]}) for a in turned]
    rounded = [labelled(a, a.calc.results, energy=round(a.calc.results["energy"], 1)) for a in trajectory()]
    for images in (turned, rounded, list(trajectory()[:2])):
        assert "stale labels" not in codes_in(findings_of(images))


def test_equal_energies_by_the_chance_of_single_precision():
    """Water of DeePMD-kit: 400 energies around -29944 eV, 0.002 eV apart at least, of which 138 coincide."""
    energies = np.random.default_rng(0).normal(-29944.0, 0.6, 400).astype(np.float32).round(4).astype(float)
    assert len(set(energies)) < 300
    images = [a for n in range(14) for a in trajectory()][:400]
    for k, rounded in enumerate((energies, np.where(np.arange(400) < 4, energies[0] + 1e-6, energies))):
        its = [labelled(a, {"energy": e}) for a, e in zip(images, rounded, strict=False)]
        assert ("stale labels" in codes_in(findings_of(its))) == bool(k)


def test_two_sources_that_differ_are_told(tmp_path):
    images = [a.copy() for a in trajectory()]
    for atoms, own in zip(images, trajectory(), strict=True):
        atoms.info["dft_energy"] = own.calc.results["energy"]
        atoms.calc = SinglePointCalculator(atoms, **{**own.calc.results, "energy": own.calc.results["energy"] + 0.5})
    ase.io.write(tmp_path / "a.xyz", images)
    report = check(tmp_path / "a.xyz")
    (finding,) = (f for f in report.findings if f.code == "two sources")
    assert finding.severity == "warning" and "dft_energy is taken" in finding.message
    assert "31.2 meV/atom away (spread" in report.markdown()  # 0.5 eV, 16 atoms


def test_free_energy_of_some_frames_and_energy_of_others():
    def smeared(atoms: Atoms, away: float) -> Atoms:
        return labelled(atoms, atoms.calc.results, free_energy=atoms.calc.results["energy"] - away)

    alike = [smeared(a, 0.1 * (n % 2)) for n, a in enumerate(trajectory())]
    assert "mixed keys" not in codes_in(findings_of(alike))
    mixed = [smeared(a, 0.1) if n % 2 else a for n, a in enumerate(trajectory())]
    assert "mixed keys" in codes_in(findings_of(mixed))


def test_training_tells_of_what_is_not_there_and_refuses_what_is_not_read(tmp_path, capsys):
    settings = {"data": {"train": str(tmp_path / "a.xyz")}, "out": str(tmp_path / "m.pt")}
    settings["training"] = {"epochs": 1, "device": "cpu", "rollout_steps": 0}
    settings["model"] = {"hidden_irreps": "4x0e+4x1o", "cutoff": 3.0}
    alone = [labelled(a, {"energy": a.calc.results["energy"]}) for a in molecules()[:12]]
    ase.io.write(tmp_path / "a.xyz", alone)
    train(TrainConfig.parse(settings))
    assert "warning: no forces: no frame has forces" in capsys.readouterr().err
    for atoms, full in zip(alone, molecules(), strict=False):
        atoms.arrays["Forces_dft"] = full.calc.results["forces"]
    ase.io.write(tmp_path / "a.xyz", alone)
    settings["out"] = str(tmp_path / "n.pt")
    with pytest.raises(DataError, match="'Forces_dft' looks like forces and is not read"):
        train(TrainConfig.parse(settings), progress=False)


def test_fixed_frames_state_no_unit_that_they_have_not(tmp_path):
    images = []
    for atoms in molecules():
        images.append(atoms.copy())
        images[-1].info |= {"energy": atoms.calc.results["energy"] / (kcal / mol), "energy_unit": "kcal/mol"}
        images[-1].arrays["forces"] = atoms.calc.results["forces"] / (kcal / mol)
        images[-1].info["forces_unit"] = "kcal/mol/Ang"
    ase.io.write(tmp_path / "a.xyz", images)
    report = check(tmp_path / "a.xyz")
    assert not report.errors
    repair(report, tmp_path / "b.xyz")
    fixed = [frame_from_atoms(a) for a in ase.io.read(tmp_path / "b.xyz", ":")]
    assert np.allclose([f.energy for f in fixed], [a.calc.results["energy"] for a in molecules()])


def test_bad_frames_are_all_told_and_left_out(tmp_path):
    images = list(alloys())
    images[3], images[8] = with_nan(images[3]), with_nan(images[8])
    images[5].info["kind"] = "kept"
    images.append(images[6])
    ase.io.write(tmp_path / "a.xyz", images)
    report = check(tmp_path / "a.xyz")
    assert errors_in(report.findings) == {"bad labels"} and "3, 8" in report.markdown()
    repair(report, tmp_path / "b.xyz")
    fixed = ase.io.read(tmp_path / "b.xyz", ":")
    assert len(fixed) == len(images) - 3 and fixed[4].info["kind"] == "kept"
    assert np.allclose(fixed[4].get_stress(), images[5].get_stress())
    with pytest.raises(ConfigError, match=r"would overwrite .*a\.xyz"):
        repair(report, tmp_path / "a.xyz")


def test_a_torn_file(tmp_path):
    ase.io.write(tmp_path / "a.xyz", molecules())
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "a.xyz").write_text(text[: int(0.902 * len(text))])
    report = check(tmp_path / "a.xyz")
    assert errors_in(report.findings) == {"unreadable file"} and 60 < len(report.sets.train) < 80
    repair(report, tmp_path / "b.xyz")
    assert len(ase.io.read(tmp_path / "b.xyz", ":")) == len(report.sets.train)


def test_stress_is_converted(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [scaled(-10 / GPa, "stress")(a) for a in alloys()])
    repair(check(tmp_path / "a.xyz"), tmp_path / "b.xyz")
    fixed = ase.io.read(tmp_path / "b.xyz", ":")
    assert np.allclose([a.get_stress() for a in fixed], [a.get_stress() for a in alloys()], atol=1e-8)


def test_where_of():
    sources = ("a.xyz, frame 3", "a.xyz, frame 4", "a.xyz, frame 9", "b.xyz, frame 0")
    assert where_of(sources) == "a.xyz: frame 3-4, 9; b.xyz: frame 0"


def test_a_zoo_of_cells_is_looked_at():
    """Slabs, wires, left-handed and tiny cells, lonely atoms, and two atoms on one spot."""
    rng, images = np.random.default_rng(0), []
    for build in NAMED.values():
        for seed in range(3):
            atoms = rattled(build(), seed, 0.05)
            stress = rng.normal(size=6) if atoms.pbc.all() else None
            results = {"energy": rng.normal(), "forces": rng.normal(size=(len(atoms), 3)), "stress": stress}
            images.append(labelled(atoms, results))
    images.append(labelled(Atoms("CO", np.zeros((2, 3))), {"energy": 0.0, "forces": np.zeros((2, 3))}))
    (finding,) = (f for f in findings_of(images) if f.code == "short distances" and f.severity == "error")
    assert finding.frames == (f"x.xyz, frame {len(images) - 1}",)


# neighbours


@pytest.fixture
def searches(monkeypatch) -> list:
    """The structures whose neighbours are searched from now on, each by its positions."""
    found, search = [], pairs.neighbor_list

    def counted(positions, *geometry):
        found.append(positions.tobytes())
        return search(positions, *geometry)

    for module in [m for name, m in sys.modules.items() if name.startswith("segnn_ase.")]:
        if getattr(module, "neighbor_list", None) is search:
            monkeypatch.setattr(module, "neighbor_list", counted)
    return found


def test_neighbours_are_searched_once_a_frame(tmp_path, searches):
    """With atoms that left, copies, other sets, and the report with its figure."""
    images = [*molecules(), *alloys()[:20], Atoms("H"), Atoms("CO", [[0, 0, 0], [0, 0, 30.0]]), *trajectory()[:3]]
    images[7] = labelled(images[7], images[7].calc.results)
    images[7].positions[0] += 40.0
    ase.io.write(tmp_path / "train.xyz", images)
    ase.io.write(tmp_path / "test.xyz", trajectory()[20:25])
    report = check(tmp_path / "train.xyz", test=(tmp_path / "test.xyz",))
    write_report(report, tmp_path / "report.md")
    assert "detached atoms" in codes_in(report.findings) and report.judged is not None
    assert len(set(searches)) == len(images) + 5
    assert len(searches) <= len(images) + 5 + 24  # some again, for the stiffness of their bonds
    searches.clear()
    check_frames(report.sets)  # before a training
    assert len(searches) == len(images) + 5


@pytest.mark.parametrize("pbc", [False, True, (True, False, False), (True, True, False)], ids=str)
def test_atoms_are_detached_where_a_longer_search_finds_nothing(pbc):
    rng, several = np.random.default_rng(3), Counter()
    for n in range(200):
        cell = rng.uniform(3, 14, 3) * (np.eye(3) + rng.uniform(-0.4, 0.4, (3, 3)))
        symbols = rng.choice(["H", "C", "Ba", "Cs"], 3)
        atoms = Atoms(symbols, rng.uniform(-10, 25, (3, 3)), cell=cell, pbc=pbc)
        reach = DETACHED[1] * covalent_radii[atoms.numbers]
        i, j, S = neighbor_list(atoms.positions, cell, atoms.pbc, max(DETACHED[0], 2 * reach.max()))
        d = np.linalg.norm(atoms.positions[j] + S @ cell - atoms.positions[i], axis=1)
        near = (d < DETACHED[0]) | (d < reach[i] + reach[j])
        alone = detached_atoms(atoms, pairs.pairs_of(atoms))
        assert alone.tolist() == (np.bincount(i[near], minlength=3) == 0).tolist(), n
        several[int(alone.sum())] += 1
    assert len(several) > 1


# the surrogate


def features_of(structures: list[Atoms], species: list[int]):
    return survey(structures, range(len(structures)), species).features


@pytest.mark.parametrize("data", ["alloys", "molecules"])
def test_features_are_derivatives(data):
    """Forces and stress of every feature against central differences."""
    atoms, h = SOUND[data]()[2], 1e-4
    species = sorted(set(atoms.numbers.tolist()))
    features = features_of([atoms], species)
    for n, axis in ((0, 0), (5, 2)):
        up, down = atoms.copy(), atoms.copy()
        up.positions[n, axis] += h
        down.positions[n, axis] -= h
        energy = features_of([up, down], species).energy
        assert np.allclose(features.forces[0][3 * n + axis], (energy[1] - energy[0]) / (2 * h), atol=1e-5)
    if atoms.pbc.all():
        strained = [atoms.copy(), atoms.copy()]
        for sign, image in zip((1, -1), strained, strict=True):
            strain = np.eye(3)
            strain[0, 1] = strain[1, 0] = sign * h / 2
            image.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        energy = features_of(strained, species).energy
        slope = (energy[0] - energy[1]) / (2 * h) / atoms.get_volume()
        assert np.allclose(features.stress[0].reshape(3, 3, -1)[0, 1], slope, atol=1e-6)


@pytest.mark.parametrize("data", SOUND)
def test_the_surrogate_explains_sound_labels(data):
    judged = examine(Sets([frame_from_atoms(a) for a in SOUND[data]()])).judged
    assert judged.factor == 1.0 and judged.explained_alone > 0.8 and min(judged.explained) > 0.8


# commands


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("sound.xyz", molecules())
    ase.io.write("spoilt.xyz", [scaled(-1, "forces")(a) for a in molecules()])
    result = segnn("check", "sound.xyz", "--out", "report.md", "--fix", "fixed.xyz")
    assert result.exit_code == 0, result.output
    assert "0 errors" in result.stdout and "wrote 80 frames to fixed.xyz" in result.stdout
    assert "report.png" in (tmp_path / "report.md").read_text() and imread(tmp_path / "report.png").std() > 0.01
    result = segnn("check", "spoilt.xyz")
    assert result.exit_code == 1 and "negated forces" in result.stdout
    assert_one_line_error(segnn("check", "nothing.xyz"), "nothing.xyz")


def without_label(name: str):
    return lambda a: labelled(a, a.calc.results, **{name: None})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_nan, "there are no usable frames"),
        (without_label("energy"), "80/80"),
        (without_label("forces"), "no frame has forces"),
        (lambda a: Atoms("H"), "no frame of the training set has an energy or forces"),
    ],
    ids=["bad", "forces", "energies", "atoms"],
)
def test_a_report_of_data_that_lack_something(tmp_path, spoil, words):
    ase.io.write(tmp_path / "train.xyz", [spoil(a) for a in molecules()])
    write_report(check(tmp_path / "train.xyz"), tmp_path / "report.md")
    assert words in (tmp_path / "report.md").read_text()
    assert imread(tmp_path / "report.png").std() > 0.01


def test_training_refuses_what_would_spoil_it(tmp_path):
    images = [*molecules()[:12], molecules()[4]]
    images[-1] = labelled(images[-1], images[-1].calc.results, energy=images[-1].calc.results["energy"] + 0.5)
    ase.io.write(tmp_path / "train.xyz", images)
    data = {"train": str(tmp_path / "train.xyz"), "valid_fraction": 0}
    config = TrainConfig.parse({"out": str(tmp_path / "m.pt"), "data": data})
    with pytest.raises(DataError, match="same structures with different labels"):
        train(config, progress=False)


def test_a_training_is_not_refused_for_a_leak_into_tests(tmp_path):
    ase.io.write(tmp_path / "train.xyz", molecules()[:12])
    told = []
    data = {"train": str(tmp_path / "train.xyz"), "test": str(tmp_path / "train.xyz"), "valid_fraction": 0}
    read_data(TrainConfig.parse({"out": str(tmp_path / "m.pt"), "data": data, "training": {"epochs": 1}}), told.append)
    assert any("12 of 12 test frames are in the training set" in line for line in told)


@pytest.mark.parametrize(
    ("settings", "thorough"),
    [({}, True), ({"epochs": 2}, False), ({"epochs": 2, "committee": 40}, True), ({"max_minutes": 0.01}, False)],
)
def test_a_training_that_is_long_enough_is_checked_in_full(tmp_path, settings, thorough):
    """Of negated forces only a fit knows."""
    ase.io.write(tmp_path / "train.xyz", [scaled(-1, "forces")(a) for a in [*alloys(), *trajectory()]])
    values = {"out": str(tmp_path / "m.pt"), "data": {"train": str(tmp_path / "train.xyz")}}
    config = TrainConfig.parse({**values, "training": {"device": "cpu", **settings}})
    if thorough:
        with pytest.raises(DataError, match=r"the forces are negated.*refuse_flaws = false"):
            read_data(config, lambda text: None)
    else:
        read_data(config, lambda text: None)


def test_a_training_tells_of_an_offset_of_the_stress(tmp_path):
    ase.io.write(tmp_path / "train.xyz", [*stretched(2.6 * GPa), *trajectory()])
    told = []
    values = {"out": str(tmp_path / "m.pt"), "data": {"train": str(tmp_path / "train.xyz")}}
    read_data(TrainConfig.parse({**values, "training": {"device": "cpu"}}), told.append)
    assert any(line.startswith("warning: offset of stress") and "--stress-weight 0" in line for line in told)
