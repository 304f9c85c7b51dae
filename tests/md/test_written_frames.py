"""What a run writes can be read back, and carries no label but its own."""

import io

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from ase.calculators.emt import EMT
from helpers.dynamics import config, crystal, run

from segnn_ase import SEGNNCalculator
from segnn_ase.base.extxyz import extxyz, writable
from segnn_ase.base.label_names import is_result
from segnn_ase.data.frames import read_frames
from segnn_ase.md.outputs import make_frame
from segnn_ase.md.run import run_md
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config

LABELS = {
    **{f"{prefix}_energy": -3.0 for prefix in ("REF", "ref", "dft", "DFT", "target", "mace", "MyOwn")},
    **{"energy": -3.0, "Energy": -3.0, "E": -3.0, "total_energy": -3.0, "E_total": -3.0, "energies": np.array([-3.0])},
    **{"REF_stress": np.ones(6), "virial": np.eye(3), "REF_virials": np.ones(9), "dft_dipole": np.ones(3)},
    **{"free_energy": -3.0, "REF_magmom": 1.0, "energy_unit": "kcal/mol", "units": "real", "distance_unit": "Bohr"},
}
ARRAYS = ("REF_forces", "dft_forces", "forces", "Force", "F", "mace_forces", "Forces_dft", "gradient", "REF_stresses")
OF_ATOMS = ("REF_charges", "dft_energies", "charges", "magmoms", "ref_magmoms")
KEPT = {"config_type": "bulk", "energy_cutoff": 500.0, "force_field": "none", "name": "Cu", "temperature": 300.0}


def with_labels(atoms: Atoms) -> Atoms:
    """The structure with every kind of label, and with what is none."""
    atoms.info |= {**LABELS, **KEPT}
    for name in ARRAYS:
        atoms.arrays[name] = np.ones((len(atoms), 3))
    for name in OF_ATOMS:
        atoms.arrays[name] = np.ones(len(atoms))
    atoms.arrays["tags"] = np.arange(len(atoms))
    atoms.set_initial_charges(np.ones(len(atoms)))
    return atoms


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
@pytest.mark.parametrize("results", [True, False])
def test_no_label_but_its_own(tmp_path, suffix, results):
    atoms = with_labels(crystal())
    frame = make_frame(atoms, 3, 2.0, results=results)
    assert set(frame.info) == {*KEPT, "step", "time_fs"}
    assert set(frame.arrays) == {"numbers", "positions", "momenta", "tags", "initial_charges"} & set(atoms.arrays)
    run(atoms, config(steps=4, save_every=2, trajectory=str(tmp_path / f"md.{suffix}")))
    for found in ase.io.read(tmp_path / f"md.{suffix}", ":"):
        assert not [name for name, value in (*found.info.items(), *found.arrays.items()) if is_result(name, value, 32)]
    read = read_frames(tmp_path / f"md.{suffix}")
    assert {f.origins[:2] for f in read} == {("calculator energy", "calculator forces")}
    assert not any(f.reading.rivals or f.reading.unread or f.reading.units for f in read)


def test_what_a_potential_is_told_stays_and_labels_of_that_do_not(tmp_path):
    """Also under names that end as those of labels do."""
    told = [{"name": "formal_charges", "kind": "scalar", "default": 0.0}]
    small = {"hidden_irreps": "4x0e+4x1o", "lmax_attr": 1, "radial_hidden": (4,), "core_repulsion": False}
    atoms = molecule("H2O")
    atoms.info |= {**LABELS, **KEPT}
    atoms.arrays |= {"formal_charges": np.array([-0.8, 0.4, 0.4]), "REF_magnetic_forces": np.ones(3)}
    atoms.info |= {"polarizability": np.eye(3), "dft_polarization": np.ones(3), "temperature_K": 7.0}
    potential = Potential(model_config(cues=told, **small), [1, 8]).double()
    atoms.calc = SEGNNCalculator(potential, domain="ignore")
    frame = make_frame(atoms, 3, 2.0, temperature=300.0)
    assert set(frame.info) == {*KEPT, "step", "time_fs", "temperature_K"} and frame.info["temperature_K"] == 300.0
    assert set(frame.arrays) == {"numbers", "positions", "formal_charges"}
    assert "temperature_K" not in make_frame(atoms, 3, 2.0).info


def test_frames_of_a_run_that_are_labelled_anew(tmp_path):
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 1))
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
    options = {"ensemble": "langevin", "temperature": 600, "timestep": 4, "steps": 40, "save_every": 10}
    run(atoms, config(trajectory=str(tmp_path / "md.xyz"), **options))
    frames = ase.io.read(tmp_path / "md.xyz", ":")
    for frame in frames:
        frame.calc = EMT()
        frame.get_potential_energy(), frame.get_forces()
    ase.io.write(tmp_path / "new.xyz", frames)
    for frame, read in zip(frames, read_frames(tmp_path / "new.xyz"), strict=True):
        assert read.energy == pytest.approx(frame.get_potential_energy(), abs=1e-7)


BAD_WORDS = ["", " ", "Si a", "a\tb", "a\nb", "\r", "a\u00a0b", "a\u2028b"]
TEXTS = [
    *(
        "PBE\n8x8x8 k-points",
        "a\r\nb",
        "",
        " ",
        "\n",
        'say "hi"',
        "it's",
        "{a: 1}",
        "[1, 2",
        "a=b",
        "a = b",
        "T",
        "1 2",
    ),
    *(
        "C:\\new\\run",
        "ends with \\",
        "_JSON nothing",
        "\u2028",
        "é ü",
        "x" * 5000,
        "Lattice=3",
        "tab\there",
        "\x85",
        "1e999",
    ),
]
VALUES = [
    *(
        None,
        True,
        3,
        np.float32(1.5),
        np.arange(3),
        np.ones((2, 2)),
        np.array("a b"),
        np.array(["a b", "c"]),
        [1, [2, 3]],
    ),
    *(
        {"a": 'x "y"'},
        {"a": {1, 2}},
        object(),
        lambda: 0,
        1 + 2j,
        np.array([1j]),
        float("nan"),
        b"bytes",
        {"a": "x\ny"},
    ),
    *([], np.zeros(0), np.zeros((0, 3)), {1: 2}, "a\x00b", 10**30, [None], np.array([object()]), {"": "\\"}),
]


def survives(atoms: Atoms) -> Atoms:
    """The second of three such frames, read back."""
    text = b"".join(extxyz(atoms) for _ in range(3)).decode()
    images = ase.io.read(io.StringIO(text), ":", format="extxyz")
    assert len(images) == 3
    for found in images:
        assert np.array_equal(found.numbers, atoms.numbers) and np.allclose(found.positions, atoms.positions, atol=1e-7)
        assert np.allclose(found.cell, atoms.cell) and np.array_equal(found.pbc, atoms.pbc)
        assert found.info["after"] == 7
    return images[1]


@pytest.mark.parametrize("value", [*TEXTS, *VALUES], ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize(
    "build", [lambda: molecule("H2O"), lambda: bulk("Si", cubic=True)], ids=["molecule", "crystal"]
)
def test_entries_come_back_or_are_left_out(value, build):
    atoms = build()
    atoms.info |= {"before": "a b", "bad": value, "after": 7}
    found = survives(atoms)
    assert found.info["before"] == "a b"
    assert ("bad" in found.info) != ("bad" in writable(atoms)[1])
    if isinstance(value, str) and "bad" in found.info and isinstance(found.info["bad"], str):
        assert found.info["bad"].split() == value.split()


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a=b", "a\nb", 'a"b', "Lattice", "lattice", "pbc", "Properties", 5, "é", "a:b"]
)
def test_names_of_entries(name):
    atoms = molecule("H2O")
    atoms.info |= {name: "x y", "after": 7}
    found = survives(atoms)
    assert (name in found.info) != (str(name) in writable(atoms)[1])


@pytest.mark.parametrize("word", BAD_WORDS, ids=ascii)
@pytest.mark.parametrize("dtype", [str, object, "S"])
def test_words_of_atoms(word, dtype):
    atoms = molecule("H2O")
    words = [word, "O", word]
    atoms.arrays["residuenames"] = np.array([w.encode() for w in words] if dtype == "S" else words, dtype=dtype)
    atoms.arrays["after_it"] = np.arange(3)
    atoms.info["after"] = 7
    found = survives(atoms)
    assert found.arrays["residuenames"].tolist() == ["_".join(w.split()) or "_" for w in words]
    assert found.arrays["after_it"].tolist() == [0, 1, 2]


ODD = {
    "three axes": np.zeros((3, 3, 3)),
    "no columns": np.zeros((3, 0)),
    "complex": np.ones(3, complex),
    "dates": np.zeros(3, "M8[s]"),
}
EVEN = {
    "unsigned": np.arange(3, dtype=np.uint8),
    "half": np.ones(3, np.float16),
    "words in columns": np.array([["a b", ""]] * 3),
    "NaN": np.full((3, 2), np.nan),
    "switches": np.array([True, False, True]),
    "one column": np.ones((3, 1)),
}


@pytest.mark.parametrize("kind", [*ODD, *EVEN])
def test_columns_come_back_or_are_left_out(kind):
    atoms = molecule("H2O")
    atoms.arrays["column"] = {**ODD, **EVEN}[kind]
    atoms.info["after"] = 7
    assert ("column" in survives(atoms).arrays) == (kind in EVEN)
    assert writable(atoms)[1] == ([] if kind in EVEN else ["column"])


@pytest.mark.parametrize("name", ["a b", "a:b", "a=b", 'a"b', "a\nb", "", "pos", "species", "Z", "numbers ", "a_b"])
def test_names_of_columns(name):
    atoms = molecule("H2O")
    atoms.arrays[name], atoms.info["after"] = np.arange(3), 7
    found, left = survives(atoms), writable(atoms)[1]
    assert len(set(found.arrays) - {"numbers", "positions"}) == 1 - len(left)


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
def test_a_run_of_such_a_structure_says_once_what_is_left_out(tmp_path, capsys, suffix):
    atoms, file = crystal(), str(tmp_path / f"md.{suffix}")
    atoms.set_array("residuenames", np.array([""] * 32))
    atoms.info |= {"comment": "PBE\n8x8x8", "calculation": object(), "nested": {"a": {1, 2}}, (1, 2): 3}
    run_md(atoms, config(steps=4, save_every=1, trajectory=file))
    assert capsys.readouterr().err.count("is without calculation, nested, (1, 2): its format cannot hold") == 1
    frames = ase.io.read(file, ":")
    assert len(frames) == 5 and frames[0].info["comment"].split() == ["PBE", "8x8x8"]


def test_slabs_of_ase_are_written_quietly():
    atoms = fcc100("Cu", (3, 3, 2), vacuum=5.0)
    atoms.info["after"] = 7
    survives(atoms)
