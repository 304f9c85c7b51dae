"""Rollouts at validation: sound potentials survive, unsound ones do not, and training takes notice."""

import copy
import math

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from helpers.frames import water_frames
from helpers.systems import rattled
from helpers.trainings import configured, history, weights

from segnn_ase import load_potential
from segnn_ase.base.errors import ConfigError, OutOfTime
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.store.shipped import find_model
from segnn_ase.store.tensors import checksum
from segnn_ase.train import prepare, rollouts
from segnn_ase.train.potential_goal import POTENTIAL
from segnn_ase.train.resume import Progress
from segnn_ase.train.rollouts import Stability, stability, usual_timestep
from segnn_ase.train.selection import better, keep
from segnn_ase.train.settings import OptimConfig
from segnn_ase.train.start import train

SHORTEST = {(1, 1): 1.5, (1, 6): 1.0, (1, 8): 0.9, (6, 6): 1.3, (6, 8): 1.15, (8, 8): 2.3}  # Å


def acetylacetone() -> Atoms:
    return ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", 0)


def test_a_trained_potential_survives():
    found = stability(load_potential("acetylacetone-pbe"), acetylacetone(), SHORTEST, steps=120, temperature=300)
    assert found.survived == 1.0 and found.nve_ps == found.hot_ps == pytest.approx(0.06, rel=0.01)
    assert abs(found.nve_drift) < 0.02 and 0.8 < found.closest < 1.2


def test_an_unsound_potential_dies_and_nothing_is_changed(new_potential):
    potential, atoms = new_potential("coreless"), rattled(molecule("CH3CH2OH"), 1, 0.02)
    potential.scales = [30.0] * 4
    before, start = checksum(potential.state_dict()), atoms.copy()
    results = [stability(potential, atoms, SHORTEST, steps=200, temperature=300, seed=3) for _ in range(2)]
    assert results[0].survived < 0.5 and results[0].hot_ps < 0.05
    assert str(results[0]) == str(results[1])
    assert checksum(potential.state_dict()) == before and atoms == start and atoms.calc is None


def test_atoms_that_meet_end_a_rollout(small_potential):
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, 0.7]])
    found = stability(small_potential("coreless"), atoms, SHORTEST, steps=10, temperature=1.0)
    assert found.survived == 0.0 and found.closest == pytest.approx(0.7 / 1.15) and math.isnan(found.nve_drift)


def test_time_steps_follow_the_lightest_atom():
    assert usual_timestep(molecule("H2O")) == pytest.approx(0.502, abs=1e-3)
    assert usual_timestep(bulk("C")) == pytest.approx(1.73, abs=0.01)
    assert usual_timestep(bulk("Au")) == 2.0


@pytest.mark.slow
def test_rollouts_are_logged_when_they_are_due_and_change_no_bit(tmp_path):
    folders = [tmp_path / name for name in ("with", "without")]
    for folder, steps in zip(folders, (15, 0), strict=True):
        folder.mkdir()
        train(configured(folder, water_frames(8), epochs=5, rollout_steps=steps, rollout_every=2), progress=False)
    rows = history(folders[0] / "model.pt")
    assert [bool(row["survived"]) for row in rows] == [False, True, False, True, True]  # and at the end
    assert all(0 <= float(row["survived"]) <= 1 and float(row["hot_ps"]) <= 0.0081 for row in rows if row["survived"])
    assert not any(row["survived"] for row in history(folders[1] / "model.pt"))
    assert checksum(weights(folders[0] / "model.pt")) == checksum(weights(folders[1] / "model.pt"))


@pytest.mark.slow
def test_stopped_between_rollouts_it_goes_on_to_the_same_history(tmp_path):
    options = {"epochs": 4, "rollout_steps": 10, "rollout_every": 2, "select": "stability", "save_minutes": 0.0}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        ase.io.write(tmp_path / name / "train.traj", water_frames(8))
    train(configured(tmp_path / "whole", **options), progress=False)
    while True:
        try:
            train(configured(tmp_path / "parts", **options, max_minutes=1e-6), progress=False)
            break
        except OutOfTime:
            pass
    assert history(tmp_path / "parts" / "model.pt") == history(tmp_path / "whole" / "model.pt")
    assert checksum(weights(tmp_path / "parts" / "model.pt")) == checksum(weights(tmp_path / "whole" / "model.pt"))


def test_the_most_stable_model_can_be_kept(tmp_path, monkeypatch):
    """The second of four rollouts lives longest, whatever the losses are."""
    lives = iter([0.4, 0.9, 0.7, 0.8])
    monkeypatch.setattr(rollouts, "stability", lambda *_, **__: Stability(0.1, 0.0, 0.1, 1.0, next(lives)))
    kept, save = [], POTENTIAL.save
    goal = POTENTIAL._replace(save=lambda path, p, **rest: (kept.append((str(path), rest)), save(path, p, **rest)))
    monkeypatch.setattr(prepare, "POTENTIAL", goal)
    config = configured(tmp_path, water_frames(8), epochs=4, rollout_steps=5, rollout_every=1, select="stability")
    train(config, progress=False)
    assert [rest["metadata"]["epoch"] for path, rest in kept if path == config.out][:2] == [1, 2]
    assert load_with_metadata(config.out)[1]["epoch"] == 2


def test_among_equally_stable_models_the_losses_decide():
    settings = OptimConfig(select="stability")
    done = Progress(losses=[1.0] * 100, survived=0.5)

    def is_kept(survived, loss):
        return better({"survived": survived}, np.full(100, loss), done, settings)

    assert is_kept(0.5, 0.9) and is_kept(0.6, 9.0) and not is_kept(0.5, 1.2) and not is_kept(None, 0.1)
    keep({"survived": 0.6}, np.full(100, 9.0), done, settings)
    assert (done.losses, done.survived) == ([9.0] * 100, 0.6)


def test_stability_cannot_be_selected_without_rollouts(tmp_path):
    with pytest.raises(ConfigError, match="rollout_steps is 0: nothing tells how stable"):
        configured(tmp_path, water_frames(4), select="stability")


def test_a_model_that_is_not_smooth_has_no_rollouts(new_potential, tmp_path):
    model = copy.deepcopy({"preset": "segnn2022", "hidden_irreps": "4x0e+4x1o", "cutoff": 3.0, "lmax_attr": 1})
    config = configured(tmp_path, water_frames(8), model=model, rollout_steps=5, epochs=1)
    train(config, progress=False)
    assert [row["survived"] for row in history(config.out)] == [""]


def test_distances_are_looked_at_in_periodic_cells(small_potential):
    atoms = bulk("Cu", a=3.6)
    found = stability(small_potential("segnn"), atoms, {(29, 29): 2.6}, steps=2, temperature=1.0)
    assert found.closest == pytest.approx(3.6 / 2**0.5 / 2.6, rel=1e-2)
    assert np.isfinite(found.nve_drift)
