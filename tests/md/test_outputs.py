"""What is drawn and kept of a run: energies per atom, pairs, runs of no steps, runs without files."""

import numpy as np
import pytest
from helpers.dynamics import config, crystal, run, trimer

from segnn_ase.base import figures
from segnn_ase.base.errors import ConfigError
from segnn_ase.md.analysis import plot_run, radial_distribution

FILES = {"no files": (), "log alone": ("log",), "trajectory": ("trajectory",), "all": ("log", "trajectory", "restart")}
NAMES = {"log": "md.csv", "trajectory": "md.xyz", "restart": "md.npz"}


@pytest.mark.parametrize("kept", FILES)
def test_energies_are_drawn_per_atom_whatever_files_there_are(kept, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "plot_energy_drift", lambda path, time, energy, *rest: drawn.append(energy))
    files = {name: str(tmp_path / NAMES[name]) for name in FILES[kept]}
    result = run(crystal(), config(steps=4, log_every=2, **files))
    plot_run(result, tmp_path / "run")
    np.testing.assert_array_equal(drawn[0], result.log["total"] / 32)


def test_pairs_without_a_trajectory_are_refused_before_anything_is_drawn(tmp_path):
    result = run(crystal(), config(steps=2))
    with pytest.raises(ConfigError, match=r"pairs is \['Cu-Cu'\]; expected none for a run without a trajectory"):
        plot_run(result, tmp_path / "run", pairs=["Cu-Cu"])
    assert not list(tmp_path.iterdir())


def test_a_run_of_no_steps_is_drawn_too(tmp_path):
    result = run(crystal(), config(tmp_path, steps=0))
    assert np.isnan(result.energy_slope) and np.isnan(result.ms_per_step)
    written = plot_run(result, tmp_path / "run", pairs=["Cu-Cu"])
    assert [path.name for path in written] == ["run_energy.png", "run_rdf.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_pairs_that_cannot_be_are_refused_before_anything_is_drawn(tmp_path):
    result = run(trimer(), config(steps=1, trajectory=str(tmp_path / "md.traj")))
    for pairs, message in ((["Cu-Cu"], "needs three periodic directions"), ("Cu-Cu", "expected a list")):
        with pytest.raises(ConfigError, match=message):
            plot_run(result, tmp_path / "run", pairs=pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["md.traj"]


def test_a_pair_that_is_named_twice_counts_once():
    once, twice = (radial_distribution(crystal(), pairs, 4.0)["Cu-Cu"][1] for pairs in (["Cu-Cu"], ["Cu-Cu"] * 2))
    np.testing.assert_array_equal(once, twice)
    assert radial_distribution(crystal(), [], 4.0) == {}
