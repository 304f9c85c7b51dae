"""The table of ensembles: a new one is one row, from the settings to the restart file and the command line."""

import numpy as np
import pytest
from ase import units
from ase.io import write
from ase.md.andersen import Andersen
from helpers.command_line import segnn
from helpers.dynamics import Morse, config, contents, crystal, run, state

from segnn_ase.base.errors import ConfigError
from segnn_ase.md.ensembles import ENSEMBLES, Ensemble, readers
from segnn_ase.md.settings import MDConfig


class Counting(Andersen):
    """ASE's Andersen thermostat, which gets weaker with every step: there is something to remember."""

    done = 0

    def step(self, *arguments):
        self.done += 1
        self.set_andersen_prob(0.1 / self.done)
        return super().step(*arguments)


def make_andersen(atoms, config, rng, dof):
    heat = {"temperature_K": config.temperature, "andersen_prob": 0.1, "rng": rng}
    return Counting(atoms, config.timestep * units.fs, fixcm=False, **heat)


@pytest.fixture
def andersen(monkeypatch):
    row = Ensemble(
        "collisions", make_andersen, ("tdamp",), state=lambda config: ("done",), centre_moves=True, constraints=False
    )
    monkeypatch.setitem(ENSEMBLES, "andersen", row)


def test_a_new_row_is_validated():
    with pytest.raises(ConfigError, match="'ensemble' is 'andersen': expected one of nve, langevin, bussi, nhc, npt"):
        MDConfig(ensemble="andersen")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tdamp": 4}, "tdamp is 4.0 fs; expected at least 10 time steps"),
        ({"pressure": 1}, "pressure is 1.0 GPa, but ensemble 'andersen' has none: use 'npt'"),
        ({"max_energy_drift": 1}, "ensemble 'andersen' conserves no energy"),
    ],
)
def test_the_row_says_which_settings_are_valid(andersen, settings, message):
    with pytest.raises(ConfigError, match=message):
        MDConfig(ensemble="andersen", **settings)


def test_a_new_row_runs_and_goes_on_to_the_same_bits(andersen, tmp_path):
    whole, parts = (config(tmp_path / name, ensemble="andersen", steps=12, save_every=1) for name in ("whole", "parts"))
    expected = run(uninterrupted := crystal(), whole)
    run(crystal(), parts.model_copy(update={"steps": 5}))
    run(resumed := crystal(), parts)
    assert state(resumed) == state(uninterrupted) and contents(parts) == contents(whole)
    assert np.isnan(expected.log["conserved"]).all()
    hot = 3 * 32 * units.kB / 2  # all 3N degrees of freedom: the centre of mass moves
    np.testing.assert_allclose(expected.log["kinetic"], hot * expected.log["temperature"])


def test_a_new_row_is_an_option_of_the_command_line(andersen, tmp_path, monkeypatch):
    monkeypatch.setattr("segnn_ase.calculator.SEGNNCalculator", lambda *models, **options: Morse())
    write(tmp_path / "start.xyz", crystal())
    line = ["md", tmp_path / "start.xyz", "--model", "any", "--ensemble", "andersen", "--log-every", 1]
    for name, steps in (("whole", [6]), ("parts", [2, 6])):
        for number in steps:
            result = segnn(*line, "--out", tmp_path / name, "--steps", number)
            assert result.exit_code == 0, result.output
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_help_texts_tell_the_ensembles_and_their_settings():
    fields = MDConfig.model_fields
    for name, row in ENSEMBLES.items():
        assert f"{name}: {row.about}" in fields["ensemble"].description
        for setting in row.reads:
            assert fields[setting].description.endswith(f"; {readers(setting)}") and name in readers(setting)


def test_rescaling_needs_velocities(tmp_path):
    with pytest.raises(ConfigError, match="momenta of atoms are zero, which 'bussi' cannot scale"):
        run(crystal(), config(tmp_path, ensemble="bussi", velocities="keep"))
    assert not list(tmp_path.iterdir())


def test_one_default_in_both(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("segnn_ase.md.run.run_md", lambda atoms, config, **options: seen.append(config) or 1 / 0)
    monkeypatch.setattr("segnn_ase.calculator.SEGNNCalculator", lambda *models, **options: Morse())
    write(tmp_path / "start.xyz", crystal())
    segnn("md", tmp_path / "start.xyz", "--model", "any")
    names = {"log": "md.csv", "trajectory": "md.xyz", "restart": "md.npz"}
    assert seen == [MDConfig(**names)] and seen[0].ensemble == "langevin"
