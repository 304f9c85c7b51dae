"""The compiled gradient of a loss against autograd through plain PyTorch, and the guard that lets it be used."""

import pytest
import torch
from helpers.potentials import ODD, VARIANTS, odd_potential
from helpers.systems import CUTOFF, NAMED

from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled import cpu_training
from segnn_ase.compiled.choose import accelerate_training
from segnn_ase.compiled.cpu_training import TrainingEngine
from segnn_ase.compiled.passes import supported
from segnn_ase.model.predict import assemble, predict
from segnn_ase.structure.graph import collate, edge_vectors, graph_from_atoms, with_pairs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ONE_BLOCK = [v for v in VARIANTS if v not in ("uneven", "parities", "segnn2022")]


def batch(names=NAMED):
    return collate([with_pairs(graph_from_atoms(NAMED[name](), CUTOFF)) for name in names])


def loss_of(p) -> torch.Tensor:
    """Of everything that can be trained on; smooth, and with a gradient of its own for each atom."""
    weights = torch.linspace(0.5, 1.5, len(p.energies), dtype=torch.float64)
    stress = p.stress.nan_to_num()
    return (weights * p.energies).square().mean() + (p.forces - 0.1).square().mean() + 10 * stress.square().sum()


def by_autograd(potential, graph) -> tuple[float, dict]:
    potential.train().requires_grad_(True)
    potential.zero_grad(set_to_none=True)
    loss = loss_of(predict(potential, graph, stress=True))
    loss.backward()
    return float(loss.detach()), gradients(potential)


def by_engine(engine, graph) -> tuple[float, dict]:
    engine.potential.zero_grad(set_to_none=True)
    vectors = edge_vectors(graph)
    loss = engine.step(graph, lambda e, g: loss_of(assemble(graph, vectors, e, g, None, forces=True, stress=True)))
    return float(loss), gradients(engine.potential)


def gradients(potential) -> dict:
    return {name: w.grad.clone() for name, w in potential.named_parameters() if w.grad is not None and w.numel()}


def assert_same(found: tuple[float, dict], expected: tuple[float, dict], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, g in expected[1].items():
        assert (found[1][name] - g).abs().max() <= tolerance * max(float(g.abs().max()), 1e-3 * largest), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", ONE_BLOCK)
def test_gradient_of_a_loss_equals_autograd(variant, dtype, new_potential):
    potential, graph = new_potential(variant, dtype), batch()
    expected = by_autograd(potential, graph)
    assert_same(by_engine(TrainingEngine(potential), graph), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ODD)
def test_gradient_of_a_loss_equals_autograd_for_odd_settings(name):
    potential, graph = odd_potential(name), batch()
    expected = by_autograd(potential, graph)
    assert_same(by_engine(TrainingEngine(potential), graph), expected, 1e-10)


def test_weights_that_have_changed_and_batches_that_grow_and_shrink(new_potential):
    potential = new_potential("segnn")
    potential.train().requires_grad_(True)
    engine = TrainingEngine(potential)
    for names in (["water"], ["copper", "ethanol"], list(NAMED), ["ethanol"], ["one_atom", "water"]):
        graph = batch(names)
        assert_same(by_engine(engine, graph), by_autograd(potential, graph), 1e-10)
        with torch.no_grad():
            for w in potential.parameters():
                w += 0.05 * torch.randn_like(w)


def test_frozen_weights_get_no_gradient(new_potential):
    potential = new_potential("fast")
    potential.train().requires_grad_(True)
    potential.segnn.embedding.requires_grad_(False)
    found = by_engine(TrainingEngine(potential), batch(["ethanol"]))[1]
    assert found and not [name for name in found if name.startswith("segnn.embedding")]


@pytest.mark.parametrize("variant", ["uneven", "segnn2022"])
def test_other_networks_are_trained_layer_by_layer(variant, new_potential):
    potential = new_potential(variant)
    potential.requires_grad_(True)
    assert not supported(potential) and accelerate_training(potential, batch(["ethanol"])) is None


def test_the_guard_lets_it_through_and_stops_a_wrong_one(new_potential, monkeypatch):
    potential, graph = new_potential("fast"), batch(["ethanol"])
    potential.requires_grad_(True)
    assert accelerate_training(potential, graph, "off") is None
    assert isinstance(accelerate_training(potential, graph, "require"), TrainingEngine)
    original = cpu_training.TrainingEngine._product

    def short(self, role, step):
        made = original(self, role, step)
        for c in made:
            if role == "mu" and c.matrix[7] == 1:
                c.matrix[2] -= 1  # the last channel is left out
        return made

    monkeypatch.setattr(cpu_training.TrainingEngine, "_product", short)
    with pytest.warns(AccelerationWarning, match="layer by layer: gradient of the loss differ"):
        assert accelerate_training(potential, graph) is None
    assert potential.segnn.fused  # the layers were right
    with pytest.raises(AccelerationError, match="layer by layer"):
        accelerate_training(potential, graph, "require")
