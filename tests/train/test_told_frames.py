"""Trainings of potentials that are told moments, charges and fields: from files to errors, and back to files."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import segnn

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DataError, StructureError
from segnn_ase.check.doctor import check, examine
from segnn_ase.check.findings import Sets
from segnn_ase.data.batches import make_item
from segnn_ase.data.convert import convert
from segnn_ase.data.frames import frame_from_atoms, read_frames
from segnn_ase.data.pulled import without_pull
from segnn_ase.model.more_elements import with_more_elements
from segnn_ase.model.settings import model_config
from segnn_ase.prediction import predict_files
from segnn_ase.store.description import describe_model
from segnn_ase.store.model_file import load_potential, read_committee
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.train import TrainConfig, finetune, loop, train
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.prepare import what_teaches_dipoles
from segnn_ase.train.resume import save_state
from segnn_ase.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::segnn_ase.base.errors.UnusedInputWarning")
TINY = {"hidden_irreps": "4x0e+4x1o+4x2e", "lmax_attr": 1, "interactions": 1, "radial_hidden": [4], "cutoff": 3.0}


def spins(n: int, *, moved: float = 0.03) -> list[Atoms]:
    """One crystal, moments in random directions, E = 0.05 sum m_i . m_j over neighbours, and their magnetic forces."""
    frames = []
    for seed in range(n):
        rng, atoms = np.random.default_rng(seed), bulk("Fe", "sc", 2.4, cubic=True).repeat((2, 2, 1))
        atoms.rattle(moved, rng=rng)
        m = rng.normal(size=(4, 3))
        atoms.set_initial_magnetic_moments(m)
        total = m.sum(axis=0)
        atoms.arrays["magnetic_forces"] = -0.05 * (total - m)
        atoms.calc = SinglePointCalculator(
            atoms, energy=0.025 * float(total @ total - np.sum(m**2)), forces=0.1 * rng.normal(size=(4, 3))
        )
        frames.append(atoms)
    return frames


def polar(n: int) -> list[Atoms]:
    """Molecules in fields, with dipoles, polarizabilities and Born charges."""
    frames = []
    for seed in range(n):
        rng, atoms = np.random.default_rng(seed), molecule(("H2O", "H2O2")[seed % 2])
        atoms.rattle(0.05, rng=rng)
        atoms.info["external_field"] = 0.1 * rng.normal(size=3)
        atoms.info["polarizability"] = np.eye(3) * len(atoms)
        atoms.arrays["born_charges"] = rng.normal(size=(len(atoms), 9))
        dipole = atoms.positions[0] - atoms.positions.mean(axis=0)
        results = {"energy": -3.0 * len(atoms), "forces": rng.normal(size=(len(atoms), 3)), "dipole": dipole}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def config(folder, cues, name="frames.xyz", **training) -> TrainConfig:
    usual = {"epochs": 2, "rollout_steps": 0, "learning_rate": 0.01}
    values = {"data": {"train": [str(folder / name)], "refuse_flaws": False}, "model": {**TINY, "cues": cues}}
    return TrainConfig.parse({**values, "training": usual | training, "out": str(folder / "model.pt")})


@pytest.fixture
def magnet(tmp_path):
    ase.io.write(tmp_path / "frames.xyz", spins(12))
    train(config(tmp_path, ["initial_magmoms"]), progress=False)
    return tmp_path


@pytest.fixture
def dipoles(tmp_path):
    folder = tmp_path / "dipoles"
    folder.mkdir()
    ase.io.write(folder / "frames.xyz", polar(12))
    train(config(folder, ["external_field"]), progress=False)
    return folder


def test_errors_are_those_of_the_calculator(magnet):
    errors = evaluate_files(str(magnet / "model.pt"), [str(magnet / "frames.xyz")])
    found, right = [], []
    for atoms in ase.io.read(magnet / "frames.xyz", ":"):
        right.append(atoms.arrays["magnetic_forces"])
        found.append(
            SEGNNCalculator(magnet / "model.pt", domain="ignore").get_property("magnetic_forces", atoms.copy())
        )
    rmse = np.sqrt(np.mean((np.array(found) - np.array(right)) ** 2)) / 3**0.5  # of dE/dcue, in its scale
    (values,) = errors.values()
    assert values["cue_gradients_rmse"] == pytest.approx(rmse, rel=1e-4)
    assert "initial_magmoms (atoms.arrays; axial" in describe_model(*read_committee(magnet / "model.pt"))


def test_errors_of_dipoles_polarizabilities_and_born_charges(dipoles):
    (values,) = evaluate_files(str(dipoles / "model.pt"), [str(dipoles / "frames.xyz")]).values()
    calculator, missed = SEGNNCalculator(dipoles / "model.pt", domain="ignore"), {"dipole": [], "born": []}
    for atoms in polar(12):
        found = {n: calculator.get_property(n, atoms.copy()) for n in ("dipole", "born_effective_charges")}
        missed["dipole"] += list(found["dipole"] - atoms.calc.results["dipole"])
        born = atoms.arrays["born_charges"].reshape(-1, 3, 3)
        missed["born"] += list((found["born_effective_charges"] - born).ravel())
    for name, errors in missed.items():
        assert (dipoles / f"model.parity_{name}_valid.png").exists()
        assert values[f"{name}_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-3)


@pytest.mark.parametrize("kind", ["spins", "polar"])
def test_a_training_that_goes_on_gives_the_same_bits(kind, tmp_path):
    frames, cues = {"spins": (spins(8), ["initial_magmoms"]), "polar": (polar(8), ["external_field"])}[kind]
    weights = []
    for stops in ((), (2,)):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        ase.io.write(folder / "frames.xyz", frames)
        whole = config(folder, cues, epochs=4, save_minutes=0.0)
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(loop, "save_state", stopping(stop))
                train(whole, progress=False)
        train(whole, progress=False)
        weights.append(load_potential(folder / "model.pt").state_dict())
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(*(w.values() for w in weights), strict=True))


def stopping(epoch: int):
    """`save_state` that is followed by an interruption."""

    def stop(path, job, learner, done):
        save_state(path, job, learner, done)
        if done.epoch == epoch:
            raise KeyboardInterrupt

    return stop


def test_other_moments_are_another_training(magnet):
    frames = spins(12)
    frames[3].arrays["initial_magmoms"][0] += 0.1
    ase.io.write(magnet / "frames.xyz", frames)
    (magnet / "model.pt").unlink()
    with pytest.raises(ConfigError, match="belongs to a training"):
        train(config(magnet, ["initial_magmoms"]), progress=False)


def test_trainings_in_fields_go_on_with_the_weights_that_they_had(dipoles):
    """Files of before have no 1, which were the defaults of dipoles and polarizabilities, and others as they were."""
    state, before = (
        load_tensors(dipoles / "model.resume.pt", "resume file"),
        {"dipole_weight": 1.0, "born_weight": 10.0},
    )
    before["polarizability_weight"] = 1.0
    settings = state["fingerprint"]["settings"]
    assert {n: settings.get(n) for n in before} == {
        "dipole_weight": 10,
        "polarizability_weight": 10,
        "born_weight": None,
    }
    for name, value in before.items():
        settings.pop(name, None)
        state["config"]["training"][name] = value
    save_tensors(dipoles / "model.resume.pt", state)
    (dipoles / "model.pt").unlink()
    with pytest.raises(ConfigError, match=r"training.dipole_weight = 1.0 \(now 10.0\), training.polarizability_weight"):
        train(config(dipoles, ["external_field"]), progress=False)
    with pytest.raises(ConfigError, match=r"training.born_weight = 10.0 \(now 3.0\)"):
        train(config(dipoles, ["external_field"], **{**before, "born_weight": 3.0}), progress=False)
    train(config(dipoles, ["external_field"], **before), progress=False)
    assert (dipoles / "model.pt").exists()


def test_predictions_are_told_what_the_file_tells(dipoles):
    predict_files(str(dipoles / "model.pt"), [str(dipoles / "frames.xyz")], str(dipoles / "out.xyz"))
    calculator = SEGNNCalculator(dipoles / "model.pt", domain="ignore")
    for said, atoms in zip(ase.io.read(dipoles / "out.xyz", ":"), polar(12), strict=True):
        assert said.get_potential_energy() == pytest.approx(calculator.get_property("energy", atoms.copy()), abs=1e-5)


def test_conversion_keeps_dipoles(dipoles):
    convert(str(dipoles / "frames.xyz"), str(dipoles / "again.xyz"))
    for kept, atoms in zip(read_frames(dipoles / "again.xyz"), polar(12), strict=True):
        assert np.allclose(kept.told["info", "dipole"], atoms.calc.results["dipole"], atol=1e-6)


def test_one_crystal_with_many_moments_is_no_copy(tmp_path):
    ase.io.write(tmp_path / "frames.xyz", spins(30, moved=0.0))
    found = [finding.code for finding in check(str(tmp_path / "frames.xyz")).findings]
    assert not {"duplicates", "contradiction"} & {*found}


def test_new_elements_change_nothing_known(magnet, dipoles):
    for folder, atoms in ((magnet, spins(1)[0]), (dipoles, polar(1)[0])):
        old = load_potential(folder / "model.pt")
        for begin in ("fresh", "nearest"):
            models = old, with_more_elements(old, [28], begin=begin)
            a, b = (SEGNNCalculator(p, domain="ignore").get_property("energy", atoms.copy()) for p in models)
            assert a == pytest.approx(b, rel=1e-6)


def test_fine_tuning_and_committees(magnet):
    tuning = {"replay": [str(magnet / "frames.xyz")]}
    values = {"data": {"train": [str(magnet / "frames.xyz")], "refuse_flaws": False}, "out": str(magnet / "tuned.pt")}
    training = {"epochs": 1, "rollout_steps": 0, "learning_rate": 0.001}
    finetune(
        str(magnet / "model.pt"),
        TrainConfig.parse({**values, "training": training, "finetune": tuning}),
        progress=False,
    )
    train(
        config(magnet, ["initial_magmoms"], committee=2, epochs=1).model_copy(update={"out": str(magnet / "both.pt")}),
        progress=False,
    )
    for name in ("tuned.pt", "both.pt"):
        (values,) = evaluate_files(str(magnet / name), [str(magnet / "frames.xyz")]).values()
        assert values["cue_gradients_rmse"] > 0


def test_a_teacher_is_told_the_same(magnet):
    values = config(magnet, [], epochs=1).model_dump(exclude_unset=True)
    values["data"] = {**values["data"], "teacher": str(magnet / "model.pt")}
    with pytest.raises(ConfigError, match="expected the same cues"):
        train(TrainConfig.parse({**values, "out": str(magnet / "other.pt")}), progress=False)


def test_frames_without_what_is_told_are_refused(tmp_path):
    frames = spins(4)
    del frames[2].arrays["initial_magmoms"]
    for atoms in frames:
        atoms.arrays.pop("magnetic_forces")
    ase.io.write(tmp_path / "frames.traj", frames)
    with pytest.raises(DataError, match=r"frame 2.*initial_magmoms.*missing"):
        train(config(tmp_path, ["initial_magmoms"], name="frames.traj"), progress=False)


def polar_molecules(n: int) -> list[Atoms]:
    frames = []
    for seed in range(n):
        rng, atoms = np.random.default_rng(seed), molecule("H2O")
        atoms.positions += rng.normal(0, 0.05, (3, 3))
        atoms.info["external_field"] = 0.1 * rng.normal(size=3)
        dipole = np.array([-0.6, 0.3, 0.3]) @ atoms.positions
        energy = -float(dipole @ atoms.info["external_field"])
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=rng.normal(0, 0.1, (3, 3)), dipole=dipole)
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def in_fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    ase.io.write(folder / "train.xyz", polar_molecules(12))
    training = {"epochs": 2, "rollout_steps": 0, "learning_rate": 0.01, "device": "cpu"}
    values = {"data": {"train": str(folder / "train.xyz")}, "model": {**TINY, "cues": ["external_field"]}}
    train(TrainConfig.parse({**values, "training": training, "out": str(folder / "model.pt")}), progress=False)
    return folder


def test_what_is_predicted_is_no_label_beside_the_labels(in_fields):
    """The file's own come back as REF_dipole, which goes before the model's."""
    model, labelled = in_fields / "model.pt", in_fields / "predicted.xyz"
    predict_files(str(model), str(in_fields / "train.xyz"), labelled, overwrite=True)
    first = ase.io.read(labelled, 0)
    assert "REF_dipole" in first.info and "dipole" in first.calc.results
    before, after = (evaluate_files(model, str(path)) for path in (in_fields / "train.xyz", labelled))
    before, after = (next(iter(errors.values())) for errors in (before, after))
    assert after["dipole_rmse"] == pytest.approx(before["dipole_rmse"], rel=1e-5) and before["dipole_rmse"] > 1e-3


def test_ions_are_pulled_where_they_are_not_periodic(in_fields, tmp_path):
    model, ions = in_fields / "model.pt", polar_molecules(3)
    for atoms in ions:
        atoms.info["charge"] = 1
        atoms.calc.results["forces"] += (atoms.info["external_field"] - atoms.calc.results["forces"].sum(axis=0)) / 3
        atoms.calc.results["energy"] -= float(atoms.info["external_field"] @ atoms.positions.mean(axis=0))
        atoms.calc.results["dipole"] += atoms.positions.mean(axis=0)
    ase.io.write(tmp_path / "ions.xyz", ions)
    errors = next(iter(evaluate_files(model, str(tmp_path / "ions.xyz")).values()))
    predict_files(str(model), str(tmp_path / "ions.xyz"), tmp_path / "out.xyz")
    said = ase.io.read(tmp_path / "out.xyz", ":")
    for name in ("energy", "forces", "dipole"):  # of files as of results
        off = np.array([b.calc.results[name] - a.calc.results[name] for a, b in zip(ions, said, strict=True)])
        off = off / 3 if name == "energy" else off
        assert errors[f"{name}_rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-5)
    assert "net forces" not in {finding.code for finding in check([str(tmp_path / "ions.xyz")]).findings}
    said[1].positions += [30.0, -20.0, 10.0]
    for atoms in said[:2]:
        assert not verify(model, atoms).failed


def test_where_an_ion_stands_changes_no_training(in_fields, tmp_path):
    """E0 neither of a fit nor of a fine-tuning, and no copy elsewhere contradicts another."""
    model, frames = load_potential(in_fields / "model.pt"), []
    calculator = SEGNNCalculator(model, domain="ignore", dtype="float64")
    for n, atoms in enumerate([*polar_molecules(12), *polar_molecules(2)]):
        atoms.info["charge"] = 1
        atoms.positions += np.random.default_rng(100 + n).uniform(0, 30, 3)
        atoms.calc = calculator
        results = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "dipole")}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    ase.io.write(tmp_path / "ions.xyz", frames)
    codes = {finding.code for finding in check([str(tmp_path / "ions.xyz")]).findings}
    assert "duplicates" in codes and not codes & {"contradiction", "energy outliers", "net forces"}
    training = {"epochs": 1, "rollout_steps": 0, "device": "cpu"}
    values = {"data": {"train": str(tmp_path / "ions.xyz")}, "training": training, "out": str(tmp_path / "tuned.pt")}
    finetune(str(in_fields / "model.pt"), TrainConfig.parse(values), progress=False)
    shift = load_potential(tmp_path / "tuned.pt").reference_energies
    assert np.allclose(shift, model.reference_energies, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dipole", 1.85), ("dipole", [1.0, 2.0]), ("dipole", "none"), ("born_charges", np.ones(3)), ("born_charges", "x")],
)
def test_labels_of_another_shape_are_refused_of_ions_too(tmp_path, name, value):
    ions = polar_molecules(4)
    for atoms in ions:
        atoms.info["charge"], atoms.positions = 1, atoms.positions + 5.0
        del atoms.calc.results["dipole"]
        atoms.info[name] = value
    frames = [frame_from_atoms(atoms) for atoms in ions]
    model = model_config(**TINY, cues=["external_field"])
    with pytest.raises((DataError, ValueError), match=r"shape|float"):
        make_item(without_pull(frames, model.cues)[0], 3.0, model.cues)
    assert {finding.code for finding in examine(Sets(frames)).findings}  # and no traceback


def test_digits_are_looked_at_as_files_have_them():
    frames = []
    for n, atoms in enumerate(polar_molecules(24)):
        atoms.info["charge"] = 1
        atoms.positions += np.random.default_rng(n).uniform(0, 9, 3)
        rounded = round(n * 0.37 - 0.1 * float(atoms.info["external_field"] @ atoms.positions.mean(axis=0)), 2)
        atoms.calc = SinglePointCalculator(atoms, energy=rounded, forces=atoms.calc.results["forces"])
        frames.append(frame_from_atoms(atoms))
    assert "coarse energies" in {finding.code for finding in examine(Sets(frames)).findings}


def test_lone_ions_move_no_E0_of_a_fine_tuning(in_fields, tmp_path):
    ions = [Atoms("H"), Atoms("O")]
    for atoms, energy in zip(ions, (13.0, -7.0), strict=True):
        atoms.info |= {"charge": 1, "external_field": np.zeros(3)}
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
    frames = polar_molecules(12)
    for atoms in frames:
        atoms.info["charge"] = 0
    ase.io.write(tmp_path / "train.xyz", [*frames, *ions])
    model = {**TINY, "cues": ["external_field", "charge"]}
    training = {"epochs": 1, "rollout_steps": 0, "device": "cpu"}
    values = {"data": {"train": str(tmp_path / "train.xyz"), "refuse_flaws": False}, "training": training}
    train(TrainConfig.parse({**values, "model": model, "out": str(tmp_path / "model.pt")}), progress=False)
    before = np.array(load_potential(tmp_path / "model.pt").reference_energies)
    assert np.abs(before).max() < 3.0  # of a fit without them
    finetune(str(tmp_path / "model.pt"), TrainConfig.parse({**values, "out": str(tmp_path / "o.pt")}), progress=False)
    assert np.abs(load_potential(tmp_path / "o.pt").reference_energies - before).max() < 1.0


def test_lone_atoms_may_differ_in_any_cue(tmp_path):
    frames = [Atoms(symbol) for symbol in "HHO"]
    for n, (atoms, energy) in enumerate(zip(frames, (-1.0, -1.3, -2.0), strict=True)):
        atoms.info["light"] = float(n == 1)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
    ase.io.write(tmp_path / "atoms.xyz", frames)
    molecules_ = polar_molecules(12)
    for atoms in molecules_:
        atoms.info["light"] = 0.0
    ase.io.write(tmp_path / "train.xyz", [*molecules_, *frames])
    cue = {"name": "light", "kind": "scalar", "per": "graph"}
    named = segnn("check", tmp_path / "train.xyz", "--cues", "light,kind=scalar,per=graph")
    assert "contradictory E0" not in named.output
    assert "contradictory E0" in segnn("check", tmp_path / "train.xyz").output
    for n, isolated in enumerate((None, str(tmp_path / "atoms.xyz"))):
        data = {"train": str(tmp_path / "train.xyz"), "isolated_atoms": isolated, "refuse_flaws": False}
        values = {"data": data, "model": {**TINY, "cues": [cue]}, "out": str(tmp_path / f"{n}.pt")}
        values |= {"training": {"epochs": 1, "rollout_steps": 0, "device": "cpu"}}
        train(TrainConfig.parse(values), progress=False)
        assert load_potential(tmp_path / f"{n}.pt").reference_energies == [-1.0, -2.0]


def test_periodic_ions_have_no_dipole_and_are_in_no_field(in_fields, tmp_path):
    ions = polar_molecules(3)
    for atoms in ions:
        atoms.info["charge"], atoms.pbc, atoms.cell = 1, True, 9 * np.eye(3)
    ase.io.write(tmp_path / "ions.xyz", ions)
    with pytest.raises(StructureError, match="net charge"):
        predict_files(str(in_fields / "model.pt"), str(tmp_path / "ions.xyz"), tmp_path / "out.xyz")
    with pytest.raises(DataError, match="net charge"):
        evaluate_files(in_fields / "model.pt", str(tmp_path / "ions.xyz"))
    for atoms in ions:
        del atoms.info["external_field"]
    ase.io.write(tmp_path / "ions.xyz", ions)
    predict_files(str(in_fields / "model.pt"), str(tmp_path / "ions.xyz"), tmp_path / "out.xyz")
    first = ase.io.read(tmp_path / "out.xyz", 0)
    assert "polarizability" in first.info and "dipole" not in first.calc.results
    assert "dipole_rmse" not in next(iter(evaluate_files(in_fields / "model.pt", str(tmp_path / "ions.xyz")).values()))
    assert not verify(in_fields / "model.pt", first).failed


def test_what_teaches_dipoles_is_told(tmp_path):
    model = model_config(**TINY, cues=["external_field"])
    frames = polar_molecules(4)
    items = [make_item(frame_from_atoms(atoms), 3.0, model.cues) for atoms in frames]
    assert what_teaches_dipoles(items) == "of the field: 4/4 dipole, 0/4 polarizability, 0/4 born, 4/4 field"
    for atoms in frames:
        del atoms.info["external_field"], atoms.calc.results["dipole"]
    items = [make_item(frame_from_atoms(atoms), 3.0, model.cues) for atoms in frames]
    assert "nothing teaches dipoles and polarizabilities" in what_teaches_dipoles(items)
