"""The data of a committee: read, checked and turned into graphs once, whatever the number of members."""

from collections import Counter
from pathlib import Path

import ase.io
import pytest
import torch
from helpers.frames import water_frames
from helpers.trainings import configured, leave_out_plots

from segnn_ase.base import figures
from segnn_ase.base.errors import DataError
from segnn_ase.store.model_file import load_committee, load_with_metadata
from segnn_ase.structure import graph
from segnn_ase.train import prepare, start
from segnn_ase.train.report import short_name


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    leave_out_plots(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """How often frames are read, labels looked at, neighbours searched for, and E0 and their scale found."""
    counts = Counter()

    def counted(module, name):
        original = getattr(module, name)

        def wrapped(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("read_frames", "check_labels", "warn_or_refuse", "make_item", "reference_energies", "energy_scale"):
        counted(prepare, name)
    counted(graph, "neighbor_list")
    return counts


@pytest.mark.parametrize("members", [1, 3])
def test_the_data_are_prepared_once(tmp_path, calls, members):
    ase.io.write(tmp_path / "test.xyz", water_frames(2, seed=1))
    data = {"test": str(tmp_path / "test.xyz")}
    config = configured(tmp_path, water_frames(8), data=data, epochs=1, committee=members, accelerate="off")
    start.train(config, progress=False)
    once = dict.fromkeys(("check_labels", "warn_or_refuse", "reference_energies", "energy_scale"), 1)
    assert calls == {**once, "read_frames": 2, "make_item": 10, "neighbor_list": 10}


@pytest.mark.slow
def test_members_differ_in_their_seeds_only(tmp_path):
    (tmp_path / "all").mkdir(), (tmp_path / "one").mkdir()
    config = configured(tmp_path / "all", water_frames(8), committee=2, seed=3)
    start.train(config, progress=False)
    alone = configured(tmp_path / "one", water_frames(8), seed=3)
    start.train(alone, progress=False)
    first, second = load_committee(config.out).potentials
    single = load_with_metadata(alone.out)[0]
    assert all(torch.equal(w, single.state_dict()[name]) for name, w in first.state_dict().items())
    assert not torch.equal(first.readout.last.last.weight, second.readout.last.last.weight)
    assert first.reference_energies == second.reference_energies and first.scales == second.scales
    assert torch.equal(first.core_radii, second.core_radii)  # of the same training frames


def test_test_sets_of_one_name_have_figures_of_their_own(tmp_path, monkeypatch):
    paths, seen = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ase.io.write(tmp_path / name / "test.xyz", water_frames(2, seed=1))
        paths.append(str(tmp_path / name / "test.xyz"))
    monkeypatch.setattr(figures, "plot_parity", lambda path, *_, **__: seen.append(path.name))
    start.train(configured(tmp_path, water_frames(8), data={"test": paths}, epochs=1, committee=2), progress=False)
    of_committee = [name for name in seen if name.startswith("model.parity_forces")]
    assert of_committee == [f"model.parity_forces_{name}.png" for name in ("valid", "a_test", "b_test")]


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["valid", "a/test.xyz", "b/test.xyz"], ["valid", "a_test", "b_test"]),
        (["valid", "run.xyz@:100", "run.xyz@100:"], ["valid", "run.xyz_100", "run.xyz_100_2"]),
        (["valid", "a.xyz", "a.traj"], ["valid", "a.xyz", "a.traj"]),
        (["valid", "/valid.xyz"], ["valid", "valid_2"]),
    ],
)
def test_names_of_figures(names, files):
    assert [short_name(name, names) for name in names] == files


def test_a_committee_without_validation_is_not_calibrated_on_what_it_learned(tmp_path):
    config = configured(tmp_path, water_frames(8), data={"valid_fraction": 0}, epochs=2, committee=2)
    assert set(start.train(config, progress=False)) == {"train"}
    assert set(load_committee(config.out).factors.values()) == {1.0}


def test_labels_of_which_none_has_a_weight_are_refused(tmp_path):
    config = configured(tmp_path, water_frames(8), energy_weight=0, forces_weight=0)
    with pytest.raises(DataError, match=r"training set has energy and forces, and weights.*forces_weight = 0.*raise"):
        start.train(config, progress=False)


def test_a_model_that_was_moved_away_is_written_again_from_the_last_weights(tmp_path):
    config = configured(tmp_path, water_frames(8), epochs=2)
    start.train(config, progress=False)
    Path(config.out).unlink()
    assert "valid" in start.train(config, progress=False) and Path(config.out).exists()
