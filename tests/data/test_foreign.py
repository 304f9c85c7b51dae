"""Data that are not read: the message holds lines that convert them, which are run here."""

import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import molecule
from helpers.frames import emt_atoms

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import read_frames

NPZ = {"sGDML": ("R", "z", "E", "F"), "rMD17": ("coords", "nuclear_charges", "energies", "forces")}


def lines_of(path) -> str:
    with pytest.raises(DataError, match=r"data file is .*: not read\. These lines convert it") as found:
        read_frames(path)
    return str(found.value).partition("\n")[2]


def same_as(path, images) -> None:
    for frame, atoms in zip(read_frames(path), images, strict=True):
        assert frame.energy == pytest.approx(atoms.get_potential_energy())
        assert np.allclose(frame.forces, atoms.get_forces(), atol=1e-6)
        assert np.allclose(frame.atoms.positions, atoms.positions, atol=1e-6)


@pytest.mark.parametrize("form", NPZ)
def test_arrays_of_molecules(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    images, unit = emt_atoms(4), units.kcal / units.mol
    energies = np.array([a.get_potential_energy() for a in images]) / unit
    values = (
        *(np.array([a.positions for a in images]), images[0].numbers),
        *(energies[:, None] if form == "sGDML" else energies, np.array([a.get_forces() for a in images]) / unit),
    )
    np.savez("a.npz", **dict(zip(NPZ[form], values, strict=True)))
    lines = lines_of("a.npz")
    with pytest.raises(DataError, match=f"arrays of {form}: not read"):
        read_frames("a.npz")
    exec(lines, {})
    same_as("frames.xyz", images)


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


@pytest.mark.parametrize(
    ("files", "form"), [(["type.raw", "box.raw"], "deepmd/raw"), (["set.000/coord.npy", "type.raw"], "deepmd/npy")]
)
def test_folders_of_deepmd(tmp_path, files, form):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("0")
    lines = lines_of(tmp_path)
    assert f"fmt='{form}'" in lines and "import dpdata" in lines
    compile(lines, "lines", "exec")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.h5", "x", "h5py"),
        ("a.hdf5", "x", "h5py"),
        ("input.data", "begin\nlattice 1 0 0\natom 0 0 0 Cu 0 0 0 0 0\nend\n", "fmt='n2p2'"),
    ],
)
def test_files_of_other_programs(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    lines = lines_of(tmp_path / name)
    assert word in lines
    compile(lines, "lines", "exec")


def test_a_folder_of_nothing_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        read_frames(tmp_path)


def test_what_ase_reads_is_left_to_it(tmp_path):
    ase.io.write(tmp_path / "a.vasp", molecule("H2O", vacuum=5.0, pbc=True))
    assert read_frames(tmp_path / "a.vasp")[0].energy is None
