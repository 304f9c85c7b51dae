"""A crystal that loops learn, and trainings of their rounds that are short."""

import pytest
from ase.build import bulk
from helpers.trainings import leave_out_plots


@pytest.fixture
def crystal():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.02, seed=0)
    return atoms


@pytest.fixture
def few_epochs(monkeypatch):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (2, 2))
    leave_out_plots(monkeypatch)
