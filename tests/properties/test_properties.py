"""Properties of structures and atoms: how they turn, what is found in files, what is learned, what files keep."""

import json
import math
import runpy
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import segnn
from helpers.systems import rotation

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationWarning, ConfigError, DataError, ModelFileError, StructureError
from segnn_ase.compiled import guard
from segnn_ase.model.settings import model_config
from segnn_ase.properties import PropertyCalculator, PropertyModel, PropertyTraining, load_properties, train_properties
from segnn_ase.properties.files import save_properties
from segnn_ase.properties.goal import layers_for
from segnn_ase.properties.labels import (
    Label,
    Labelled,
    adds_up_to_nothing,
    label_of,
    read_labelled,
    table_of,
    targets_of,
    usual_pooling,
)
from segnn_ase.properties.learning import item_of, split
from segnn_ase.properties.targets import Target, irreps_of, matrices_of
from segnn_ase.store.model_file import SINCE
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.structure.graph import graph_from_atoms

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DIPOLE = Target("dipole", "structure", (3,), "1x1o", "sum")
TENSOR = Target("polarizability", "structure", (3, 3), "1x0e+1x2e", "sum")
SHIELDING = Target("shielding", "atom", (3, 3), "1x0e+1x1e+1x2e", "free")
GAP = Target("gap", "structure", (), "1x0e", "mean")
CHARGES = Target("charges", "atom", (), "1x0e", "free")
MOMENT = Target("moment", "structure", (3,), "1x1e", "sum")
ALL = [DIPOLE, TENSOR, SHIELDING, GAP, CHARGES, MOMENT]


def run(*arguments, check=True):
    result = segnn(*arguments)
    assert not check or result.exit_code == 0, result.output
    return result


def made(targets=ALL, preset="fast", **changes):
    small = {"hidden_irreps": "8x0e+8x1o+8x1e+8x2e", "lmax_attr": 2}
    model = PropertyModel(model_config(preset, **small, **changes), [1, 6, 8], targets, seed=3).double()
    model.calibrate(graph_from_atoms(molecule("CH3CHO"), model.cutoff))
    return model.eval()


def turned(value, matrix, axial=False):
    """A vector, or a matrix, of which may be many, turned and mirrored."""
    sign = np.linalg.det(matrix) if axial else 1.0
    if value.shape[-2:] == (3, 3):
        return matrix @ value @ matrix.T
    return sign * value @ matrix.T if value.shape[-1:] == (3,) else value


@pytest.mark.parametrize("preset", ["segnn", "tfn", "segnn2022"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_properties_turn_as_they_are_said_to(preset, mirrored):
    atoms, model = molecule("CH3CH2OH"), made(preset=preset)
    matrix = rotation(5) * (-1 if mirrored else 1)
    before = model.predict(atoms)
    atoms.positions = atoms.positions @ matrix.T + [1.0, -2.0, 3.0]
    after = model.predict(atoms)
    for name, value in before.items():
        assert np.abs(value).max() > 1e-3, name
        right = value if name in ("charges", "gap") else turned(value, matrix, axial=name == "moment")
        np.testing.assert_allclose(after[name], right, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(before["polarizability"], before["polarizability"].T, atol=1e-12)
    assert np.abs(before["shielding"] - before["shielding"].swapaxes(1, 2)).max() > 1e-3


def test_atoms_have_no_order_and_structures_do_not_meet():
    model, atoms = made(), molecule("CH3CH2OH")
    order = np.random.default_rng(0).permutation(len(atoms))
    alone, other = model.predict(atoms), model.predict(atoms[order])
    for name, value in alone.items():
        expected = value[order] if name in ("charges", "shielding") else value
        np.testing.assert_allclose(other[name], expected, atol=1e-10, err_msg=name)
    together = model.predict_all([molecule("H2O"), atoms])[1]
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, atol=1e-10, err_msg=name)


def test_sums_grow_with_a_structure_and_means_do_not():
    model, atoms = made(), molecule("CH3CHO")
    far = atoms.copy()
    far.translate([50.0, 0, 0])
    one, two = model.predict(atoms), model.predict(atoms + far)
    np.testing.assert_allclose(two["dipole"], 2 * one["dipole"], atol=1e-10)
    np.testing.assert_allclose(two["gap"], one["gap"], atol=1e-10)
    crystal = PropertyModel(model_config("fast"), [14], [GAP, TENSOR]).double()
    small, large = (crystal.predict(bulk("Si") * (n, n, n)) for n in (1, 2))
    np.testing.assert_allclose(large["gap"], small["gap"], atol=1e-10)
    np.testing.assert_allclose(large["polarizability"], 8 * small["polarizability"], atol=1e-9)


def test_a_lone_atom_has_no_direction():
    found = made().predict(Atoms("O"))
    assert not found["dipole"].any()
    np.testing.assert_allclose(found["polarizability"], found["polarizability"][0, 0] * np.eye(3), atol=1e-12)


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_components_and_labels_are_each_other_s_inverse(target):
    values = torch.randn(5, *target.shape, dtype=torch.float64)
    if target is TENSOR:
        values = values + values.mT
    components = target.components(values)
    assert components.shape == (5, target.dim)
    torch.testing.assert_close(target.labels(components), values)
    torch.testing.assert_close(components.square().sum(), values.square().sum())  # orthonormal


def test_matrices_of_a_degree_are_what_they_are_called():
    assert torch.allclose(matrices_of(0).reshape(3, 3) / matrices_of(0)[0], torch.eye(3).double())
    for l, sign in ((1, -1), (2, 1)):
        for matrix in matrices_of(l).T.reshape(-1, 3, 3):
            torch.testing.assert_close(matrix, sign * matrix.T)
            assert abs(float(matrix.trace())) < 1e-12


@pytest.mark.parametrize(
    "name, shape, given, expected",
    [
        ("dipole", (3,), None, "1x1o"),
        ("magmom", (3,), None, "1x1e"),
        ("gap", (), None, "1x0e"),
        ("x", (3, 3), None, "1x0e+1x1e+1x2e"),
        ("x", (3, 3), "2e+0x1o", "1x2e"),
        ("x", (5,), "2e", "1x2e"),
        ("x", (8,), "2x1o+2x0e", "2x1o+2x0e"),
        ("x", (3,), "3x0e", "3x0e"),
    ],
)
def test_how_a_property_turns(name, shape, given, expected):
    assert irreps_of(name, "structure", shape, False, given) == expected


@pytest.mark.parametrize(
    "shape, given, reason",
    [
        ((5,), None, "5 numbers a structure.*give irreps.x"),
        ((5,), "1x1o", "of 3 components; labels have 5"),
        ((3,), "0x1o", "expected some"),
        ((3,), "", "expected some|e3nn notation"),
        ((3,), "vector", "e3nn notation"),
    ],
)
def test_irreps_that_do_not_fit_are_refused(shape, given, reason):
    with pytest.raises(ConfigError, match=reason):
        irreps_of("x", "structure", shape, False, given)


def test_what_a_network_cannot_give_is_refused():
    with pytest.raises(ConfigError, match=r"target 'dipole' turns as 1x1o.*out of reach.*add 8x1o"):
        PropertyModel(model_config("egnn"), [1], [DIPOLE])
    with pytest.raises(ConfigError, match="0o is out of reach"):
        PropertyModel(model_config("segnn"), [1], [Target("chirality", "structure", (), "1x0o", "sum")])
    handed = {"hidden_irreps": "8x0e+8x0o+8x1o+8x1e"}
    hand = PropertyModel(model_config("segnn", **handed), [1, 6, 9], [Target("x", "structure", (), "1x0o", "sum")])
    chiral = Atoms("CHFH2", [(0, 0, 0), (0, 0, 1.0), (1.2, 0, -0.4), (-0.6, 1.0, -0.3), (-0.6, -0.9, -0.5)])
    mirror = chiral.copy()
    mirror.positions *= [1, 1, -1]
    one, other = (float(hand.double().predict(atoms)["x"]) for atoms in (chiral, mirror))
    assert abs(one) > 1e-6 and other == pytest.approx(-one, abs=1e-12)


def test_labels_are_found_where_they_are():
    atoms = molecule("H2O")
    assert label_of(atoms, "dipole", "here") is None
    atoms.calc = SinglePointCalculator(atoms, dipole=np.array([0.0, 0.0, 2.0]), charges=np.array([-1.0, 0.5, 0.5]))
    found = label_of(atoms, "dipole", "here")  # three numbers, and three atoms
    assert (found.per, found.origin, found.value.tolist()) == ("structure", "calculator dipole", [[0.0, 0.0, 2.0]])
    assert label_of(atoms, "charges", "here").per == "atom"
    atoms.info["dft_dipole"] = [0.0, 0.0, 1.0]  # what a calculation gave, whatever the calculator's are
    found = label_of(atoms, "dipole", "here")
    assert (found.origin, found.rival) == ("info dft_dipole", "calculator dipole")
    atoms.info["dft_dipole"] = [0.0, 0.0, 2.0]
    assert not label_of(atoms, "dipole", "here").rival
    atoms.info["charges"] = atoms.calc.results.pop("charges")
    assert label_of(atoms, "charges", "here").value.shape == (3,)
    atoms.arrays["born"] = np.arange(27.0).reshape(3, 9)
    assert label_of(atoms, "born", "here").value.shape == (3, 3, 3)
    atoms.arrays["born"][1, 4] = math.nan
    assert np.isnan(label_of(atoms, "born", "here").value).all(axis=(1, 2)).tolist() == [False, True, False]
    atoms.info["gap"] = math.nan
    assert label_of(atoms, "gap", "here") is None


def test_six_numbers_are_a_matrix_unless_it_is_said_otherwise():
    atoms = molecule("H2O")
    atoms.info["polarizability"] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    found = label_of(atoms, "polarizability", "here", "0e+2e")
    assert found.value.tolist() == [[[1, 6, 5], [6, 2, 4], [5, 4, 3]]] and "Voigt" in found.origin
    assert label_of(atoms, "polarizability", "here").value.shape == (1, 3, 3)
    assert label_of(atoms, "polarizability", "here", "6x0e").value.shape == (1, 6)
    atoms.info["levels"] = np.arange(9.0)
    assert label_of(atoms, "levels", "here", "9x0e").value.shape == (1, 9)
    assert label_of(atoms, "levels", "here", "4e").value.shape == (1, 9)


@pytest.mark.parametrize(
    "value, reason",
    [
        ("large", "expected real numbers"),
        (True, "expected real numbers"),
        ([[1.0], [1.0, 2.0]], "expected real numbers"),
        (1j, "expected real numbers"),
        (math.inf, "infinite"),
        ([], "expected numbers for each of 1 structures"),
    ],
)
def test_what_is_no_label_is_refused(value, reason):
    atoms = molecule("H2O")
    atoms.info["gap"] = value
    with pytest.raises(DataError, match=reason):
        label_of(atoms, "gap", "here")


def test_frames_must_agree_on_the_form_of_a_label():
    frames = []
    for value in (1.0, [1.0, 2.0, 3.0]):
        atoms = molecule("H2O")
        atoms.info["x"] = value
        frames.append(Labelled(atoms, {"x": label_of(atoms, "x", f"frame {value}")}, f"frame {value}"))
    with pytest.raises(DataError, match="as in the other frames"):
        targets_of(frames, ["x"], {}, {})


def test_whether_a_number_grows_is_found_in_the_compositions():
    def frames(of):
        found = []
        for name in ("CH4", "C2H6", "C3H8", "H2O", "CH3OH", "CH3CH2OH"):
            atoms = molecule(name)
            atoms.info["x"] = of(atoms)
            found.append(Labelled(atoms, {"x": label_of(atoms, "x", name)}, name))
        return found

    volume = {1: 5.0, 6: 20.0, 8: 15.0}
    total, mean = (lambda a: sum(volume[z] for z in a.numbers)), (lambda a: np.mean([volume[z] for z in a.numbers]))
    assert usual_pooling(frames(total), "x") == "sum" and usual_pooling(frames(mean), "x") == "mean"
    assert usual_pooling(frames(lambda a: mean(a) * np.eye(3)), "x") == "mean"  # a dielectric tensor
    assert usual_pooling(frames(lambda a: [0.0, 0.0, 1.0]), "x") == "sum"
    few = [frames(mean)[n] for n in (0, 3, 4)]  # as many as they have elements tell nothing
    (target,) = targets_of(few, ["x"], {}, {})
    assert target.pooling == "sum" and "do not tell whether it grows" in table_of(few, [target])


def test_charges_that_add_up_to_nothing_always_do():
    frames = []
    for name, charges in (("H2O", [-0.6, 0.3, 0.3]), ("CO2", [0.4, -0.2, -0.2])):
        atoms = molecule(name)
        atoms.arrays["charges"] = np.array(charges)
        frames.append(Labelled(atoms, {"charges": label_of(atoms, "charges", name)}, name))
    (target,) = targets_of(frames, ["charges"], {}, {})
    assert target.pooling == "zero"
    found = made([target]).predict(molecule("CH3CHO"))["charges"]
    assert np.abs(found).max() > 1e-3 and abs(found.sum()) < 1e-12
    assert targets_of(frames, ["charges"], {}, {"charges": "free"})[0].pooling == "free"
    frames[0].labels["charges"].value[0] = 0.4
    assert targets_of(frames, ["charges"], {}, {})[0].pooling == "free"
    with pytest.raises(ConfigError, match="of atoms expected free or zero"):
        targets_of(frames, ["charges"], {}, {"charges": "mean"})


def test_an_ion_among_many_molecules_is_no_rounding():
    values = np.tile([-0.834, 0.417, 0.417], 1000)
    assert adds_up_to_nothing(np.round(values + 2e-5, 5)) and not adds_up_to_nothing(np.append(values, 1.0))


def bond_dipole(atoms):
    """A vector that distances and elements decide: it falls off smoothly."""
    total = np.zeros(3)
    for i, j in np.ndindex(len(atoms), len(atoms)):
        apart = atoms.positions[j] - atoms.positions[i]
        total += (atoms.numbers[i] - atoms.numbers[j]) * apart * np.exp(-(apart @ apart)) / 10
    return total


def labelled(n, seed=0):
    rng, frames = np.random.default_rng(seed), []
    for k in range(n):
        atoms = molecule(("H2O", "CH3OH", "CH4", "H2CO")[k % 4])
        atoms.positions += 0.1 * rng.normal(size=atoms.positions.shape)
        atoms.rotate(rng.uniform(0, 360), rng.normal(size=3))
        apart = atoms.get_all_distances()
        atoms.info["dipole"] = bond_dipole(atoms)
        vectors = atoms.positions - atoms.positions.mean(axis=0)
        atoms.info["gyration"] = vectors.T @ vectors / len(atoms)
        atoms.arrays["crowd"] = np.exp(-apart).sum(axis=1)
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("properties")
    ase.io.write(folder / "train.xyz", labelled(80))
    ase.io.write(folder / "test.xyz", labelled(20, seed=1))
    return folder


def configured(files, out, **training):
    return PropertyTraining.parse(
        {
            "out": str(out),
            "data": {
                "train": str(files / "train.xyz"),
                "test": str(files / "test.xyz"),
                "target": ["dipole", "gyration", "crowd"],
            },
            "model": {"preset": "fast", "hidden_irreps": "16x0e+16x1o"},
            "training": {"epochs": 30, "learning_rate": 0.01, "device": "cpu", **training},
        }
    )


@pytest.fixture(scope="module")
def trained(files):
    errors = train_properties(configured(files, files / "model.pt"), progress=False)
    return files / "model.pt", errors


def test_vectors_matrices_and_numbers_of_atoms_are_learned_together(trained, files):
    path, errors = trained
    test = ase.io.read(files / "test.xyz", ":")
    spread = {
        "dipole": np.std([label_of(a, "dipole", "").value for a in test]),
        "gyration": np.std([a.info["gyration"] for a in test], axis=0).mean(),
        "crowd": np.std(np.concatenate([a.arrays["crowd"] for a in test])),
    }
    found = errors[str(files / "test.xyz")]
    assert all(found[f"{name}_rmse"] < 0.15 * value for name, value in spread.items()), (found, spread)
    names = {p.name for p in path.parent.glob("model*")}
    assert {"model.learning_curve.png", "model.parity_gyration_test.png", "model.csv"} <= names


def test_a_model_is_read_back_and_evaluated(trained, files):
    path, errors = trained
    model, atoms = load_properties(path), ase.io.read(files / "test.xyz", 3)
    found = model.predict(atoms)
    assert found["gyration"].shape == (3, 3) and found["crowd"].shape == (len(atoms),)
    atoms.calc = PropertyCalculator(path, device="cpu")
    np.testing.assert_array_equal(atoms.get_dipole_moment(), found["dipole"])
    np.testing.assert_array_equal(atoms.calc.get_property("gyration", atoms), found["gyration"])
    result = run("evaluate", path, files / "test.xyz")
    rmse = errors[str(files / "test.xyz")]["gyration_rmse"]
    assert f"{rmse:.4g}" in result.stdout
    told = run("info", path).stdout
    assert "gyration: 1x0e+1x2e, sum over atoms" in told and "crowd: 1x0e, of atoms" in told


def test_predictions_are_written_beside_what_the_file_had(trained, files, tmp_path):
    path, _ = trained
    run("predict", path, files / "test.xyz", tmp_path / "out.xyz")
    frames, old = ase.io.read(tmp_path / "out.xyz", ":"), ase.io.read(files / "test.xyz", ":")
    expected = load_properties(path).predict_all(old)
    for new, before, said in zip(frames, old, expected, strict=True):
        np.testing.assert_allclose(new.calc.results["dipole"], said["dipole"], atol=1e-8)
        np.testing.assert_allclose(new.info["REF_dipole"], before.calc.results["dipole"], atol=1e-8)
        np.testing.assert_allclose(new.info["gyration"], said["gyration"], atol=1e-8)
        np.testing.assert_allclose(new.info["REF_gyration"], before.info["gyration"], atol=1e-8)
        np.testing.assert_allclose(new.arrays["crowd"], said["crowd"], atol=1e-7)
        np.testing.assert_allclose(new.arrays["REF_crowd"], before.arrays["crowd"], atol=1e-7)
    assert (
        run("evaluate", path, tmp_path / "out.xyz").stdout.split()[-6:]
        == (run("evaluate", path, files / "test.xyz").stdout.split()[-6:])
    )  # what it said itself is no label
    told = run("predict", path, tmp_path / "out.xyz", tmp_path / "again.xyz").stdout
    assert "what the frames had as dipole is now before_dipole" in told
    last = ase.io.read(tmp_path / "again.xyz", 0)
    np.testing.assert_allclose(last.info["REF_dipole"], old[0].calc.results["dipole"], atol=1e-8)
    np.testing.assert_allclose(last.info["before_gyration"], expected[0]["gyration"], atol=1e-8)


def test_a_potential_writes_energies_beside_what_the_file_had(tmp_path):
    frames = [bulk("Si"), bulk("Si", cubic=True)]
    for n, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=n)
        atoms.calc = SinglePointCalculator(atoms, energy=1.0, free_energy=2.0, dipole=np.array([0.0, 0.0, 3.0]))
        atoms.info |= {"REF_energy": 4.0, "outside": "of an older model"} if n == 0 else {}
    ase.io.write(tmp_path / "in.xyz", frames)
    told = run("predict", "silicon-pbe", tmp_path / "in.xyz", tmp_path / "out.xyz").stdout
    assert "what the frames had as energy is now before_energy" in told and "are outside" not in told
    for new, atoms in zip(ase.io.read(tmp_path / "out.xyz", ":"), frames, strict=True):
        atoms.calc = SEGNNCalculator("silicon-pbe", device="cpu")
        assert new.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(new.get_forces(), atoms.get_forces(), atol=1e-5)
        np.testing.assert_allclose(new.get_stress(), atoms.get_stress(), atol=1e-7)
        kept = {name: new.info[name] for name in ("before_energy", "REF_free_energy")}
        assert kept == {"before_energy": 1.0, "REF_free_energy": 2.0}  # one name in all frames
        assert new.info.get("REF_energy") == (4.0 if len(new) == 2 else None)
        assert new.info.get("before_outside") == ("of an older model" if len(new) == 2 else None)
        assert new.info["REF_dipole"][2] == 3.0 and not {"dipole", "free_energy"} & new.calc.results.keys()
        assert "outside" not in new.info
    far = Atoms("Si2", [(0, 0, 0), (0, 0, 1.2)])
    ase.io.write(tmp_path / "far.xyz", far)
    told = run("predict", "silicon-pbe", tmp_path / "far.xyz", tmp_path / "out2.xyz").stdout
    assert "1 of 1 are outside of what it was trained on" in told
    assert ase.io.read(tmp_path / "out2.xyz").info["outside"]
    refused = run("predict", "silicon-pbe", tmp_path / "in.xyz", tmp_path / "in.xyz", check=False)
    assert refused.exit_code == 1 and "would overwrite" in refused.stderr


def test_a_training_is_learned_by_the_command_and_goes_on(files, tmp_path):
    command = ["train", "--train", files / "train.xyz", "--target", "dipole", "--target", "crowd", "--preset", "fast"]
    command += ["--out", tmp_path / "m.pt", "--epochs", "2", "--learning-rate", "0.01", "--irreps", "crowd=0e"]
    run(*command)
    first = (tmp_path / "m.pt").read_bytes()
    run(*command)
    assert (tmp_path / "m.pt").read_bytes() == first
    other = run(*command[:-1], "crowd=0e", "--pooling", "dipole=mean", check=False)
    assert other.exit_code == 1 and "data.pooling" in other.stderr
    wrong = run(*command, "--energy-weight", "2", check=False)
    assert wrong.exit_code == 1 and "unknown setting 'training.energy_weight'" in wrong.stderr


def test_unknown_names_say_what_there_is(files, tmp_path):
    with pytest.raises(DataError, match="has the target gap; frames have crowd, dipole, gyration"):
        read_labelled([str(files / "train.xyz")], ["gap"], {})
    result = run("train", "--train", files / "train.xyz", "--target", "gap", "--out", tmp_path / "m.pt", check=False)
    assert result.exit_code == 1 and "frames have" in result.stderr and not list(tmp_path.iterdir())


def test_labels_that_teach_nothing_are_refused(tmp_path):
    frames = labelled(10)
    for atoms in frames:
        atoms.info = {"count": float(len(atoms))}
    ase.io.write(tmp_path / "train.xyz", frames)
    config = {"out": str(tmp_path / "m.pt"), "data": {"train": str(tmp_path / "train.xyz"), "target": "count"}}
    with pytest.raises(DataError, match="nothing to learn"):
        train_properties(PropertyTraining.parse(config), progress=False)


def test_frames_without_some_labels_teach_the_others(files, tmp_path):
    frames = labelled(40)
    for atoms in frames[::2]:
        del atoms.info["gyration"]
    for atoms in frames[1::2]:
        del atoms.info["dipole"]
        atoms.arrays["crowd"][0] = math.nan
    ase.io.write(tmp_path / "train.xyz", frames)
    config = configured(tmp_path, tmp_path / "m.pt", epochs=3).model_dump(mode="json")
    config["data"]["test"] = [str(files / "test.xyz")]
    errors = train_properties(PropertyTraining.parse(config), progress=False)
    assert all(np.isfinite(value) for value in errors["train"].values())


def test_structures_that_cannot_be_evaluated_are_refused(trained):
    model = load_properties(trained[0])
    with pytest.raises(StructureError, match=r"this model does not know.*\. Train one on frames of all"):
        model.predict(Atoms("Si"))  # and no word of fine-tuning, which there is not
    with pytest.raises(ConfigError, match="expected Atoms"):
        model.predict("H2O")


def test_files_of_before_a_setting_came_are_as_they_were(trained, tmp_path):
    content = load_tensors(trained[0])
    for name in SINCE:
        del content["config"][name]
    save_tensors(tmp_path / "old.pt", content)
    assert load_properties(tmp_path / "old.pt").config == load_properties(trained[0]).config.model_copy(update=SINCE)


def test_damaged_and_foreign_files_are_refused(trained, tmp_path):
    content = load_tensors(trained[0])
    changes = {
        "version": 7,
        "convention": "another",
        "species": ["H", "C", "Xx"],
        "targets": [{**content["targets"][0], "pooling": "median"}, *content["targets"][1:]],
        "constants": content["constants"][:1],
        "weights": {},
        "metadata": {"errors": "none"},
    }
    strange = [{"name": "a\x1b[31m"}, {"name": 3}, {"shape": [3, 1]}, {"name": "numbers"}, {"irreps": "2x1o"}]
    for values in strange:
        save_tensors(tmp_path / "m.pt", {**content, "targets": [{**content["targets"][0], **values}]})
        with pytest.raises(ModelFileError):
            load_properties(tmp_path / "m.pt")
    for change in (torch.zeros_like, lambda x: x.half(), lambda x: x * math.nan):
        weights = {name: change(x) for name, x in content["weights"].items()}
        save_tensors(tmp_path / "m.pt", {**content, "weights": weights})
        with pytest.raises(ModelFileError):
            load_properties(tmp_path / "m.pt")
    data, rng = trained[0].read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(data), 20):
        (tmp_path / "m.pt").write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        with pytest.raises(ModelFileError):
            load_properties(tmp_path / "m.pt")
    for name, value in changes.items():
        save_tensors(tmp_path / "m.pt", {**content, name: value})
        with pytest.raises(ModelFileError):
            load_properties(tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match="expected a 'segnn_ase properties'"):
        load_properties("silicon-pbe")
    with pytest.raises(ModelFileError, match=r"segnn predict and segnn_ase\.properties\.PropertyCalculator take it"):
        SEGNNCalculator(trained[0])


def test_settings_name_what_is_wrong():
    data = {"train": "x.xyz", "target": ["a", "a"]}
    with pytest.raises(ConfigError, match="expected each once"):
        PropertyTraining.parse({"data": data})
    for name in ("energy", "REF_forces", "stress"):
        with pytest.raises(ConfigError, match="which a potential learns"):
            PropertyTraining.parse({"data": {"train": "x.xyz", "target": name}})
    with pytest.raises(ConfigError, match="at most 100 letters"):
        PropertyTraining.parse({"data": {"train": "x.xyz", "target": "a\x1b[31m"}})
    with pytest.raises(ConfigError, match=r"model\.core_repulsion.*potentials only"):
        PropertyTraining.parse({"data": {"train": "x.xyz", "target": "a"}, "model": {"core_repulsion": False}})
    with pytest.raises(ConfigError, match="irreps has b, which is no target"):
        PropertyTraining.parse({"data": {"train": "x.xyz", "target": "a", "irreps": {"b": "1o"}}})
    with pytest.raises(ConfigError, match=r"data\.target"):
        PropertyTraining.parse({"data": {"train": "x.xyz"}})


def test_layers_that_are_wrong_are_not_used(monkeypatch):
    model = made([DIPOLE, CHARGES])
    item = item_of(Labelled(molecule("CH3CH2OH"), {}, "here"), model.targets, model.cutoff)
    assert layers_for(model, item) is guard.FUSED
    right = guard.FUSED.message
    wrong = guard.FUSED._replace(message=lambda *a: [tuple(1.0001 * x for x in block) for block in right(*a)])
    monkeypatch.setattr(guard, "FUSED", wrong)
    with pytest.warns(AccelerationWarning, match="compiled layers: not used, as output 0 differ"):
        assert layers_for(model, item) is None


@pytest.mark.parametrize("name", ["CH4", "N2", "CO2", "C6H6"])
def test_symmetry_is_no_reason_against_compiled_layers(name):
    """A dipole that is zero is rounding alone."""
    atoms = molecule(name)
    for seed in range(3):
        model = PropertyModel(model_config("fast"), sorted(set(atoms.numbers.tolist())), [DIPOLE, TENSOR], seed=seed)
        item = item_of(Labelled(atoms, {}, "here"), model.targets, model.cutoff)
        model.calibrate(item.graph)
        assert layers_for(model, item) is guard.FUSED


def with_labels(count, labelled_ones, elements=()):
    frames = labelled(count)
    for n, atoms in enumerate(frames):
        if n not in labelled_ones:
            del atoms.info["dipole"]
    for n, symbol in elements:
        frames[n].symbols[0] = symbol
    names = [f"frame {n}" for n in range(count)]
    labels = [label_of(a, "dipole", where) for a, where in zip(frames, names, strict=True)]
    return [
        Labelled(a, {} if label is None else {"dipole": label}, where)
        for a, label, where in zip(frames, labels, names, strict=True)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_split_has_labels_on_both_sides_and_all_elements_in_training(seed):
    train, valid = split(with_labels(20, {3, 7}), [DIPOLE], 0.1, seed)
    assert [sum("dipole" in f.labels for f in some) for some in (train, valid)] == [1, 1]
    train, valid = split(with_labels(20, range(20), [(4, "Si"), (9, "Cl")]), [DIPOLE], 0.5, seed)
    assert {14, 17} <= {int(z) for f in train for z in f.atoms.numbers} and valid
    train, valid = split(with_labels(3, {1}), [DIPOLE], 0.4, seed)
    assert len(train) == 3 and not valid
    lone = [Labelled(Atoms("O"), {"dipole": Label(np.zeros((1, 3)), "structure", "info")}, "alone")]
    train, valid = split([*lone, *with_labels(4, range(4))], [DIPOLE], 0.5, seed)
    assert all(len(f.atoms) > 1 for f in valid) and len(valid) == 2


def test_tests_do_not_decide_what_is_learned(files, tmp_path):
    frames = labelled(6, seed=4)
    for atoms in frames:
        atoms.info["gyration"] = atoms.info["gyration"] + [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    ase.io.write(tmp_path / "odd.xyz", frames)
    config = configured(files, tmp_path / "m.pt").model_dump(mode="json")
    config["data"]["test"] = [str(tmp_path / "odd.xyz")]
    with pytest.raises(DataError, match=r"gyration of .*odd\.xyz.* no symmetric matrix"):
        train_properties(PropertyTraining.parse(config), progress=False)


def test_a_name_need_not_be_one_of_a_file(tmp_path):
    frames = labelled(8)
    for atoms in frames:
        atoms.info = {"mu/D": atoms.info["dipole"]}
        atoms.arrays.pop("crowd")
    ase.io.write(tmp_path / "train.xyz", frames)
    data = {"train": str(tmp_path / "train.xyz"), "target": "mu/D"}
    training = {"epochs": 1, "learning_rate": 0.01, "device": "cpu"}
    config = {"out": str(tmp_path / "m.pt"), "data": data, "model": {"preset": "fast"}, "training": training}
    assert "mu/D_rmse" in train_properties(PropertyTraining.parse(config), progress=False)["valid"]
    assert (tmp_path / "m.parity_mu_D_valid.png").exists()


def test_files_keep_the_precision_and_bits(tmp_path):
    model = made()
    save_properties(tmp_path / "m.pt", model, metadata={"errors": json.loads("{}")})
    again, atoms = load_properties(tmp_path / "m.pt"), molecule("CH3CHO")
    assert again.dtype is torch.float64
    for name, value in model.predict(atoms).items():
        np.testing.assert_array_equal(again.predict(atoms)[name], value)


@pytest.mark.slow
def test_a_thousand_molecules_labelled_by_xtb(tmp_path, monkeypatch):
    """Those of benchmarks/molecules.py: a vector, a matrix and a number that does not grow with the molecule."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = runpy.run_path(str(BENCHMARKS / "molecules.py"))
    files = benchmark["files_of"](tmp_path, 1000, 100)
    targets = ["dipole", "polarizability", "gap"]
    data = {"train": str(files["train"]), "test": str(files["test"]), "target": targets}
    training = {"epochs": 6, "learning_rate": 0.01, "batch_size": 10, "device": "cpu"}
    config = {"out": str(tmp_path / "m.pt"), "data": data, "model": {"preset": "fast"}, "training": training}
    found = train_properties(PropertyTraining.parse(config), progress=False)[str(files["test"])]
    for name, part in zip(targets, (0.15, 0.15, 0.3), strict=True):
        assert found[f"{name}_mae"] < part * benchmark["spread_of"](files, name), (name, found)
    assert load_properties(tmp_path / "m.pt").targets[2].pooling == "mean"


def test_tensors_of_atoms_that_ase_knows_are_written_as_columns(tmp_path):
    born = Target("born_effective_charges", "atom", (3, 3), "1x0e+1x1e+1x2e", "free")
    model, atoms = made([born]), molecule("CH3CHO")
    save_properties(tmp_path / "born.pt", model)
    ase.io.write(tmp_path / "in.xyz", atoms)
    run("predict", tmp_path / "born.pt", tmp_path / "in.xyz", tmp_path / "out.xyz")
    found = label_of(ase.io.read(tmp_path / "out.xyz"), born.name, "here").value
    np.testing.assert_allclose(found, model.predict(ase.io.read(tmp_path / "in.xyz"))[born.name], atol=1e-7)
