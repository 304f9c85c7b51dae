"""Pictures of steerable features turn with the structure, and are drawn for any potential that has some."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from helpers.systems import rotation

from segnn_ase.base.errors import ConfigError, StructureError
from segnn_ase.drawing import draw_features, functions_of, sphere, steerable_features
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config


def potential(preset="segnn", **changes):
    return Potential(model_config(preset, **changes), [1, 6, 8]).double().eval()


@pytest.mark.parametrize("mirrored", [False, True])
def test_functions_turn_with_the_structure(mirrored):
    atoms, model = molecule("CH3CHO"), potential(hidden_irreps="4x0e+4x1o+4x1e+4x2e")
    matrix = rotation(2) * (-1 if mirrored else 1)
    before = functions_of({l: x[:, :, 1] for l, x in steerable_features(model, atoms, 2).items()}, sphere())
    atoms.positions = atoms.positions @ matrix.T
    after = functions_of({l: x[:, :, 1] for l, x in steerable_features(model, atoms, 2).items()}, sphere() @ matrix.T)
    np.testing.assert_allclose(after, before, atol=1e-10)
    assert np.ptp(before, axis=(1, 2)).min() > 1e-6


def test_a_function_is_the_sum_of_its_harmonics():
    features = {0: torch.tensor([[2.0]]).double(), 1: torch.tensor([[0.0, 0.0, 1.0]]).double()}
    found = functions_of(features, np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[2 + 3**0.5, 2.0]])


def test_the_channel_with_most_direction_is_drawn(tmp_path):
    atoms, model = molecule("CH3CHO"), potential()
    channel = draw_features(model, atoms, tmp_path / "f.png")
    power = sum(x.square().sum((0, 1)) for l, x in steerable_features(model, atoms, 2).items() if l)
    assert channel == int(power.argmax()) and (tmp_path / "f.png").stat().st_size > 10_000
    assert draw_features("acetylacetone-pbe", atoms, tmp_path / "g.svg", channel=3, interaction=1) == 3


def test_what_cannot_be_drawn_is_refused(tmp_path):
    atoms, out = molecule("CH3CHO"), tmp_path / "f.png"
    for keywords, name in (({"channel": 64}, "channel is 64"), ({"interaction": 3}, "interaction is 3")):
        with pytest.raises(ConfigError, match=name):
            draw_features(potential(), atoms, out, **keywords)
    with pytest.raises(ConfigError, match="expected hidden_irreps with 1o"):
        draw_features(potential("egnn"), atoms, out)
    with pytest.raises(StructureError, match="Si"):
        draw_features(potential(), Atoms("Si"), out)
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        draw_features(potential(), atoms, tmp_path / "f.gif")
    assert not list(tmp_path.iterdir())
