"""What must be the same for a training to go on, and what may change: `segnn_ase.train.resume`."""

import shutil
from pathlib import Path

import ase.io
import pytest
import torch
from ase import Atoms
from helpers.frames import water_frames
from helpers.trainings import TINY, configured, leave_out_plots, weights

from segnn_ase.base.errors import ConfigError
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.store.tensors import checksum
from segnn_ase.train import loop
from segnn_ase.train.resume import INDIFFERENT, OF_FIELDS, ONLY_LOGGED, decisive_settings
from segnn_ase.train.settings import OptimConfig
from segnn_ase.train.start import finetune, train


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    leave_out_plots(monkeypatch)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder of a training that is complete."""
    folder = tmp_path_factory.mktemp("complete")
    ase.io.write(folder / "test.xyz", water_frames(3, seed=1))
    train(configured(folder, water_frames(8)), progress=False)
    return folder


@pytest.fixture
def folder(complete, tmp_path, monkeypatch):
    """A copy of it, in which no further step may be made."""
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
    return shutil.copytree(complete, tmp_path / "copy")


MAY_CHANGE = {
    "save_minutes": 3.0,
    "max_minutes": 60.0,
    "tensorboard": True,
    "device": "auto",
    "accelerate": "off",
    "rollout_steps": 7,
    "rollout_every": 1,
    "rollout_temperature": 400.0,
    **dict.fromkeys(OF_FIELDS, 2.0),  # without a field; see test_told_frames.py
}
MUST_NOT = {
    "epochs": 3,
    "minutes": 2.0,
    "batch_size": 3,
    "max_edges": 20,
    "learning_rate": 0.02,
    "beta1": 0.5,
    "beta2": 0.9,
    "turn_every": 3,
    "warmup_steps": 4,
    "weight_decay": 0.1,
    "ema_decay": 0.5,
    "clip_norm": 2.0,
    "energy_weight": 2.0,
    "forces_weight": 2.0,
    "stress_weight": 2.0,
    "response_weight": 2.0,
    "patience": 5,
    "validate_every": 2,
    "select": "stability",
    "seed": 1,
    "dtype": "float64",
    "freeze": ("readout",),
}


def test_every_setting_of_the_loop_is_decided_upon():
    """`committee` and `teachers` are those of other kinds of training, whose members have their own files."""
    others = {"committee", "teachers"}
    assert set(MAY_CHANGE) | set(MUST_NOT) | others == set(OptimConfig.model_fields)
    assert set(INDIFFERENT) | set(ONLY_LOGGED) | set(OF_FIELDS) == set(MAY_CHANGE) | others


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_changes_no_weight_may_change(folder, name):
    train(configured(folder, **{name: MAY_CHANGE[name]}), progress=False)


@pytest.mark.parametrize("name", MUST_NOT)
def test_what_changes_the_weights_must_not(folder, name):
    options = {"select": {"rollout_steps": 5}, "minutes": {"epochs": None}}.get(name, {})
    with pytest.raises(ConfigError, match=rf"belongs to a training with .*training\.{name} = .* \(now "):
        train(configured(folder, **{name: MUST_NOT[name]}, **options), progress=False)


def test_rollouts_are_decisive_where_the_most_stable_model_is_kept(tmp_path):
    for name in ("rollout_steps", "rollout_every", "rollout_temperature"):
        steps = {"rollout_steps": 5, name: MAY_CHANGE[name]}
        kept, logged = (configured(tmp_path, select=select, **steps) for select in ("stability", "loss"))
        assert name in decisive_settings(kept) and name not in decisive_settings(logged)


def test_another_test_set_is_measured_without_another_training(folder):
    before = checksum(weights(folder / "model.pt"))
    test = str(folder / "test.xyz")
    errors = train(configured(folder, data={"test": test}), progress=False)
    assert errors[test]["forces_rmse"] > 0 and checksum(weights(folder / "model.pt")) == before
    metadata = load_with_metadata(folder / "model.pt")[1]
    assert metadata["errors"] == errors and metadata["training"]["data"]["test"] == [test]


def test_the_same_frames_may_be_called_by_another_name(folder):
    (folder / "train.traj").rename(folder / "other.traj")
    train(configured(folder, data={"train": str(folder / "other.traj"), "refuse_flaws": False}), progress=False)


def test_the_same_model_may_be_described_in_other_words(folder):
    train(configured(folder, model={**TINY, "preset": "segnn", "message": "steerable"}), progress=False)


def lone_atoms(folder: Path, energy: float) -> dict:
    atoms = [Atoms("H"), Atoms("O")]
    for single in atoms:
        single.info["energy"] = energy
    ase.io.write(folder / "atoms.xyz", atoms)
    return {"isolated_atoms": str(folder / "atoms.xyz")}


def test_other_energies_of_isolated_atoms_are_another_training(tmp_path):
    train(configured(tmp_path, water_frames(6), data=lone_atoms(tmp_path, -1.0)), progress=False)
    config = configured(tmp_path, data=lone_atoms(tmp_path, -1.1))
    with pytest.raises(ConfigError, match="belongs to a training with other isolated atoms, or a model to start from"):
        train(config, progress=False)
    table = configured(tmp_path, data={"reference_energies": {"H": -1.0, "O": -1.0}})
    with pytest.raises(ConfigError, match=r"data.isolated_atoms = .* data.reference_energies = None"):
        train(table, progress=False)


# fine-tuning


def another(model: Path, name: str, **changes) -> str:
    """A copy of a model with the same metadata, changed in its weights, reference energies or domain."""
    potential, metadata = load_with_metadata(model)
    with torch.no_grad():
        potential.readout.last.last.weight *= changes.get("weights", 1.0)
    potential.reference_energies = [e + changes.get("energies", 0.0) for e in potential.reference_energies]
    save_potential(model.with_name(name), potential, metadata={**metadata, **changes.get("metadata", {})})
    return str(model.with_name(name))


@pytest.mark.parametrize("changes", [{"weights": 1.5}, {"energies": 0.5}])
def test_files_of_another_starting_model_are_no_fine_tuning_to_go_on_with(complete, tmp_path, changes):
    config = configured(tmp_path, water_frames(6, seed=2), model={})
    finetune(str(complete / "model.pt"), config, progress=False)
    before = checksum(weights(config.out))
    with pytest.raises(ConfigError, match="another model to start from"):
        finetune(another(complete / "model.pt", "other.pt", **changes), config, progress=False)
    assert checksum(weights(config.out)) == before


def test_what_is_written_beside_the_weights_of_the_starting_model_may_change(complete, tmp_path, monkeypatch):
    """`segnn verify --store` adds a certificate to the file of a model."""
    config = configured(tmp_path, water_frames(6, seed=2), model={})
    finetune(str(complete / "model.pt"), config, progress=False)
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
    finetune(another(complete / "model.pt", "verified.pt", metadata={"epoch": 99}), config, progress=False)


def in_float64(model: Path, name: str) -> str:
    potential, metadata = load_with_metadata(model)
    save_potential(model.with_name(name), potential.double(), metadata=metadata)
    return str(model.with_name(name))


def test_fine_tuning_keeps_the_precision_of_its_start(complete, tmp_path):
    exact = in_float64(complete / "model.pt", "exact.pt")
    config = configured(tmp_path, water_frames(6, seed=2), model={})
    finetune(exact, config, progress=False)
    potential, metadata = load_with_metadata(config.out)
    assert potential.dtype is torch.float64 and metadata["training"]["training"]["dtype"] == "float64"


def test_a_lower_precision_is_used_when_asked_for_and_told(complete, tmp_path, capfd):
    exact = in_float64(complete / "model.pt", "exact.pt")
    config = configured(tmp_path, water_frames(6, seed=2), model={}, dtype="float32")
    finetune(exact, config)
    assert load_with_metadata(config.out)[0].dtype is torch.float32
    assert "the starting model is in float64, dtype is 'float32': its weights are rounded" in capfd.readouterr().err


def test_fine_tuning_in_the_same_or_a_higher_precision_says_nothing(complete, tmp_path, capfd):
    config = configured(tmp_path, water_frames(6, seed=2), model={}, dtype="float64")
    finetune(str(complete / "model.pt"), config)
    assert load_with_metadata(config.out)[0].dtype is torch.float64
    assert "rounded" not in capfd.readouterr().err


@pytest.mark.parametrize("data", [{"reference_energies": {"H": 0.0, "O": 0.0}}, {"isolated_atoms": "atoms.xyz"}])
def test_fine_tuning_refuses_reference_energies_that_it_would_not_use(complete, tmp_path, data):
    config = configured(tmp_path, water_frames(6, seed=2), model={}, data=data)
    with pytest.raises(ConfigError, match=f"setting 'data.{next(iter(data))}' is .* fine-tuning shifts"):
        finetune(str(complete / "model.pt"), config, progress=False)


# the process


def test_training_leaves_the_global_random_state_alone(complete, tmp_path):
    before = torch.random.get_rng_state()
    config = configured(tmp_path, water_frames(6))
    train(config, progress=False)
    train(config, progress=False)
    tuned = configured(tmp_path, model={}).model_copy(update={"out": str(tmp_path / "tuned.pt")})
    finetune(str(complete / "model.pt"), tuned, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
