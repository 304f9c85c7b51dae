"""SOAP: `segnn_ase.train.optimizers`, against its definition."""

import copy

import pytest
import torch

from segnn_ase.train import optimizers
from segnn_ase.train.optimizers import EPSILON, Soap, matrix_shape

SETTINGS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "every": 3}


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(optimizer: Soap, weights: list[torch.Tensor], steps: range, rate: float = 0.01) -> None:
    for step in steps:
        for weight, gradient in zip(weights, tensors(*(w.shape for w in weights), seed=step), strict=True):
            weight.grad = gradient
        optimizer.step(rate)


def test_shapes_of_matrices():
    shapes = [(), (5,), (5, 1), (2, 3, 4), (6, 4)]
    assert [matrix_shape(torch.zeros(s)) for s in shapes] == [(1, 1), (1, 5), (1, 5), (6, 4), (6, 4)]


def test_without_bases_it_is_adamw(monkeypatch):
    """The first gradient only starts the bases, so that Adam begins with the second."""
    monkeypatch.setattr(optimizers, "LONGEST_SIDE", 1)
    weights = tensors((4, 3), (4, 3), (2, 5), (7,))
    others = [w.clone() for w in weights]
    run(Soap(weights, **SETTINGS), weights, range(1, 9))
    adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-300)
    for step in range(2, 9):
        for weight, gradient in zip(others, tensors(*(w.shape for w in others), seed=step), strict=True):
            weight.grad = gradient
        adam.step()
    for weight, other in zip(weights, others, strict=True):
        assert torch.allclose(weight, other, rtol=0, atol=1e-6)


def test_a_step_is_that_of_the_definition():
    """Algorithm 3 of arXiv 2409.11321 for one matrix, written out, with exact eigenvectors at every step."""
    (weight,) = tensors((4, 3))
    mine = weight.clone()
    optimizer = Soap([mine], betas=(0.9, 0.95), weight_decay=0.0, every=10**9)
    G = tensors((4, 3), seed=1)[0]
    left, right = (torch.linalg.eigh(x)[1].flip(-1) for x in (G @ G.T, G.T @ G))
    first = second = torch.zeros(4, 3, dtype=torch.float64)
    run(optimizer, [mine], range(1, 6), rate=0.1)
    for step in range(2, 6):
        turned = left.T @ tensors((4, 3), seed=step)[0] @ right
        first, second = 0.9 * first + 0.1 * turned, 0.95 * second + 0.05 * turned**2
        n = step - 1
        update = (first / (1 - 0.9**n)) / ((second / (1 - 0.95**n)).sqrt() + EPSILON)
        weight -= 0.1 * left @ update @ right.T
    assert torch.allclose(mine, weight, atol=1e-12)


def test_the_bases_become_the_eigenvectors():
    """Of gradients with a covariance that stays the same."""
    generator = torch.Generator().manual_seed(0)
    A, B = tensors((6, 6), (4, 4), seed=9)
    (weight,) = tensors((6, 4))
    optimizer = Soap([weight], betas=(0.9, 0.999), weight_decay=0.0, every=1)
    for _ in range(3000):
        weight.grad = A @ torch.randn(6, 4, generator=generator, dtype=torch.float64) @ B
        optimizer.step(0.0)
    state = optimizer.stacks[0].state
    for side in ("left", "right"):
        Q, mean = state[f"{side}_basis"][0], state[f"{side}_mean"][0]
        turned = Q.T @ mean @ Q
        values = turned.diagonal()
        assert torch.allclose(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-12)
        assert (values[:-1] >= values[1:]).all()
        assert (turned - values.diag()).abs().max() < 0.03 * values.max()


def test_it_minimises_what_adam_finds_hard():
    """A quadratic form in a matrix with a condition of 1e6 along turned axes."""
    U, V = (torch.linalg.qr(x)[0] for x in tensors((8, 8), (8, 8), seed=3))
    scale = torch.logspace(0, -3, 8, dtype=torch.float64)
    left, right = U * scale @ U.T, V * scale @ V.T

    def final(preconditioned: bool) -> float:
        (weight,) = tensors((8, 8), seed=4)
        weight.requires_grad_()
        optimizer = Soap([weight], betas=(0.95, 0.95), weight_decay=0.0, every=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizers, "LONGEST_SIDE", 8 if preconditioned else 1)
            for step in range(400):
                weight.grad = None
                loss = (left @ weight @ right).square().sum()
                loss.backward()
                optimizer.step(0.03 * (1 - step / 400))
        return loss.item()

    assert final(True) < 0.2 * final(False)


def test_a_gradient_of_which_lapack_has_no_eigenvectors_in_single_precision():
    gradient = torch.tensor([4, 32, -2, 16, -2, 1, -32, 1, -2, -2, -8, 0, -1, 8, 0, -8]) * 2.0**-43
    weight = torch.zeros(16)
    optimizer = Soap([weight], betas=(0.95, 0.95), weight_decay=0.0, every=2)
    for _ in range(10):
        weight.grad = gradient
        optimizer.step(0.01)
    assert bool(weight.isfinite().all()) and float(weight @ gradient) < 0


def test_weights_of_one_shape_do_not_mix():
    together = tensors((4, 3), (4, 3), (4, 3))
    alone = copy.deepcopy(together)
    run(Soap(together, **SETTINGS), together, range(1, 12))
    for n, weight in enumerate(alone):
        optimizer = Soap([weight], **SETTINGS)
        for step in range(1, 12):
            weight.grad = tensors((4, 3), (4, 3), (4, 3), seed=step)[n]
            optimizer.step(0.01)
        assert torch.allclose(weight, together[n], atol=1e-10)


def test_a_weight_without_gradient_stays():
    weights = tensors((4, 3), (4, 3), (4, 3))
    before = [w.clone() for w in weights]
    optimizer = Soap(weights, betas=(0.9, 0.95), weight_decay=0.1, every=2)
    for step in range(1, 6):
        weights[0].grad = weights[2].grad = tensors((4, 3), seed=step)[0]
        optimizer.step(0.01)
    assert [torch.equal(*pair) for pair in zip(weights, before, strict=True)] == [False, True, False]
    others = tensors((4, 3), (4, 3), (4, 3))
    again = Soap(others, betas=(0.9, 0.95), weight_decay=0.1, every=2)
    again.load_state_dict(optimizer.state_dict())
    assert again.used == [0, 2] and len(again.stacks) == 1


def test_it_goes_on_from_its_state_with_the_same_bits():
    weights = tensors((4, 3), (5,), (2, 3, 4))
    optimizer = Soap(weights, **SETTINGS)
    run(optimizer, weights, range(1, 8))
    others, state = [w.clone() for w in weights], copy.deepcopy(optimizer.state_dict())
    again = Soap(others, **SETTINGS)
    again.load_state_dict(state)
    run(optimizer, weights, range(8, 15)), run(again, others, range(8, 15))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_the_state_of_others_is_refused():
    def started(*shapes: tuple[int, ...]) -> Soap:
        weights = tensors(*shapes)
        optimizer = Soap(weights, **SETTINGS)
        run(optimizer, weights, range(1, 2))
        return optimizer

    for shapes in ([(3, 4)], [(4, 3), (4, 3)], [(4, 3), (5,)], [(4, 3, 1)]):
        with pytest.raises((ValueError, LookupError)):
            Soap(tensors((4, 3)), **SETTINGS).load_state_dict(started(*shapes).state_dict())
