"""Folders of DeePMD, laid out as dpdata writes them, against the structures that they were made of."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import DataError
from segnn_ase.check.doctor import check
from segnn_ase.data.frames import read_frames


def alloy() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Au"
    return atoms


def save(path, form: str, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.asarray(values, float).reshape(len(values), -1)
    if form == "raw":
        np.savetxt(path.with_suffix(".raw"), rows, fmt="%.12f")
    else:
        np.save(path.with_suffix(".npy"), rows.astype(form))


def write_system(folder, images: list[Atoms], form: str = "float64", sets: int = 1) -> list[Atoms]:
    """One composition; form: raw, or the precision of the arrays."""
    names = list(dict.fromkeys(images[0].symbols))
    folder.mkdir(parents=True)
    (folder / "type_map.raw").write_text("\n".join(names))
    (folder / "type.raw").write_text("\n".join(str(names.index(s)) for s in images[0].symbols))
    if not images[0].pbc.any():
        (folder / "nopbc").write_text("")
    size = -(-len(images) // sets)
    for n in range(sets):
        part = images[n * size : (n + 1) * size]
        inside = folder if form == "raw" else folder / f"set.{n:03d}"
        save(inside / "coord", form, [a.positions for a in part])
        save(inside / "energy", form, [a.get_potential_energy() for a in part])
        save(inside / "force", form, [a.get_forces() for a in part])
        if images[0].pbc.any():
            save(inside / "box", form, [a.cell.array for a in part])
            save(inside / "virial", form, [-a.get_stress(voigt=False) * a.get_volume() for a in part])
    return images


def assert_same(frames, images, tolerance: float = 1e-9) -> None:
    for frame, atoms in zip(frames, images, strict=True):
        assert list(frame.atoms.symbols) == list(atoms.symbols) and (frame.atoms.pbc == atoms.pbc).all()
        assert np.allclose(frame.atoms.positions, atoms.positions, atol=tolerance)
        assert np.allclose(frame.atoms.cell, atoms.cell, atol=tolerance)
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=tolerance)
        assert np.allclose(frame.forces, atoms.get_forces(), atol=tolerance)
        if atoms.pbc.all():
            assert np.allclose(frame.stress, atoms.get_stress(voigt=False), atol=tolerance)


@pytest.mark.parametrize(
    ("form", "sets", "tolerance"), [("raw", 1, 1e-9), ("float64", 1, 1e-9), ("float64", 3, 1e-9), ("float32", 2, 1e-5)]
)
def test_a_crystal(tmp_path, form, sets, tolerance):
    images = write_system(tmp_path / "alloy", emt_atoms(5, alloy), form, sets)
    frames = read_frames(tmp_path / "alloy")
    assert_same(frames, images, tolerance)
    assert frames[0].origins == ("energy", "forces", "virial") and frames[4].source.endswith("alloy, frame 4")
    assert_same(read_frames(f"{tmp_path}/alloy@1:4:2"), images[1:4:2], tolerance)


def test_a_molecule_without_a_cell(tmp_path):
    images = write_system(tmp_path / "a", emt_atoms(3, lambda: molecule("CH3CH2OH")))
    assert_same(read_frames(tmp_path / "a"), images)


def test_a_folder_of_systems(tmp_path):
    first = write_system(tmp_path / "all" / "a", emt_atoms(2, copper))
    second = write_system(tmp_path / "all" / "b" / "c", emt_atoms(2, alloy))
    assert_same(read_frames(tmp_path / "all"), [*first, *second])
    assert not [f for f in check(tmp_path / "all").findings if f.severity == "error"]


def test_mixed_compositions_with_atoms_that_fill_up(tmp_path):
    images = [*emt_atoms(2, alloy), *emt_atoms(1, copper), *emt_atoms(1, lambda: bulk("Al", cubic=True) * (1, 1, 2))]
    names, most = ["Al", "Au", "Cu"], 10
    kinds = np.full((4, most), -1)
    coord, force = np.zeros((2, 4, most, 3))
    for n, a in enumerate(images):
        kinds[n, : len(a)] = [names.index(s) for s in a.symbols]
        coord[n, : len(a)], force[n, : len(a)] = a.positions, a.get_forces()
    (tmp_path / "set.000").mkdir()
    (tmp_path / "type_map.raw").write_text("\n".join(names))
    (tmp_path / "type.raw").write_text("0\n" * most)
    arrays = {"coord": coord, "force": force, "energy": [a.get_potential_energy() for a in images]}
    arrays["virial"] = [-a.get_stress(voigt=False) * a.get_volume() for a in images]
    for name, values in {**arrays, "box": [a.cell.array for a in images]}.items():
        save(tmp_path / "set.000" / name, "float64", values)
    np.save(tmp_path / "set.000" / "real_atom_types.npy", kinds)
    assert_same(read_frames(tmp_path), images)
    (tmp_path / "type_map.raw").write_text("Al\nAu")
    with pytest.raises(DataError, match="atoms of type 2, but 2 names"):
        read_frames(tmp_path)


def without_names(folder) -> None:
    (folder / "type_map.raw").unlink()


def strange_names(folder) -> None:
    (folder / "type_map.raw").write_text("Au\nOW")


def without_cells(folder) -> None:
    (folder / "set.000" / "box.npy").unlink()


def without_positions(folder) -> None:
    (folder / "set.000" / "coord.npy").unlink()


def fewer_forces(folder) -> None:
    np.save(folder / "set.000" / "force.npy", np.zeros((2, 9)))


def cut_short(folder) -> None:
    content = (folder / "set.000" / "coord.npy").read_bytes()
    (folder / "set.000" / "coord.npy").write_bytes(content[:-40])


def gigantic(folder) -> None:
    content = (folder / "set.000" / "coord.npy").read_bytes()
    (folder / "set.000" / "coord.npy").write_bytes(
        content.replace(b"(3, 12), }            ", b"(3000000000000, 12), }")
    )


def pickled(folder) -> None:
    np.save(folder / "set.000" / "energy.npy", np.array([print] * 3, object), allow_pickle=True)


FLAWS = {
    without_names: "has 2 types of atoms, but 0 names in type_map.raw",
    strange_names: r"has \['OW'\] in type_map.raw; expected symbols",
    without_cells: "has no box.npy or box.raw; a file `nopbc` says",
    without_positions: "has no coord.npy or coord.raw",
    fewer_forces: r"force.npy' has shape \(2, 9\); expected 3 frames of 12 numbers",
    cut_short: "cannot be read",
    gigantic: "cannot be read",
    pickled: "cannot be read",
}


@pytest.mark.parametrize("spoil", FLAWS, ids=lambda spoil: spoil.__name__)
def test_flaws(tmp_path, spoil):
    write_system(tmp_path / "a", emt_atoms(3, alloy))
    spoil(tmp_path / "a")
    with pytest.raises(DataError, match=FLAWS[spoil]):
        read_frames(tmp_path / "a")
    assert any(f.severity == "error" for f in check(tmp_path / "a").findings)
