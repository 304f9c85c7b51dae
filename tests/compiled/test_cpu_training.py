"""The compiled gradient of a loss against autograd through plain PyTorch, and the guard that lets it be used."""

import pytest
import torch
from helpers.potentials import LAYERS_ONLY, ODD_CASES, VARIANTS, in_two_precisions, odd_potential
from helpers.systems import CUTOFF, NAMED, squeezed

from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled import c_steps, choose, cpu, kernels
from segnn_ase.compiled.choose import choose_loss_gradient
from segnn_ase.compiled.cpu_training import CpuLossGradient
from segnn_ase.compiled.layers import FUSED
from segnn_ase.compiled.runtime import Op
from segnn_ase.model.predict import PlainLossGradient
from segnn_ase.structure.graph import collate, graph_from_atoms, with_pairs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
KNOWN = [v for v in VARIANTS if v not in LAYERS_ONLY]


def batch(names=NAMED):
    return collate([with_pairs(graph_from_atoms(NAMED[name](), CUTOFF)) for name in names])


def loss_of(p) -> torch.Tensor:
    """Of everything that can be trained on; smooth, and with a gradient of its own for each atom."""
    weights = torch.linspace(0.5, 1.5, len(p.energies), dtype=torch.float64)
    stress = p.stress.nan_to_num()
    return (weights * p.energies).square().mean() + (p.forces - 0.1).square().mean() + 10 * stress.square().sum()


def gradients_by(make, potential, graph) -> tuple[float, dict]:
    """The loss, and its gradient with respect to every weight."""
    potential.train().requires_grad_(True) if make is PlainLossGradient else None
    potential.zero_grad(set_to_none=True)
    loss = make(potential)(graph, loss_of, forces=True, stress=True)
    return float(loss), gradients(potential)


def gradients(potential) -> dict:
    return {name: w.grad.clone() for name, w in potential.named_parameters() if w.grad is not None and w.numel()}


def assert_same(found: tuple[float, dict], expected: tuple[float, dict], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, g in expected[1].items():
        assert (found[1][name] - g).abs().max() <= tolerance * max(float(g.abs().max()), 1e-3 * largest), name


@pytest.mark.parametrize(("variant", "dtype"), in_two_precisions(KNOWN))
def test_gradient_of_a_loss_equals_autograd(variant, dtype, new_potential):
    potential, graph = new_potential(variant, dtype), batch()
    expected = gradients_by(PlainLossGradient, potential, graph)
    assert_same(gradients_by(CpuLossGradient, potential, graph), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("variant", KNOWN)
def test_the_gradient_of_a_loss_agrees_in_the_core(variant, new_potential):
    potential, graph = new_potential(variant), collate([with_pairs(graph_from_atoms(a, CUTOFF)) for a in squeezed()])
    expected = gradients_by(PlainLossGradient, potential, graph)
    assert_same(gradients_by(CpuLossGradient, potential, graph), expected, 1e-9)


@pytest.mark.parametrize("name", ODD_CASES)
def test_gradient_of_a_loss_equals_autograd_for_odd_settings(name):
    potential, graph = odd_potential(name), batch()
    expected = gradients_by(PlainLossGradient, potential, graph)
    assert_same(gradients_by(CpuLossGradient, potential, graph), expected, 1e-10)


def test_a_loss_of_energies_alone(new_potential):
    potential, graph = new_potential("fast"), batch(["ethanol", "water"])
    potential.train().requires_grad_(True)
    found = []
    for make in (PlainLossGradient, CpuLossGradient):
        potential.zero_grad(set_to_none=True)
        loss = make(potential)(graph, lambda p: p.energies.square().mean(), forces=False, stress=False)
        found.append((float(loss), gradients(potential)))
    assert_same(found[1], found[0], 1e-10)


def test_weights_that_have_changed_and_batches_that_grow_and_shrink(new_potential):
    potential = new_potential("segnn").train().requires_grad_(True)
    made = CpuLossGradient(potential)
    for names in (["water"], ["copper", "ethanol"], list(NAMED), ["ethanol"], ["one_atom", "water"]):
        graph = batch(names)
        expected = gradients_by(PlainLossGradient, potential, graph)
        assert_same(gradients_by(lambda _: made, potential, graph), expected, 1e-10)
        with torch.no_grad():
            for w in potential.parameters():
                w += 0.05 * torch.randn_like(w)


def test_frozen_weights_get_no_gradient(new_potential):
    potential = new_potential("fast").train().requires_grad_(True)
    potential.segnn.embedding.requires_grad_(False)
    found = gradients_by(CpuLossGradient, potential, batch(["ethanol"]))[1]
    assert found and not [name for name in found if name.startswith("segnn.embedding")]


@pytest.mark.parametrize("variant", LAYERS_ONLY)
def test_other_networks_are_trained_layer_by_layer(variant, new_potential):
    potential = new_potential(variant).requires_grad_(True)
    assert choose_loss_gradient(potential, batch(["ethanol"]), "require").name == "compiled layers"


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("variant", KNOWN)
def test_threads_share_the_gradient_of_a_loss(variant, threads, new_potential, monkeypatch):
    """Also where a thread has no receivers, and where there are fewer than when it was made."""
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    potential, graph = new_potential(variant), batch()
    expected = gradients_by(PlainLossGradient, potential, graph)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradient = CpuLossGradient(potential)
        for _ in range(2):
            assert_same(gradients_by(lambda _: gradient, potential, graph), expected, 1e-10)
        torch.set_num_threads(threads - 1)
        assert_same(gradients_by(lambda _: gradient, potential, graph), expected, 1e-10)
    finally:
        torch.set_num_threads(before)


def test_the_guard_lets_it_through_and_stops_a_wrong_one(new_potential, monkeypatch):
    potential, graph = new_potential("fast").requires_grad_(True), batch(["ethanol"])
    assert isinstance(choose_loss_gradient(potential, graph, "off"), PlainLossGradient)
    assert isinstance(choose_loss_gradient(potential, graph, "require"), CpuLossGradient)
    original = c_steps._weight_gradient

    def short(*given):
        step = original(*given)
        if step.numbers["op"] is Op.WEIGHT_GRADIENT:
            step.numbers["outer"] -= 1  # the last channel is left out
        return step

    monkeypatch.setattr(c_steps, "_weight_gradient", short)
    with pytest.warns(AccelerationWarning, match=r"gradient of the loss: gradients of .* differ"):
        assert choose_loss_gradient(potential, graph).name == "compiled layers"  # they were right
    with pytest.raises(AccelerationError, match=r"gradients of .* differ"):
        choose_loss_gradient(potential, graph, "require")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fast", pytest.param("segnn", marks=pytest.mark.proof)])
def test_a_gradient_that_is_zero_is_noticed_for_each_weight(variant, new_potential, monkeypatch):
    """Whatever the weight, however small its gradient beside the others."""
    potential, graph = new_potential(variant).requires_grad_(True), batch(["ethanol"])
    names = [name for name, w in potential.named_parameters() if w.numel()]
    made = choose.CpuLossGradient
    unused = []
    for name in names:

        def zeroed(owner, name=name):
            gradient = made(owner)

            def run(*args, **keywords):
                loss = gradient(*args, **keywords)
                grad = dict(owner.named_parameters())[name].grad
                if grad is None or not bool(grad.any()):
                    unused.append(name)
                else:
                    grad.zero_()
                return loss

            return run

        problem = choose._training_problem(zeroed, potential, graph)
        assert (problem is None) == (name in unused), name
    last = f"segnn.updates.{potential.config.interactions - 1}.second.weights."
    assert set(unused) <= {f"{last}1", f"{last}2"}  # of the last features only the scalars are read


def test_a_failure_in_the_guard_leaves_nothing_changed(new_potential, monkeypatch):
    potential, graph = new_potential("fast").requires_grad_(True).train(), batch(["ethanol"])
    before = {name: w.detach().clone() for name, w in potential.state_dict().items()}
    monkeypatch.setattr(cpu.CpuPasses, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose_loss_gradient(potential, graph)
    assert potential.training and potential.config.core_repulsion
    assert all(w.grad is None and w.requires_grad for w in potential.parameters())
    assert all(torch.equal(before[name], w) for name, w in potential.state_dict().items())
    plain = PlainLossGradient(potential, FUSED)
    assert float(plain(graph, loss_of, forces=True, stress=True)) > 0
