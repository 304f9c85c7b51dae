"""Extended XYZ as people write it: read or refused, nothing dropped."""

import bz2
import gzip

import ase.io
import numpy as np
import pytest
from ase import Atoms
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import DataError
from segnn_ase.check.doctor import check
from segnn_ase.data.frames import read_frames

LATTICE = 'Lattice="3.6 0 0 0 3.7 0 0 0 3.8"'
COLUMNS = "Properties=species:S:1:pos:R:3:forces:R:3"
ROW = "Cu 0.1 0.2 0.3 0.4 0.5 0.6"


def written(path, comment: str, *rows: str):
    path.write_text(f"{len(rows)}\n{comment}\n" + "".join(f"{row}\n" for row in rows))
    return path


def frame_of(path, comment: str, *rows: str):
    return read_frames(written(path / "a.xyz", comment, *(rows or (ROW,))))[0]


@pytest.mark.parametrize("case", [str, str.lower, str.upper])
@pytest.mark.parametrize("pbc", ["", ' pbc="T F T"'])
def test_keys_in_any_case(tmp_path, case, pbc):
    key = case("Lattice")
    comment = f"{LATTICE.replace('Lattice', key)} {COLUMNS.replace('Properties', case('Properties'))} energy=-3.5"
    frame = frame_of(tmp_path, comment + pbc.replace("pbc", case("pbc")))
    assert np.allclose(frame.atoms.cell.lengths(), [3.6, 3.7, 3.8])
    assert frame.atoms.pbc.tolist() == ([True, False, True] if pbc else [True] * 3)
    assert frame.energy == -3.5 and np.allclose(frame.forces, [[0.4, 0.5, 0.6]])


@pytest.mark.parametrize("columns", ["Species:S:1:POS:R:3:Force:R:3", "symbols:S:1:Positions:R:3:REF_forces:R:3"])
def test_columns_in_any_case(tmp_path, columns):
    frame = frame_of(tmp_path, f"{LATTICE} Properties={columns} Energy=-3.5")
    assert np.allclose(frame.atoms.positions, [[0.1, 0.2, 0.3]]) and np.allclose(frame.forces, [[0.4, 0.5, 0.6]])


def test_numbers_instead_of_symbols(tmp_path):
    frame = frame_of(tmp_path, "Properties=z:I:1:pos:R:3 energy=-1", "29 0.1 0.2 0.3")
    assert frame.atoms.numbers.tolist() == [29]


@pytest.mark.parametrize(
    ("comment", "row", "message"),
    [
        ("energy=-3.5", ROW, "has 7 columns, but Properties=species:S:1:pos:R:3 names 4: name the others"),
        ("a comment", ROW, "has 7 columns"),
        ("", ROW, "has 7 columns"),
        (f"{LATTICE} {COLUMNS}", ROW + " 1", "has 8 columns, but Properties=.* names 7"),
        (f"{LATTICE} Properties=species:S:1:forces:R:3", "Cu 1 2 3", "has no positions"),
        ('pbc="T T T" energy=1', "Cu 0 0 0", "of which a, b, c span no volume"),
        ('pbc="F F T" energy=1', "Cu 0 0 0", "of which c span no volume"),
        ('cell="3 0 0 0 3 0 0 0 3" energy=1', "Cu 0 0 0", "has a cell, but no Lattice"),
        ('unit_cell="3 0 0 0 3 0 0 0 3" energy=1', "Cu 0 0 0", "has a unit_cell, but no Lattice"),
        ('Lattice="3 3 3" energy=1', "Cu 0 0 0", "9-long"),
        ('stress="1 2 3 4 5 6" energy=1', "Cu 0 0 0", "9-long"),
        (f"{LATTICE} Properties=species:S:1:pos:Q:3", "Cu 0 0 0", "Unknown property type"),
    ],
)
def test_what_ase_would_drop_is_refused(tmp_path, comment, row, message):
    with pytest.raises(DataError, match=rf"(?s)a\.xyz.*{message}"):
        frame_of(tmp_path, comment, row)


def test_a_molecule_may_note_its_box(tmp_path):
    frame = frame_of(tmp_path, 'box="9 9 9" pbc="F F F" energy=1', "Cu 0 0 0")
    assert not frame.atoms.pbc.any()


def test_every_frame_of_a_file_is_looked_at(tmp_path):
    ase.io.write(tmp_path / "a.xyz", emt_atoms(3, copper))
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "b.xyz").write_text(text + "1\nenergy=-1\n" + ROW + "\n")
    with pytest.raises(DataError, match=r"b\.xyz, frame 3 has 7 columns"):
        read_frames(tmp_path / "b.xyz")
    assert "7 columns" in check(tmp_path / "b.xyz").markdown()
    (tmp_path / "c.xyz").write_text(text + text.replace("Lattice", "LATTICE").replace("Properties", "properties"))
    frames = read_frames(tmp_path / "c.xyz")
    assert all(np.array_equal(a.forces, b.forces) for a, b in zip(frames[:3], frames[3:], strict=True))
    assert all(f.atoms.pbc.all() for f in frames)


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2)])
def test_compressed_files(tmp_path, suffix, module):
    ase.io.write(tmp_path / "a.xyz", emt_atoms(3, copper))
    with module.open(tmp_path / f"a.xyz.{suffix}", "wb") as file:
        file.write((tmp_path / "a.xyz").read_bytes())
    assert len(read_frames(f"{tmp_path}/a.xyz.{suffix}@1:")) == 2


def test_vectors_behind_the_atoms(tmp_path):
    rows = ("Cu 0 0 0", "VEC1 3.6 0 0", "VEC2 0 3.7 0", "VEC3 0 0 3.8")
    (tmp_path / "a.xyz").write_text("1\na comment\n" + "\n".join(rows) + "\n")
    frame = read_frames(tmp_path / "a.xyz")[0]
    assert np.allclose(frame.atoms.cell.lengths(), [3.6, 3.7, 3.8]) and frame.atoms.pbc.all()


def test_what_gpumd_writes(tmp_path):
    atoms = emt_atoms(1, copper)[0]
    text = f'energy=-1.5 lattice="{" ".join(map(str, atoms.cell.array.ravel()))}" '
    text += f'virial="{" ".join(map(str, -2.0 * np.eye(3).ravel()))}" properties=species:S:1:pos:R:3:force:R:3'
    rows = [f"Cu {' '.join(map(str, [*p, *f]))}" for p, f in zip(atoms.positions, atoms.get_forces(), strict=True)]
    frame = frame_of(tmp_path, text, *rows)
    assert frame.energy == -1.5 and np.allclose(frame.forces, atoms.get_forces())
    assert np.allclose(frame.stress, 2.0 * np.eye(3) / atoms.get_volume())


def test_nothing_else_is_changed(tmp_path):
    images = [Atoms("H"), *emt_atoms(2), *emt_atoms(2, copper)]
    images[1].info["note"] = 'a "lattice = 3" of Properties=3'
    ase.io.write(tmp_path / "a.xyz", images)
    assert [len(f.atoms) for f in read_frames(tmp_path / "a.xyz")] == [1, 3, 3, 4, 4]
