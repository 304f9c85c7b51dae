"""A potential beside its reference: where the reference is the potential itself, nothing differs, and it is right."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from helpers.loops import asking

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError
from segnn_ase.learn.choice import distinct
from segnn_ase.learn.comparison import (
    RIGID,
    Compared,
    compare_modes,
    compare_relaxed,
    compare_volumes,
    has_vacuum,
    minima_of_potential,
    minimum_of,
    modes_of,
    of_first,
    reweighted_ensembles,
    rigid_motions,
    weights_of,
)
from segnn_ase.learn.explore import Condition, Planned, Ran
from segnn_ase.learn.labelled import CONDITION, KEY, LabelledFrames
from segnn_ase.learn.labeller import Labeller
from segnn_ase.learn.report import of_comparison
from segnn_ase.md.analysis import radial_distribution
from segnn_ase.store.shipped import find_model


def test_of_a_crystal(tmp_path):
    calculator = SEGNNCalculator("silicon-pbe", domain="ignore")
    atoms = bulk("Si", cubic=True)
    pool, labeller = asking(tmp_path, "silicon-pbe")
    with pool:
        for name in ("end", "far"):
            (tmp_path / name).mkdir()
        theirs, own = compare_volumes(atoms, calculator, labeller, tmp_path / "end")
        modes = compare_modes(atoms, calculator, labeller, tmp_path / "end", 5)
        labels = labeller.labelled.count
        assert np.array_equal(compare_modes(atoms, calculator, labeller, tmp_path / "end", 5), modes)
        assert labeller.labelled.count == labels == 8 + 2 * 5  # none is asked for again
        far = atoms.copy()
        far.set_cell(1.1 * atoms.cell.array, scale_atoms=True)
        assert compare_volumes(far, calculator, labeller, tmp_path / "far") is None
        lost = [f"end/mode/4{sign}" for sign in "+-"] + ["end/volume/3"]
        for key in lost:  # what fails is missing, and stops nothing
            labeller.labelled.failed[key] = "it did not converge"
            del labeller.labelled.frames[key]
        assert len(compare_modes(atoms, calculator, labeller, tmp_path / "end", 5)) == 4
        assert compare_volumes(atoms, calculator, labeller, tmp_path / "end") is None
    assert np.allclose(theirs, own, rtol=1e-3) and 80 < own.bulk_modulus < 100  # PBE: 89 GPa
    assert own.volume ** (1 / 3) == pytest.approx(5.47 / 2, rel=0.005)
    assert modes.shape == (5, 2) and np.allclose(*modes.T, rtol=1e-3)
    atoms.calc = calculator
    vibrations = Vibrations(atoms, name=str(tmp_path / "vibrations"))
    vibrations.run()
    known = np.real(vibrations.get_frequencies())[3:]
    assert np.allclose(modes[:, 1], known[np.linspace(0, len(known) - 1, 5).round().astype(int)], rtol=5e-3)
    assert all(key.startswith(("end/", "far/")) for key in labeller.labelled.frames)


def test_of_what_the_potential_relaxes(tmp_path, monkeypatch):
    """By a reference that says the same, and by one whose energies are others and whose forces are not; the four minima
    are fewer, each of which is counted once unless nothing is alike."""
    calculator = SEGNNCalculator("acetylacetone-pbe", domain="ignore")
    start, ran = read(find_model("acetylacetone-pbe").parent / "reference.xyz", 1), []
    for structure in (0, 1):
        frames = [start.copy() for _ in range(5)]
        for seed, frame in enumerate(frames):
            frame.rattle(0.1, seed=seed + 10 * structure)
        planned = Planned(Condition(structure, 300.0, None), 0, start, 4000, 0.5, 0, 1.0, 50.0)
        ran.append(Ran(planned, 4000, None, frames, []))
    pool, labeller = asking(tmp_path, "acetylacetone-pbe")
    with pool:
        assert compare_relaxed(ran, calculator, labeller, tmp_path, 0) is None
        (tmp_path / "relaxed.xyz").unlink()
        minima = minima_of_potential(of_first(ran), 4, calculator)
        assert len(minima) == 2  # a methyl group turned, which is 0.5 meV
        (run, one), _ = minima
        mirrored = Atoms(one.numbers, one.positions * [1, 1, -1])
        hydrogens = np.flatnonzero(one.numbers == 1)
        mirrored.positions[hydrogens] = mirrored.positions[np.roll(hydrogens, 1)]
        assert len(distinct([*minima, (run, mirrored), (run, one[1:]), (run, one[:-1])], calculator)) == 4
        monkeypatch.setattr("segnn_ase.learn.choice.ALIKE", 0.0)
        same = compare_relaxed(ran, calculator, labeller, tmp_path, 4)
        assert labeller.labelled.count == same.frames == 4 and max(same.forces, same.off) < 0.1  # float32 and 64
        known = labeller.labelled.frames
        assert all(np.abs(frame.get_forces()).max() < 2.1e-3 for frame in known.values())
        assert {frame.info[CONDITION] for frame in known.values()} == {"structure 1, 300 K"}
        for n, frame in enumerate(known.values()):
            forces = frame.get_forces()
            frame.calc = SinglePointCalculator(frame, energy=0.02 * (-1) ** n, forces=forces)
        other = compare_relaxed(ran, calculator, labeller, tmp_path, 4)
        for key in list(known)[1:]:
            del known[key]
            labeller.labelled.failed[key] = "it did not converge"
        assert compare_relaxed(ran, calculator, labeller, tmp_path, 4) is None
    told = of_comparison(Compared(None, np.zeros((0, 2)), other, []), tmp_path / "acac.report.md")
    assert told[-1].startswith("- structure 1: 4 minima of the potential, ")
    spread = 20.0 * np.sqrt(4 / 3)  # of four about a mean that they have themselves
    assert other.forces == same.forces and other.spread == pytest.approx(spread)
    assert other.off == pytest.approx(spread, abs=same.spread + 0.1) and same.spread < 1.0  # all are one minimum


def test_of_a_molecule_and_of_fixed_atoms(tmp_path):
    calculator = SEGNNCalculator("acetylacetone-pbe", domain="ignore")
    atoms = read(find_model("acetylacetone-pbe").parent / "reference.xyz", 1)
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=1e-3)
    atoms.calc = None
    directions = modes_of(atoms, calculator, 500)
    weighed = (directions * np.sqrt(atoms.get_masses())[:, None]).reshape(len(directions), -1)
    assert len(directions) == 3 * len(atoms) - 6 and np.allclose(weighed @ weighed.T, np.eye(len(directions)))
    moved = rigid_motions(atoms) * np.repeat(np.sqrt(atoms.get_masses()), 3)[:, None]
    assert np.abs(weighed @ moved).max() < 1e-8
    pool, labeller = asking(tmp_path, "acetylacetone-pbe")
    with pool:
        highest = compare_modes(atoms, calculator, labeller, tmp_path, 3)[-1]
    assert 2900 < highest[1] < 3300 and highest[0] == pytest.approx(highest[1], rel=1e-3)  # cm^-1, of C-H or O-H
    heavy = atoms.copy()
    heavy.set_masses(np.where(atoms.numbers == 1, 2.014, atoms.get_masses()))
    with asking(tmp_path / "heavy", "acetylacetone-pbe")[0] as pool:
        others = compare_modes(
            heavy, calculator, Labeller(pool, LabelledFrames(tmp_path / "heavy")), tmp_path / "heavy", 3
        )
    assert np.all((others[-1] / highest > 0.7) & (others[-1] / highest < 0.8))  # deuterium
    atoms.set_constraint(FixAtoms([0, 1]))
    fixed = modes_of(atoms, calculator, 500)
    assert len(fixed) == 3 * (len(atoms) - 2) and np.all(fixed[:, :2] == 0)
    atoms.set_constraint(FixAtoms([-1]))
    assert np.all(modes_of(atoms, calculator, 500)[:, -1] == 0)
    for constraint in (FixAtoms(range(len(atoms))), FixBondLength(0, 1)):
        atoms.set_constraint(constraint)
        assert len(compare_modes(atoms, calculator, labeller, tmp_path / "none", 3)) == 0


def test_what_moves_the_whole():
    carbon_dioxide = Atoms("CO2", [[0, 0, 0], [1.16, 0, 0], [-1.16, 1e-5, 0]])
    for atoms, count in ((carbon_dioxide, 5), (molecule("H2O"), 6)):
        sizes = np.linalg.svd(rigid_motions(atoms))[1]
        assert (sizes > RIGID * sizes[0]).sum() == count
    wire = Atoms("Cu2", [[0, 0, 0], [0, 1, 1.2]], cell=[0, 0, 2.4], pbc=(False, False, True))
    turned = rigid_motions(wire)[:, 3].reshape(2, 3)
    assert rigid_motions(wire).shape == (6, 4) and np.allclose(turned[:, [1, 2]], 0) and turned[0, 0] == -turned[1, 0]


def test_an_empty_layer_has_no_bulk_modulus():
    assert not has_vacuum(bulk("Si", cubic=True)) and not has_vacuum(bulk("NaCl", "rocksalt", a=5.7))
    assert has_vacuum(fcc111("Cu", (2, 2, 3), vacuum=5.0, periodic=True))
    boxed = molecule("H2O", cell=[9, 9, 9], pbc=True)
    boxed.positions += 4.4  # across the boundary
    boxed.wrap()
    assert has_vacuum(boxed)


def test_no_minimum_is_none():
    volumes = np.linspace(0.9, 1.1, 7)
    assert minimum_of(10 * volumes, np.exp(-volumes), 1) is None
    assert minimum_of(volumes, -((volumes - 1) ** 2), 1) is None  # a maximum
    found = minimum_of(10 * volumes, 5 * (volumes - 1) ** 2, 2)
    assert found.volume == pytest.approx(5.0, rel=1e-3)
    assert found.bulk_modulus == pytest.approx(1.0 / units.GPa, rel=0.03)  # V d2E/dV2, with E = 0.05 (V - 10)^2


def test_frames_are_weighed_as_the_reference_visits_them():
    """A particle in a well by the potential, which the reference makes narrower: the mean of its energy is that of the
    narrower one."""
    rng, kelvin, narrow = np.random.default_rng(0), 300.0, 1.5
    beta = 1 / (units.kB * kelvin)
    x = rng.normal(size=20_000) / np.sqrt(beta)
    own, reference = 0.5 * x**2, 0.5 * narrow * x**2
    weights = weights_of(reference - own, kelvin)
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ x**2 == pytest.approx(1 / (narrow * beta), rel=0.03)
    frames = []
    for n in range(400):
        info = {CONDITION: "here", KEY: f"final/drawn/s1-300K-1/{n}"}
        frame = Atoms("CuAu", [[0, 0, 0], [2.5 + x[n], 0, 0]], cell=[8, 8, 8], pbc=True, info=info)
        frame.calc = SinglePointCalculator(frame, energy=reference[n])
        frames.append(frame)
    said = [{"energy": energy} for energy in own[:400]]
    (found,) = reweighted_ensembles(frames, said, {"here": kelvin, "elsewhere": 10.0})
    assert found.frames == 400 and 200 < found.effective < 400
    w = weights_of(reference[:400] - own[:400], kelvin)
    assert found.shift == pytest.approx(1e3 * (w @ own[:400] - own[:400].mean()) / 2) and found.shift < 0
    r, theirs, mine = found.curves["Au-Cu"]
    assert mine[np.argmin(abs(r - 2.5))] < theirs[np.argmin(abs(r - 2.5))]  # the narrower well has the higher peak
    for n in range(200, 400):  # another run, which is off by as much everywhere
        frames[n].info[KEY] = f"final/drawn/s1-300K-2/{n}"
        frames[n].calc.results["energy"] += 5.0
    (both,) = reweighted_ensembles(frames, said, {"here": kelvin})
    assert both.effective == pytest.approx(found.effective, rel=0.05) and both.shift == pytest.approx(
        found.shift, rel=0.3
    )
    same = weights_of(np.full(5, 3.0), kelvin)
    assert np.allclose(same, 0.2)


def test_weights_of_a_radial_distribution():
    frames = [Atoms("Cu2", [[0, 0, 0], [d, 0, 0]], cell=[9, 9, 9], pbc=True) for d in (2.0, 3.0)]
    alone = [radial_distribution(frame, ["Cu-Cu"], 4.0, 8)["Cu-Cu"][1] for frame in frames]
    found = radial_distribution(frames, ["Cu-Cu"], 4.0, 8, weights=[1, 3])["Cu-Cu"][1]
    assert np.allclose(found, 0.25 * alone[0] + 0.75 * alone[1])
    for bad in ([1.0], [1, -1], [0, 0], [1, np.nan]):
        with pytest.raises(ConfigError, match=r"weights is .* expected 2 numbers"):
            radial_distribution(frames, ["Cu-Cu"], 4.0, 8, weights=bad)
