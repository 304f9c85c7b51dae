"""A potential that learns further elements: what it knew stays as it was, to the last digits."""

import pytest
import torch
from ase import Atoms
from helpers.potentials import uncalibrated_potential
from helpers.systems import CUTOFF

from segnn_ase.base.errors import ConfigError
from segnn_ase.model.more_elements import nearest_element, period_and_group, with_more_elements
from segnn_ase.model.predict import predict
from segnn_ase.structure.graph import graph_from_atoms


@pytest.mark.parametrize("begin", ["nearest", "fresh"])
def test_known_elements_keep_their_energies_and_forces(begin):
    potential = uncalibrated_potential().double()
    known = Atoms("OH2", [[0, 0, 0], [0.8, 0.6, 0], [-0.8, 0.6, 0.1]])
    known.numbers[0] = max(z for z in potential.species if z < 10)
    graph = graph_from_atoms(known, potential.cutoff)
    before = predict(potential, graph)
    grown = with_more_elements(potential, [16, 42], begin=begin, scale=2.0)
    after = predict(grown, graph)
    assert grown.species == [*potential.species, 16, 42]
    assert float(after.energy) == pytest.approx(float(before.energy), abs=1e-12)
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-12)
    assert grown.scales[-1] == (2.0 if begin == "fresh" else potential.scales[-1]) and grown.dtype == potential.dtype


def test_a_new_element_begins_like_the_nearest_one_or_at_random():
    potential = uncalibrated_potential().double()
    nearest = nearest_element(16, potential.species)
    assert nearest == 8
    as_oxygen, as_sulfur = Atoms("OH", [[0, 0, 0], [1.5, 0, 0]]), Atoms("SH", [[0, 0, 0], [1.5, 0, 0]])
    for begin, same in (("nearest", True), ("fresh", False)):
        grown = with_more_elements(potential, [16], begin=begin)
        a, b = (predict(grown, graph_from_atoms(atoms, CUTOFF)).forces for atoms in (as_oxygen, as_sulfur))
        assert torch.allclose(a, b, atol=1e-12) == same
    assert float(grown.core_radii[-1, -1]) == pytest.approx(2 * 1.05)  # its own covalent radius


@pytest.mark.parametrize(
    "z, expected",
    [(1, (1, 1)), (2, (1, 18)), (7, (2, 15)), (14, (3, 14)), (29, (4, 11)), (42, (5, 6)), (57, (6, 3)), (79, (6, 11))],
)
def test_periods_and_groups(z, expected):
    assert period_and_group(z) == expected


@pytest.mark.parametrize("z, expected", [(9, 8), (14, 6), (16, 8), (11, 1), (7, 6)])
def test_the_nearest_of_hydrogen_carbon_and_oxygen(z, expected):
    assert nearest_element(z, [1, 6, 8]) == expected


def test_another_beginning_is_refused():
    with pytest.raises(ConfigError, match="begin is 'zero'; expected 'nearest' or 'fresh'"):
        with_more_elements(uncalibrated_potential(), [16], begin="zero")
