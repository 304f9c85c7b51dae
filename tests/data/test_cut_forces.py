"""Forces that constraints have cut: unknown, by constraint, by an array or by zeros that cannot be, and masked."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixCom, FixedLine, FixedPlane
from helpers.frames import emt_atoms

from segnn_ase.base.errors import DataError
from segnn_ase.check.doctor import check
from segnn_ase.check.repair import repair
from segnn_ase.data.batches import make_item
from segnn_ase.data.frames import check_labels, frame_from_atoms, label_table, read_frames
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.references import energy_scale
from segnn_ase.train.loss import mean_square


def slab(n: int = 0) -> Atoms:
    rng = np.random.default_rng(n)
    atoms = fcc111("Cu", (2, 2, 4), vacuum=6.0)
    atoms.rattle(0.12 * rng.uniform(0.3, 1), rng=rng)
    atoms.info.clear()
    return atoms


def labelled(atoms: Atoms, constraint=None, *, applied: bool = True) -> tuple[Atoms, np.ndarray]:
    """The structure with EMT's labels, a constraint applied to its forces or not, and the true forces."""
    atoms.calc = EMT()
    energy, true = atoms.get_potential_energy(), atoms.get_forces()
    atoms.set_constraint(constraint)
    forces = atoms.get_forces(apply_constraint=applied)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms, true


CONSTRAINTS = {
    "atoms": (FixAtoms(range(8)), 24),
    "two constraints": ([FixAtoms(range(4)), FixAtoms([6, 7])], 18),
    "z": (FixCartesian(range(8), (False, False, True)), 8),
    "line": (FixedLine(range(8), (0, 0, 1)), 16),
    "plane": (FixedPlane(range(8), (1, 0, 0)), 8),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("suffix", ["traj", "xyz"])
def test_constraints_that_were_applied(tmp_path, name, suffix):
    constraint, components = CONSTRAINTS[name]
    if suffix == "xyz" and name in ("line", "plane"):
        suffix = "traj"  # extended XYZ has no such constraint
    atoms, true = labelled(slab(), constraint)
    ase.io.write(tmp_path / f"a.{suffix}", atoms)
    (frame,) = read_frames(tmp_path / f"a.{suffix}")
    unknown = np.isnan(frame.forces)
    assert unknown.sum() == components and "constraints" in frame.reading.cut
    assert np.allclose(frame.forces[~unknown], true[~unknown], atol=1e-7)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_that_were_not_applied_cut_nothing(name):
    atoms, true = labelled(slab(), CONSTRAINTS[name][0], applied=False)
    frame = frame_from_atoms(atoms)
    assert np.array_equal(frame.forces, true) and not frame.reading.cut


def test_constraints_of_all_atoms_together_cut_nothing():
    atoms, true = labelled(slab(), FixCom(), applied=False)
    assert np.array_equal(frame_from_atoms(atoms).forces, true)


def test_zeros_that_cannot_be():
    atoms, true = labelled(slab())
    atoms.calc.results["forces"] = forces = true.copy()
    forces[:8] = 0
    frame = frame_from_atoms(atoms)
    assert np.isnan(frame.forces[:8]).all() and np.array_equal(frame.forces[8:], true[8:])
    assert frame.reading.cut == "zeros"
    assert "forces: 8 atoms of 1 frames are left out, as cut or masked by zeros" in label_table([frame])


def test_zeros_by_symmetry_are_forces():
    atoms, _ = labelled(bulk("Cu", cubic=True))
    atoms.calc.results["forces"] = np.array([[0.0, 0, 0], [0, 0, 0], [0.1, 0, 0], [-0.1, 0, 0]])
    assert np.array_equal(frame_from_atoms(atoms).forces, atoms.calc.results["forces"])


@pytest.mark.parametrize("name", ["forces_mask", "force_mask", "FORCES_MASK", "mine"])
@pytest.mark.parametrize("kind", [bool, int, float])
@pytest.mark.parametrize("of_components", [False, True])
@pytest.mark.parametrize("suffix", ["traj", "xyz"])
def test_an_array_says_which_forces_count(tmp_path, name, kind, of_components, suffix):
    atoms, true = labelled(slab())
    atoms.calc.results["forces"] = true.copy()
    atoms.calc.results["forces"][3] = np.nan  # the natural way to write what does not count
    mask = np.arange(16) >= 5
    mask = np.repeat(mask[:, None], 3, 1) if of_components else mask
    (atoms.arrays if suffix == "xyz" else atoms.info)[name] = mask.astype(kind)  # a .traj has no arrays of others
    ase.io.write(tmp_path / f"a.{suffix}", atoms)
    keys = LabelKeys(forces_mask="mine") if name == "mine" else None
    (frame,) = read_frames(tmp_path / f"a.{suffix}", keys)
    assert np.isnan(frame.forces[:5]).all() and np.allclose(frame.forces[5:], true[5:], atol=1e-7)
    assert frame.reading.cut == name and not frame.reading.unread


@pytest.mark.parametrize("mask", [np.full(16, 2), np.full((16, 2), 1), np.full(16, "a"), np.full(16, np.nan)])
def test_masks_that_are_none(mask):
    atoms, _ = labelled(slab())
    atoms.set_array("forces_mask", mask)
    with pytest.raises(DataError, match=r"forces mask of frame .from forces_mask. has .*expected \(16,\) or"):
        frame_from_atoms(atoms)


def test_a_mask_that_no_frame_has(tmp_path):
    ase.io.write(tmp_path / "a.traj", labelled(slab())[0])
    with pytest.raises(DataError, match="key for forces_mask is 'mine', but no frame has it"):
        read_frames(tmp_path / "a.traj", LabelKeys(forces_mask="mine"))


def test_a_mask_of_everything_leaves_no_forces():
    atoms, _ = labelled(slab())
    atoms.set_array("forces_mask", np.zeros(16))
    frame = frame_from_atoms(atoms)
    assert frame.forces is None and frame.origins[1] is None


def test_loss_and_scale_are_of_the_forces_that_are_known():
    atoms, true = labelled(slab(), FixAtoms(range(8)))
    frame = frame_from_atoms(atoms)
    check_labels([frame])
    assert energy_scale([frame], {29: 0.0}) == pytest.approx(np.sqrt(np.mean(true[8:] ** 2)))
    labels = make_item(frame, 3.0).labels
    loss = mean_square((labels.forces + 0.5).nan_to_num(100.0), labels.forces)
    assert float(loss) == pytest.approx(0.25)


@pytest.mark.parametrize("constraint", [None, FixAtoms(range(8)), FixCartesian(range(8))])
def test_units_are_not_judged_by_cut_forces(tmp_path, constraint):
    images = []
    for n in range(60):
        atoms, true = labelled(slab(n), constraint)
        atoms.calc.results["forces"] = np.where(np.arange(16)[:, None] < 8, 0.0, true)
        images.append(atoms)
    ase.io.write(tmp_path / "a.traj", images)
    report = check(tmp_path / "a.traj")
    assert not report.errors and "constrained forces" in {f.code for f in report.findings}
    repair(report, tmp_path / "b.xyz")
    old, new = read_frames(tmp_path / "a.traj"), read_frames(tmp_path / "b.xyz")
    assert all(np.allclose(a.forces, b.forces, atol=1e-7, equal_nan=True) for a, b in zip(old, new, strict=True))


def test_sound_forces_are_left_alone():
    for atoms in emt_atoms(20):
        assert np.array_equal(frame_from_atoms(atoms).forces, atoms.calc.results["forces"])
