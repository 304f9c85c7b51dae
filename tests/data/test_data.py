"""Reading frames: labels wherever they are, refusals, splits, reference energies."""

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import (
    Frame,
    LabelKeys,
    check_labels,
    check_species,
    frame_from_atoms,
    is_isolated_atom,
    label_table,
    read_frames,
    species_of,
    split_frames,
)
from segnn_ase.data.references import energy_scale, reference_energies

WATER = [1, 8]


def moved_labels(atoms: Atoms, energy: str, forces: str, stress: str | None = None) -> Atoms:
    """The labels as plain entries of info and arrays, under these names."""
    bare = atoms.copy()
    bare.info[energy] = atoms.calc.results["energy"]
    bare.arrays[forces] = atoms.calc.results["forces"]
    if stress:
        bare.info[stress] = atoms.calc.results["stress"]
    return bare


def same_labels(frame: Frame, atoms: Atoms) -> bool:
    results = atoms.calc.results
    same = np.isclose(frame.energy, results["energy"], atol=1e-7) and np.allclose(
        frame.forces, results["forces"], atol=1e-7
    )
    if "stress" in results:
        same = same and np.allclose(full_3x3_to_voigt_6_stress(frame.stress), results["stress"], atol=1e-7)
    return bool(same)


def frame(atoms: Atoms, energy=None, forces=None, stress=None) -> Frame:
    return Frame(atoms, energy, forces, stress, "a test", (None, None, None))


@pytest.mark.parametrize("suffix", ["xyz", "traj", "db", "json"])
@pytest.mark.parametrize("build", [lambda: molecule("H2O"), copper], ids=["molecule", "crystal"])
def test_labels_of_a_calculator_survive_every_format(tmp_path, suffix, build):
    images = emt_atoms(3, build)
    file = tmp_path / f"frames.{suffix}"
    ase.io.write(file, images)
    frames = read_frames(file)
    assert len(frames) == 3
    for found, atoms in zip(frames, images, strict=True):
        assert same_labels(found, atoms)
        assert np.allclose(found.atoms.positions, atoms.positions, atol=1e-7)
        assert found.atoms.calc is None and not found.atoms.info
        assert (found.stress is None) == (not atoms.pbc.all())


@pytest.mark.parametrize(
    "energy, forces",
    [("REF_energy", "REF_forces"), ("dft_energy", "dft_forces"), ("energy", "forces"), ("Energy", "force")],
)
def test_labels_under_the_usual_names(tmp_path, energy, forces):
    atoms = emt_atoms(1)[0]
    assert same_labels(frame_from_atoms(moved_labels(atoms, energy, forces)), atoms)
    ase.io.write(tmp_path / "a.xyz", moved_labels(atoms, energy, forces))
    assert same_labels(read_frames(tmp_path / "a.xyz")[0], atoms)


def test_keys_given_by_the_user_come_before_everything_else(tmp_path):
    atoms = emt_atoms(1, copper)[0]
    other = moved_labels(atoms, "my_energy", "my_forces", "my_stress")
    other.calc = SinglePointCalculator(other, energy=1.0, forces=np.ones((4, 3)), stress=np.ones(6))
    ase.io.write(tmp_path / "a.xyz", other)
    found = read_frames(tmp_path / "a.xyz", LabelKeys(energy="my_energy", forces="my_forces", stress="my_stress"))[0]
    assert same_labels(found, atoms)
    assert found.origins == ("my_energy", "my_forces", "my_stress")
    assert read_frames(tmp_path / "a.xyz")[0].energy == 1.0


def test_labels_among_the_key_value_pairs_and_data_of_a_database(tmp_path):
    images = emt_atoms(3)
    with ase.db.connect(tmp_path / "a.db") as database:
        for atoms in images:
            results = atoms.calc.results
            database.write(atoms.copy(), my_energy=results["energy"], data={"my_forces": results["forces"]})
    frames = read_frames(tmp_path / "a.db@1:", LabelKeys(energy="my_energy", forces="my_forces"))
    assert len(frames) == 2 and all(map(same_labels, frames, images[1:]))


def test_an_energy_as_an_array_of_one_number():
    atoms = molecule("H2O")
    atoms.info["energy"] = np.array([-14.0])
    assert frame_from_atoms(atoms).energy == -14.0


def test_free_energy_is_taken_where_there_is_no_energy():
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, free_energy=-3.0)
    assert frame_from_atoms(atoms).energy == -3.0


@pytest.mark.parametrize("shape", [(6,), (9,), (3, 3)])
def test_stress_in_every_shape(shape):
    atoms = emt_atoms(1, copper)[0]
    full = frame_from_atoms(atoms).stress
    bare = atoms.copy()
    bare.info["stress"] = atoms.calc.results["stress"] if shape == (6,) else full.reshape(shape)
    assert np.allclose(frame_from_atoms(bare).stress, full, atol=1e-12)
    assert np.allclose(full, full.T)


@pytest.mark.parametrize("shape", [(9,), (3, 3)])
def test_a_virial_is_minus_volume_times_stress(tmp_path, shape):
    atoms = emt_atoms(1, copper)[0]
    full = frame_from_atoms(atoms).stress
    bare = atoms.copy()
    bare.info["virial"] = -(full * atoms.get_volume()).reshape(shape)
    assert np.allclose(frame_from_atoms(bare).stress, full, atol=1e-12)
    ase.io.write(tmp_path / "a.xyz", bare)
    assert np.allclose(read_frames(tmp_path / "a.xyz")[0].stress, full, atol=1e-7)


def test_stress_of_what_is_not_a_crystal_is_left_out():
    atoms = emt_atoms(1, copper)[0]
    atoms.pbc = (True, True, False)
    found = frame_from_atoms(atoms)
    assert found.stress is None and found.origins[2] is None


def test_labels_may_be_missing_frame_by_frame(tmp_path):
    images = emt_atoms(3)
    del images[0].calc.results["energy"]
    del images[1].calc.results["forces"]
    images[2].calc = None
    ase.io.write(tmp_path / "a.traj", images)
    frames = read_frames(tmp_path / "a.traj")
    assert [f.energy is None for f in frames] == [True, False, True]
    assert [f.forces is None for f in frames] == [False, True, True]
    check_labels(frames)


def test_several_files_and_an_index(tmp_path):
    ase.io.write(tmp_path / "a.xyz", emt_atoms(12))
    ase.io.write(tmp_path / "b.db", emt_atoms(3, copper))
    a, b = str(tmp_path / "a.xyz"), str(tmp_path / "b.db")
    assert len(read_frames([f"{a}@:10", b])) == 13
    assert len(read_frames(f"{a}@-1")) == 1
    assert len(read_frames(f"{b}@:2")) == 2
    assert [f.energy for f in read_frames(f"{a}@10:")] == [f.energy for f in read_frames(a)][10:]
    assert "a.xyz@10:, frame 1" in read_frames(f"{a}@10:")[1].source


def test_an_at_sign_in_a_path_is_no_index(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    ase.io.write(folder / "a.xyz", emt_atoms(3))
    (folder / "b@300K.xyz").write_text((folder / "a.xyz").read_text())
    assert len(read_frames(folder / "a.xyz")) == 3
    assert len(read_frames(f"{folder}/a.xyz@:2")) == 2
    assert len(read_frames(folder / "b@300K.xyz")) == 3
    assert len(read_frames(f"{folder}/b@300K.xyz@1")) == 1


def test_the_table_shows_what_was_found_where():
    images = emt_atoms(4, copper) + emt_atoms(2)
    images.append(moved_labels(images.pop(), "REF_energy", "REF_forces"))
    del images[0].calc.results["stress"]
    text = label_table([frame_from_atoms(atoms) for atoms in images])
    energy, forces, stress, sizes = text.splitlines()[1:]
    assert energy.split()[:2] == ["energy", "6/6"] and energy.endswith("REF_energy, calculator energy")
    assert forces.split()[:2] == ["forces", "6/6"] and forces.endswith("REF_forces, calculator forces")
    assert stress.split()[:2] == ["stress", "3/6"] and stress.endswith("calculator stress")
    assert sizes == "atoms per frame 3 to 4; elements {'Cu': 16, 'H': 4, 'O': 2}"
    assert "energy       0/1" in label_table([frame_from_atoms(molecule("H2O"))])


@pytest.mark.parametrize("name", ["energy", "forces", "stress"])
def test_a_key_that_no_frame_has_is_an_error_that_tells_what_there_is(tmp_path, name):
    ase.io.write(tmp_path / "a.traj", emt_atoms(2))
    with pytest.raises(DataError, match=f"key for {name} is 'mine', but no frame has it; .*, calculator forces"):
        read_frames(tmp_path / "a.traj", LabelKeys(**{name: "mine"}))


def test_energies_and_forces_of_different_lengths():
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    atoms.calc.results["forces"] = np.zeros((2, 3))
    with pytest.raises(DataError, match=r"forces of a.xyz, frame 3 .* has shape \(2, 3\); expected \(3, 3\)"):
        frame_from_atoms(atoms, source="a.xyz, frame 3")
    atoms.calc = SinglePointCalculator(atoms)
    atoms.calc.results["energy"] = np.zeros(3)
    with pytest.raises(DataError, match=r"energy of .* has shape \(3,\); expected"):
        frame_from_atoms(atoms)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("energy", np.nan, "NaN or infinite"),
        ("energy", np.inf, "NaN or infinite"),
        ("energy", "low", "expected numbers"),
        ("stress", np.full(6, np.nan), "NaN or infinite"),
        ("stress", np.ones(5), "has shape"),
        ("stress", "high", "expected numbers"),
        ("virial", "high", "expected numbers"),
        ("virial", np.ones(5), "has shape"),
    ],
)
def test_useless_labels_are_named(name, value, message):
    atoms = copper()
    atoms.info[name] = value
    with pytest.raises(DataError, match=f"(?s)of a.xyz, frame 3 .from {name}.*{message}"):
        frame_from_atoms(atoms, source="a.xyz, frame 3")


def test_nan_forces_are_named():
    atoms = molecule("H2O")
    atoms.arrays["forces"] = np.full((3, 3), np.nan)
    with pytest.raises(DataError, match=r"forces of a.xyz, frame 3 .from forces. has NaN"):
        frame_from_atoms(atoms, source="a.xyz, frame 3")


def test_a_virial_without_a_volume_is_a_typed_error():
    atoms = Atoms("Cu", pbc=True)
    atoms.info["virial"] = np.eye(3)
    with pytest.raises(DataError, match=r"virial of .* volume"):
        frame_from_atoms(atoms)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data file is .*no\.xyz'"):
        read_frames(tmp_path / "no.xyz")
    with pytest.raises(FileNotFoundError, match=r"data file is .*no\.xyz"):
        read_frames(f"{tmp_path / 'no.xyz'}@:10")
    for name, content in {"text.xyz": "no frames here", "zero.xyz": "", "a.db": "no database", "a.walrus": "x"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"data file .*{name}' (cannot be read by ASE|has no frames)"):
            read_frames(tmp_path / name)
    ase.io.write(tmp_path / "a.xyz", emt_atoms(3))
    for index in ("20:", "nonsense"):
        with pytest.raises(DataError, match=r"data file .*a\.xyz"):
            read_frames(f"{tmp_path / 'a.xyz'}@{index}")


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="no frames to train on"):
        check_labels([])
    with pytest.raises(DataError, match=r"no frame has an energy or forces.*REF_energy.*name yours with energy_key"):
        check_labels([frame(molecule("H2O"), stress=np.eye(3))])
    zero = frame(molecule("H2O"), 0.0, np.zeros((3, 3)))
    with pytest.raises(DataError, match=r"energy is zero in every frame \(2 frames\)"):
        check_labels([zero, zero])
    with pytest.raises(DataError, match="forces is zero in every frame"):
        check_labels([zero._replace(energy=-1.0), zero, frame(Atoms("H"), -1.0, np.ones((1, 3)))])
    check_labels([zero._replace(energy=-1.0, forces=np.ones((3, 3))), zero])


def at_volumes(symbol: str, zero: bool = True) -> list[Frame]:
    """Crystals without forces, by symmetry, or with the strain alone left of what moved."""
    frames = []
    for n, a in enumerate((3.4, 3.5, 3.6, 3.7)):
        atoms = bulk(symbol, "fcc", a=a, cubic=True)
        atoms.positions += 0.3 * n
        atoms.positions[0] += 0.0 if zero else 0.05 * n
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0 + 0.1 * n, forces=np.zeros((4, 3)), stress=np.ones(6))
        frames.append(frame_from_atoms(atoms))
    return frames


def test_forces_that_vanish_by_symmetry_are_no_lost_ones():
    """Of crystals that differ in their cells alone, shifted or not."""
    check_labels([*at_volumes("Cu"), *at_volumes("Al")])
    for frames in (at_volumes("Cu", zero=False), at_volumes("Cu")[:1]):
        with pytest.raises(DataError, match="forces is zero in every frame"):
            check_labels([*frames, *at_volumes("Cu", zero=False)])
    molecules = [molecule("H2O") for _ in range(2)]
    for atoms in molecules:
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=np.zeros((3, 3)))
    with pytest.raises(DataError, match="forces is zero in every frame"):
        check_labels([frame_from_atoms(atoms) for atoms in molecules])


def test_a_stress_of_zero_beside_forces_is_none():
    frames = emt_atoms(3, copper)
    for n, atoms in enumerate(frames):
        atoms.calc.results["stress"] = np.full(6, float(n == 0))
    read = [frame_from_atoms(atoms) for atoms in frames]
    assert [frame.stress is None for frame in read] == [False, True, True]
    assert [frame.origins[2] for frame in read] == ["calculator stress", None, None]
    assert "stress: exactly zero in 2 frames whose forces are not: taken for unknown" in label_table(read)
    frames[0].calc.results |= {"stress": np.zeros(6), "forces": np.zeros_like(frames[0].positions)}
    assert frame_from_atoms(frames[0]).stress is not None  # a crystal at rest


def test_an_element_that_the_training_set_lacks_is_named():
    with pytest.raises(DataError, match=r"validation set has C \(a test\); the potential knows H, O"):
        check_species([frame(molecule("H2O")), frame(molecule("CH4"))], WATER, "validation")


def test_splits_are_seeded_and_disjoint():
    frames = [frame(molecule("H2O"), float(n)) for n in range(1, 21)] + [frame(Atoms("H"), -1.0)]
    train, valid = split_frames(frames, 0.2, seed=3)
    again = split_frames(frames, 0.2, seed=3)
    energies = sorted(f.energy for f in [*train, *valid])
    assert energies == sorted(f.energy for f in frames)
    assert len(valid) == 4 and [f.energy for f in valid] == [f.energy for f in again[1]]
    assert [f.energy for f in valid] != [f.energy for f in split_frames(frames, 0.2, seed=4)[1]]
    assert frames[-1] in train  # isolated atoms give E0


def test_splits_of_few_frames():
    frames = [frame(molecule("H2O"), float(n)) for n in range(1, 4)]
    assert [len(part) for part in split_frames(frames, 0.1, seed=0)] == [2, 1]
    assert [len(part) for part in split_frames(frames, 0.0, seed=0)] == [3, 0]
    assert [len(part) for part in split_frames(frames, 0.99, seed=0)] == [1, 2]
    assert [len(part) for part in split_frames(frames[:1], 0.5, seed=0)] == [1, 0]


def test_crystals_of_one_atom_are_split_like_any_frame():
    frames = [frame(bulk("Cu", a=a), a) for a in np.linspace(3.4, 3.8, 10)]
    assert [len(part) for part in split_frames(frames, 0.2, seed=0)] == [8, 2]


def test_frames_without_labels_are_no_use_for_validation():
    frames = [frame(molecule("H2O"), energy) for energy in (None, None, -1.0, -2.0, None, None)]
    train, valid = split_frames(frames, 0.9, seed=0)
    assert len(train) == 5 and valid[0].energy is not None


def test_isolated_atoms():
    assert is_isolated_atom(frame(Atoms("H")))
    assert is_isolated_atom(frame(Atoms("H", cell=[10, 11, 12], pbc=True)))
    assert not is_isolated_atom(frame(bulk("Cu")))
    assert not is_isolated_atom(frame(molecule("H2")))


def test_reference_energies_from_isolated_atoms():
    frames = [frame(Atoms("H"), -13.6), frame(Atoms("O"), -430.0), frame(molecule("H2O"), -470.0)]
    found = reference_energies(frames, WATER)
    assert found.values == {1: -13.6, 8: -430.0}
    assert found.report() == "E0 from isolated atoms: H -13.6000, O -430.0000 eV"


def test_reference_energies_from_isolated_atoms_in_a_file_of_their_own():
    frames = [frame(molecule("H2O"), -470.0), frame(Atoms("H"), -13.6)]
    isolated = [frame(Atoms("H"), -13.6), frame(Atoms("O"), -430.0), frame(Atoms("C"), -1000.0)]
    assert reference_energies(frames, WATER, isolated=isolated).values == {1: -13.6, 8: -430.0}
    with pytest.raises(DataError, match="isolated atoms lack an energy of O; add one frame of one atom"):
        reference_energies(frames, WATER, isolated=isolated[:1])


def test_reference_energies_from_a_table():
    frames = [frame(molecule("H2O"), -470.0)]
    assert reference_energies(frames, WATER, table={1: -13.0, 8: -431.0, 29: 3.0}).values == {1: -13.0, 8: -431.0}
    with pytest.raises(DataError, match="reference energies lack O"):
        reference_energies(frames, WATER, table={1: -13.0})


def test_reference_energies_by_least_squares_find_what_the_compositions_determine():
    exact = {1: -13.6, 6: -1030.0, 8: -2040.0}
    molecules = [molecule(name) for name in ("H2O", "CO2", "CH4", "CH3OH", "H2", "O2")]
    frames = [frame(m, sum(exact[z] for z in m.numbers.tolist())) for m in molecules]
    found = reference_energies(frames, [1, 6, 8])
    assert found.method == "least squares" and found.rank == 3 and found.residual < 1e-3
    assert found.values == pytest.approx(exact, abs=1e-2)
    assert "rank 3 of 3, residual 0" in found.report()


def test_reference_energies_of_one_composition_are_common_and_the_rank_is_told():
    frames = [frame(molecule("H2O"), e) for e in (-30.0, -30.6)]
    found = reference_energies(frames, WATER)
    assert found.rank == 1 and found.values == pytest.approx({1: -10.1, 8: -10.1}, abs=1e-6)
    assert found.residual == pytest.approx(0.1, abs=1e-6)  # +-0.3 eV over three atoms
    assert "rank 1 of 2" in found.report() and "do not determine every E0" in found.report()


def test_reference_energies_without_any_energy_are_zero_and_say_so():
    found = reference_energies([frame(molecule("H2O"), forces=np.ones((3, 3)))], WATER)
    assert found.values == {1: 0.0, 8: 0.0} and "no frame has an energy" in found.report()


def test_energy_scale_is_the_rms_force():
    forces = np.full((3, 3), 2.0)
    references = {1: -13.6, 6: -1030.0, 8: -2040.0}
    atoms = frame(Atoms("H"), -1.0, np.zeros((1, 3)))
    assert energy_scale([frame(molecule("H2O"), -3.0, forces), atoms], references) == 2.0
    assert energy_scale([frame(molecule("H2O"))], references) == 1.0


def test_energy_scale_without_forces_is_what_the_reference_energies_leave():
    references = {1: -13.6, 6: -1030.0, 8: -2040.0}
    frames = [
        frame(molecule("H2O"), 2 * -13.6 - 2040.0 - 3.0),
        frame(molecule("CO"), -1030.0 - 2040.0 - 6.0),
    ]
    assert energy_scale(frames, references) == pytest.approx(1.0)


def test_reading_does_not_change_the_atoms():
    atoms = moved_labels(emt_atoms(1)[0], "REF_energy", "REF_forces")
    before = atoms.copy()
    frame_from_atoms(atoms).atoms.positions += 1.0
    assert atoms == before and atoms.info.keys() == before.info.keys() and atoms.arrays.keys() == before.arrays.keys()


def test_species_are_sorted():
    assert species_of([frame(molecule("H2O")), frame(copper())]) == [1, 8, 29]
