"""Which model of a training is kept: `segnn_ase.train.selection`."""

import math

import numpy as np
import pytest

from segnn_ase.train.resume import Progress
from segnn_ase.train.selection import better, keep, no_worse
from segnn_ase.train.settings import OptimConfig

RNG = np.random.default_rng(0)
LOSSES = RNG.uniform(0.5, 1.5, size=40)
FIRST = np.arange(40) == 0


@pytest.mark.parametrize(
    "losses, kept",
    [
        (0.9 * LOSSES, True),
        (LOSSES, True),
        (1.2 * LOSSES, False),  # all are higher
        (LOSSES + 0.1 * RNG.normal(size=40), True),
        (LOSSES + 10.0 * FIRST - 0.001, True),  # only the oddest is
        (LOSSES + 100.0 * FIRST - 0.001, False),  # by too much
        (np.where(LOSSES > 0.6, LOSSES, math.nan), False),
        (np.full(40, math.inf), False),
    ],
)
def test_a_model_is_worse_where_its_losses_are_surely_higher(losses, kept):
    assert no_worse(losses, LOSSES) == kept


def test_few_structures_cannot_tell():
    assert no_worse(np.array([1.9, 1.9]), np.array([1.0, 1.0])) and not no_worse(np.array([2.1]), np.array([1.0]))
    assert no_worse(np.zeros(3), np.zeros(3))


def test_what_is_kept_does_not_creep_upwards():
    settings, done, kept = OptimConfig(), Progress(), []
    for loss in (math.nan, 2.0, 1.0, 1.9, 1.95, 2.1, 0.9, math.nan):
        losses = np.array([loss, loss])
        kept.append(better({"survived": None}, losses, done, settings))
        if kept[-1]:
            keep({"survived": None}, losses, done, settings)
    assert kept == [False, True, True, True, True, False, True, False] and done.losses == [0.9, 0.9]


def test_until_a_rollout_has_been_losses_decide():
    settings, done = OptimConfig(select="stability"), Progress()
    for survived, loss, kept in [(None, 2.0, True), (None, 9.0, False), (0.1, 9.0, True), (None, 1.0, False)]:
        losses = np.full(40, loss)
        assert better({"survived": survived}, losses, done, settings) == kept
        if kept:
            keep({"survived": survived}, losses, done, settings)
    assert (done.survived, done.losses[0]) == (0.1, 9.0)
