"""Data of other programs: read, or refused with lines that convert them, which are run here."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import read_frames
from segnn_ase.data.molecules import NAMES


def lines_of(path) -> str:
    with pytest.raises(DataError, match=r"data file is .*: not read\. These lines convert it") as found:
        read_frames(path)
    return str(found.value).partition("\n")[2]


def same_as(path, images) -> None:
    for frame, atoms in zip(read_frames(path), images, strict=True):
        assert frame.energy == pytest.approx(atoms.get_potential_energy())
        assert np.allclose(frame.forces, atoms.get_forces(), atol=1e-6)
        assert np.allclose(frame.atoms.positions, atoms.positions, atol=1e-6)


def saved(path, form: str, save=np.savez, **more) -> list:
    """Molecules in kcal/mol and Å."""
    images, unit = emt_atoms(4), units.kcal / units.mol
    energies = np.array([a.get_potential_energy() for a in images]) / unit
    values = (
        *(np.array([a.positions for a in images]), images[0].numbers),
        *(energies[:, None] if form == "sGDML" else energies, np.array([a.get_forces() for a in images]) / unit),
    )
    save(path, **dict(zip(NAMES[form], values, strict=True)), **more)
    return images


@pytest.mark.parametrize("form", NAMES)
def test_arrays_of_molecules_without_units(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    images = saved("a.npz", form)
    lines = lines_of("a.npz")
    with pytest.raises(DataError, match=f"arrays of {form} without units: not read"):
        read_frames("a.npz")
    exec(lines, {})
    same_as("frames.xyz", images)


KCAL = {"e_unit": np.array("kcal/mol"), "r_unit": np.array("Ang"), "theory": np.array("pbe")}
PUBLISHED = {"old_indices": np.arange(4), "old_energies": np.zeros(4), "old_forces": np.zeros((4, 3, 3))}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("form", "more"), [("sGDML", KCAL), ("rMD17", PUBLISHED)])
def test_arrays_of_molecules_with_units(tmp_path, form, more, save):
    images = saved(tmp_path / "a.npz", form, save, **more)
    same_as(tmp_path / "a.npz", images)
    same_as(f"{tmp_path}/a.npz@1:3", images[1:3])
    frame = read_frames(tmp_path / "a.npz")[0]
    assert set(frame.reading.units) == {
        ("energy", "kcal/mol"),
        ("forces", f"kcal/mol/{'Ang' if form == 'sGDML' else 'Å'}"),
    }
    assert not frame.atoms.pbc.any()


def test_other_units_and_cells_of_sgdml(tmp_path):
    images, cell = emt_atoms(2, lambda: molecule("H2O", vacuum=3.0)), np.array([[6, 0, 0], [1, 7, 0], [0, 2, 8.0]])
    R, E, F = ([f(a) for a in images] for f in (Atoms.get_positions, Atoms.get_potential_energy, Atoms.get_forces))
    more = {"e_unit": np.array(b"Ha"), "r_unit": np.array("bohr"), "lattice": cell.T / units.Bohr}
    labels = {"E": np.array(E) / units.Hartree, "F": np.array(F) * units.Bohr / units.Hartree}
    np.savez(tmp_path / "a.npz", R=np.array(R) / units.Bohr, z=images[0].numbers, **labels, **more)
    same_as(tmp_path / "a.npz", images)
    assert np.allclose(read_frames(tmp_path / "a.npz")[1].atoms.cell, cell)
    np.savez(tmp_path / "a.npz", R=np.array(R), z=images[0].numbers[:2], **labels, **more)
    with pytest.raises(DataError, match=r"R \(2, 3, 3\), z \(2,\).*expected a molecule of 2 atoms"):
        read_frames(tmp_path / "a.npz")


def test_arrays_that_are_bombs_or_objects(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", R=np.zeros(30_000_000))
    with pytest.raises(DataError, match="bytes that claim to be 240000"):
        read_frames(tmp_path / "a.npz")
    images = saved(tmp_path / "b.npz", "sGDML", **KCAL, perms=np.array([print], object))
    same_as(tmp_path / "b.npz", images)


def test_other_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", walrus=np.ones(3))
    with pytest.raises(DataError, match=r"arrays of NumPy \(walrus\)"):
        read_frames(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"b\.npz"):
        read_frames(tmp_path / "b.npz")


def test_positions_and_forces_of_cp2k(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = emt_atoms(3)
    for kind in ("pos", "frc"):
        text = ""
        for n, a in enumerate(images):
            rows = a.positions if kind == "pos" else a.get_forces() * units.Bohr / units.Hartree
            text += f"3\n i = {n:8d}, time = {n / 2:12.3f}, E = {a.get_potential_energy() / units.Hartree:20.10f}\n"
            text += "".join(f"{s} {x:.10f} {y:.10f} {z:.10f}\n" for s, (x, y, z) in zip(a.symbols, rows, strict=True))
        (tmp_path / f"RUN-{kind}-1.xyz").write_text(text)
    lines = lines_of("RUN-pos-1.xyz")
    assert lines == lines_of("RUN-frc-1.xyz@:2") and "Hartree / Bohr" in lines
    exec(lines, {"CELL": 12 * np.eye(3)})
    same_as("frames.xyz", images)
    assert read_frames("frames.xyz")[0].atoms.pbc.all()


@pytest.mark.parametrize("name", ["a.h5", "a.hdf5"])
def test_files_of_other_programs(tmp_path, name):
    (tmp_path / name).write_text("x")
    lines = lines_of(tmp_path / name)
    assert "h5py" in lines
    compile(lines, "lines", "exec")


@pytest.mark.parametrize("build", [copper, lambda: molecule("CH3CH2OH")], ids=["periodic", "molecule"])
@pytest.mark.parametrize("atomic", [True, False])
def test_input_data_of_n2p2(tmp_path, monkeypatch, build, atomic):
    monkeypatch.chdir(tmp_path)
    images, text = [*emt_atoms(2, build), *emt_atoms(1)], ""
    length, energy = (units.Bohr, units.Hartree) if atomic else (1.0, 1.0)
    for a in images:
        text += "begin\ncomment made of atom and energy\n"
        text += "".join(f"lattice {' '.join(map(str, vector / length))}\n" for vector in a.cell if a.pbc.all())
        for s, r, f in zip(a.symbols, a.positions, a.get_forces(), strict=True):
            text += f"atom {' '.join(map(str, r / length))} {s} 0.0 0.0 {' '.join(map(str, f * length / energy))}\n"
        text += f"energy {a.get_potential_energy() / energy}\ncharge 0.0\nend\n"
    Path("input.data").write_text(text)
    lines = lines_of("input.data")
    exec(lines if atomic else lines.replace("= ase.units.Bohr, ase.units.Hartree", "= 1, 1"), {})
    same_as("frames.xyz", images)
    assert [f.atoms.pbc.all() for f in read_frames("frames.xyz")] == [a.pbc.all() for a in images]


def test_formats_that_dpdata_may_know(tmp_path):
    (tmp_path / "ABACUS.8").write_text("ABACUS\n")
    with pytest.raises(DataError, match=r"(?s)cannot be read by ASE: UnknownFileType.*import dpdata.*fmt='\.\.\.'"):
        read_frames(tmp_path / "ABACUS.8")


def test_a_folder_of_nothing_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        read_frames(tmp_path)


def test_what_ase_reads_is_left_to_it(tmp_path):
    ase.io.write(tmp_path / "a.vasp", molecule("H2O", vacuum=5.0, pbc=True))
    assert read_frames(tmp_path / "a.vasp")[0].energy is None
