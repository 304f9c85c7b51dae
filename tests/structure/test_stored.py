"""Structures that a potential stores of its training: the same again, few enough, from all of the set."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from segnn_ase.structure.stored import MOST, MOST_ATOMS, evenly, parse_stored, stored


def some(n: int) -> list:
    images = []
    for k in range(n):
        atoms = molecule("H2O") if k % 2 else bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=k)
        images.append(atoms)
    return images


def test_they_come_back_to_the_digits_of_single_precision():
    images = some(5)
    kept = stored(images)
    for atoms, again in zip(images, parse_stored(kept._asdict(), [1, 8, 29]).atoms(), strict=True):
        assert again.numbers.tolist() == atoms.numbers.tolist() and again.pbc.tolist() == atoms.pbc.tolist()
        np.testing.assert_allclose(again.positions, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(again.cell.array, atoms.cell.array, atol=1e-6)


def test_of_many_they_are_taken_from_first_to_last():
    images = [molecule("H2O") for _ in range(1000)]
    for k, atoms in enumerate(images):
        atoms.positions[0, 0] = k
    found = [float(atoms.positions[0, 0]) for atoms in stored(images).atoms()]
    assert len(found) == MOST and found == sorted(found) and found[0] < 16 and found[-1] > 984
    assert evenly([1, 2, 3], 5) == [1, 2, 3] and evenly([], 5) == []


def test_large_ones_are_fewer():
    assert len(stored([bulk("Cu", cubic=True).repeat(6)] * 50).atoms()) == MOST_ATOMS // 864
    assert stored([bulk("Cu", cubic=True).repeat(13)] * 3) is None and stored([]) is None


@pytest.mark.parametrize("place", [0, 50, 100])
@pytest.mark.parametrize("repeat", [12, 13])  # with 6912 and 8788 atoms
def test_a_giant_takes_the_place_of_no_others(place, repeat):
    images = [bulk("Cu", cubic=True).repeat((5, 1, 1)) for _ in range(100)]
    images.insert(place, bulk("Cu", cubic=True).repeat(repeat))
    sizes = [len(atoms) for atoms in stored(images).atoms()]
    assert sizes == [20] * MOST


def test_of_a_fine_tuning_half_are_the_old_ones():
    old = stored([molecule("H2O")] * 100)
    for new, expected in ((500, MOST // 2), (10, 10)):
        both = stored([bulk("Cu", cubic=True)] * new, old).atoms()
        assert len(both) == MOST and sum(atoms.numbers[0] == 29 for atoms in both) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": torch.tensor([3, 5])}, "expected 7 atoms in all"),
        ({"positions": torch.zeros(6, 3)}, "positions of the stored structures"),
        ({"cells": torch.full((2, 3, 3), torch.nan)}, "cells of the stored structures"),
        ({"numbers": torch.zeros(7)}, "numbers of the stored structures"),
        ({"numbers": torch.full((7,), 79, dtype=torch.uint8)}, "elements that are not of the potential"),
    ],
)
def test_what_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_stored({**stored(some(2))._asdict(), **change}, [1, 8, 29])
