"""Any labelled frames become extended XYZ: the same structures and labels, whole or not at all."""

import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms
from ase.units import kcal, mol
from helpers.command_line import assert_one_line_error, segnn
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.data.convert import convert
from segnn_ase.data.frames import read_frames
from segnn_ase.data.labels import LabelKeys


def assert_same(found, expected) -> None:
    for new, old in zip(found, expected, strict=True):
        assert np.allclose(new.atoms.positions, old.atoms.positions, atol=1e-7)
        assert np.allclose(new.atoms.cell, old.atoms.cell) and (new.atoms.pbc == old.atoms.pbc).all()
        for name in ("energy", "forces", "stress"):
            assert (getattr(new, name) is None) == (getattr(old, name) is None)
            if getattr(old, name) is not None:
                assert np.allclose(getattr(new, name), getattr(old, name), atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.xyz", "a.json"])
def test_frames_of_ase(tmp_path, name):
    images = [*emt_atoms(3, copper), *emt_atoms(2)]
    ase.io.write(tmp_path / name, images)
    done = convert(tmp_path / name, tmp_path / "out.xyz")
    assert done[-1] == f"wrote 5 frames to {tmp_path / 'out.xyz'}" and "calculator forces" in done[0]
    assert_same(read_frames(tmp_path / "out.xyz"), read_frames(tmp_path / name))


def test_virials_units_masks_and_isolated_atoms(tmp_path):
    images = emt_atoms(2, copper)
    bare = []
    for a in images:
        labels = {"REF_energy": a.get_potential_energy() * mol / kcal, "energy_unit": "kcal/mol"}
        labels["REF_virial"] = -a.get_stress(voigt=False) * a.get_volume() * mol / kcal
        bare.append(a.copy())
        bare[-1].info |= {**labels, "virial_unit": "kcal/mol", "forces_unit": "kcal/mol/Å", "note": "first"}
        bare[-1].arrays["REF_forces"] = a.get_forces() * mol / kcal
        bare[-1].arrays["forces_mask"] = np.arange(4) > 0
    bare[1] = bare[1][:1]
    bare[1].info = {"REF_energy": -1.0, "energy_unit": "kcal/mol", "config_type": "IsolatedAtom"}
    del bare[1].arrays["REF_forces"], bare[1].arrays["forces_mask"]
    ase.io.write(tmp_path / "a.xyz", bare)
    convert([tmp_path / "a.xyz"], tmp_path / "b.xyz")
    frames = read_frames(tmp_path / "b.xyz")
    assert_same(frames, read_frames(tmp_path / "a.xyz"))
    assert frames[0].energy == pytest.approx(images[0].get_potential_energy())
    assert np.allclose(frames[0].stress, images[0].get_stress(voigt=False), atol=1e-7)
    assert np.isnan(frames[0].forces[0]).all() and np.allclose(frames[0].forces[1:], images[0].get_forces()[1:])
    assert frames[1].reading.isolated and not frames[1].reading.units
    (again, _) = ase.io.read(tmp_path / "b.xyz", ":")
    assert again.info["note"] == "first" and "REF_energy" not in again.info and "energy_unit" not in again.info


def test_frozen_atoms_stay_so(tmp_path):
    images = emt_atoms(2, copper)
    for a in images:
        a.calc.results["forces"][:2] = 0.0
        a.set_constraint(FixAtoms([0, 1]))
    ase.io.write(tmp_path / "a.traj", images)
    convert(tmp_path / "a.traj", tmp_path / "b.xyz")
    frames = read_frames(tmp_path / "b.xyz")
    assert all(np.isnan(f.forces[:2]).all() and np.isfinite(f.forces[2:]).all() for f in frames)


def test_what_the_format_cannot_hold(tmp_path):
    images = emt_atoms(2, copper)
    images[0].info |= {"lattice": "fcc", "a note": "with \n breaks", "seed": 7}
    ase.io.write(tmp_path / "a.traj", images)
    done = convert(tmp_path / "a.traj", tmp_path / "b.xyz")
    assert done[1] == "left out, as extended XYZ cannot hold it: lattice"
    again = ase.io.read(tmp_path / "b.xyz", "0")
    assert again.info["a note"] == "with breaks" and again.info["seed"] == 7
    assert_same(read_frames(tmp_path / "b.xyz"), read_frames(tmp_path / "a.traj"))


def test_nothing_is_written_where_a_check_fails(tmp_path):
    images = emt_atoms(3, copper)
    ase.io.write(tmp_path / "good.xyz", images)
    images[2].calc.results["forces"][1, 1] = np.nan
    ase.io.write(tmp_path / "nan.traj", images)
    ase.io.write(tmp_path / "bare.xyz", copper())
    images[1].cell[2] = images[1].cell[1]
    ase.io.write(tmp_path / "flat.traj", images[:2])
    (tmp_path / "out.xyz").write_text("mine")
    for names, message in (
        (["good.xyz", "nan.traj"], "frame 2 .*NaN"),
        (["bare.xyz"], "no frame has an energy or forces"),
        (["good.xyz", "flat.traj"], "frame 1: cell"),
    ):
        with pytest.raises(DataError, match=message):
            convert([tmp_path / name for name in names], tmp_path / "out.xyz", overwrite=True)
    with pytest.raises(ConfigError, match=r"out.xyz.*exists.*--overwrite"):
        convert(tmp_path / "good.xyz", tmp_path / "out.xyz")
    assert (tmp_path / "out.xyz").read_text() == "mine" and len(list(tmp_path.iterdir())) == 5


def test_names_that_are_refused(tmp_path):
    ase.io.write(tmp_path / "a.xyz", emt_atoms(2))
    before = (tmp_path / "a.xyz").read_bytes()
    with pytest.raises(ConfigError, match="would overwrite"):
        convert(f"{tmp_path}/a.xyz@:1", tmp_path / "." / "a.xyz")
    for name in ("b.traj", "b", "b.xyz.gz"):
        with pytest.raises(ConfigError, match=r"expected a name that ends in \.xyz or \.extxyz"):
            convert(tmp_path / "a.xyz", tmp_path / name)
    assert (tmp_path / "a.xyz").read_bytes() == before


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = emt_atoms(3)
    for a in images:
        a.info["mine"] = 2.0 * a.get_potential_energy()
    ase.io.write("a.traj", images)
    ase.io.write("b.traj", images[:1])
    result = segnn("convert", "a.traj@:2", "b.traj", "out.xyz", "--energy-key", "mine")
    assert result.exit_code == 0 and result.stdout.endswith("wrote 3 frames to out.xyz\n"), result.output
    assert_same(read_frames("out.xyz"), read_frames(["a.traj@:2", "b.traj"], LabelKeys(energy="mine")))
    assert_one_line_error(segnn("convert", "c.traj", "out.xyz"), "no such file")
    assert segnn("convert", "a.traj").exit_code == 2
