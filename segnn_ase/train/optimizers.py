"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321, algorithm 3).

A weight matrix W (m, n) with gradient G has the running means L of G Gᵀ (m, m) and R of Gᵀ G (n, n). Adam runs on
Q_Lᵀ G Q_R, where the columns of Q are (nearly) eigenvectors of L and R; its update is turned back. Sides longer than
`LONGEST_SIDE` and vectors are left as they are: there it is Adam. Weights of one shape are stacked, so that a step is a
few products of batches, also on a GPU, where each launch costs as much as the product of small matrices.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

LONGEST_SIDE = 512
REMEMBERED = 4  # steps between gradients that enter the means, which change slowly
EPSILON = 1e-8
# of the traces of L and R, added to them: what has no gradient keeps its direction, which rounding would choose; in
# single precision it is rounding of about this size that decides
RIDGE = {torch.float64: 1e-8}


class Soap:
    """Steps for weights, in place; with the same weights, gradients and state it makes the same bits on one thread.

    Weights without a gradient at the first step stay as they are: nothing depends on them, as on what makes vectors
    that no readout sees.
    """

    def __init__(self, weights: list[Tensor], *, betas: tuple[float, float], weight_decay: float, every: int):
        self.weights, self.betas, self.weight_decay, self.every = weights, betas, weight_decay, every
        self.used: list[int] = []
        self.stacks: list[Stack] = []
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the weights along their gradients, rate: of Adam. The first call only starts the bases."""
        if not self.steps:
            self._start([n for n, weight in enumerate(self.weights) if weight.grad is not None])
        self.steps += 1
        for number, stack in enumerate(self.stacks):
            gradient = stack.gradient()
            if self.steps > 1:
                stack.move(gradient, rate, self.betas, self.weight_decay, self.steps - 1)
            first, turn = self.steps == 1, self.steps + number
            if first or turn % REMEMBERED == 0:
                stack.remember(gradient, 0.0 if first else self.betas[1])
            if first or turn % self.every == 0:
                stack.turn(exactly=first)

    def _start(self, used: list[int]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for n in used:
            by_shape[self.weights[n].shape].append(self.weights[n])
        self.used, self.stacks = used, [Stack(same) for same in by_shape.values()]

    def forget(self) -> None:
        """The direction of the last steps."""
        for stack in self.stacks:
            stack.state["first"].zero_()

    def state_dict(self) -> dict:
        return {"steps": self.steps, "used": self.used, "stacks": [stack.state for stack in self.stacks]}

    def load_state_dict(self, state: dict) -> None:
        """Raises LookupError, TypeError or ValueError for the state of other weights."""
        if state["steps"] and not state["used"]:
            raise ValueError("the optimizer's state is of no weights")
        self._start(state["used"])
        for stack, saved in zip(self.stacks, state["stacks"], strict=True):
            if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in stack.state.items()}:
                raise ValueError("the optimizer's state has other shapes than the weights")
            for name, value in saved.items():
                stack.state[name].copy_(value)
        self.steps = state["steps"]


class Stack:
    """Weights of one shape as matrices (k, m, n), with what is remembered of their gradients."""

    def __init__(self, weights: list[Tensor]):
        shape = matrix_shape(weights[0])
        self.weights, self.shape = weights, (len(weights), *shape)
        like = weights[0].detach()
        self.state = {"first": like.new_zeros(self.shape), "second": like.new_zeros(self.shape)}
        for side, size in (("left", shape[0]), ("right", shape[1])):
            if 1 < size <= LONGEST_SIDE:
                eye = torch.eye(size, dtype=like.dtype, device=like.device)
                self.state[f"{side}_mean"] = like.new_zeros(len(weights), size, size)
                self.state[f"{side}_basis"] = eye.expand(len(weights), size, size).clone()

    def gradient(self) -> Tensor:
        return torch.stack([weight.grad for weight in self.weights]).view(self.shape)

    def move(self, gradient: Tensor, rate: float, betas: tuple[float, float], decay: float, step: int) -> None:
        turned, first, second = self.into_basis(gradient), self.state["first"], self.state["second"]
        first.lerp_(turned, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(turned, turned, value=1 - betas[1])
        size = second.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(EPSILON)
        update = self.out_of_basis(first / size).view(len(self.weights), *self.weights[0].shape).unbind()
        if decay:
            torch._foreach_mul_(self.weights, 1 - rate * decay)
        torch._foreach_add_(self.weights, update, alpha=-rate / (1 - betas[0] ** step))

    def remember(self, gradient: Tensor, beta: float) -> None:
        """The running means of G Gᵀ and Gᵀ G."""
        for side, factors in (("left", (gradient, gradient.mT)), ("right", (gradient.mT, gradient))):
            if f"{side}_mean" in self.state:
                torch.baddbmm(
                    self.state[f"{side}_mean"], *factors, beta=beta, alpha=1 - beta, out=self.state[f"{side}_mean"]
                )

    def turn(self, *, exactly: bool) -> None:
        """Bring the bases nearer to the eigenvectors, by a step of orthogonal iteration, and the first moment along."""
        first = self.out_of_basis(self.state["first"])
        for side in ("left", "right"):
            if f"{side}_mean" in self.state:
                mean, basis = self.state[f"{side}_mean"], self.state[f"{side}_basis"]
                basis.copy_(eigenvectors(mean) if exactly else self.iterated(mean, basis, side))
        self.state["first"].copy_(self.into_basis(first))

    def iterated(self, mean: Tensor, basis: Tensor, side: str) -> Tensor:
        """Columns in the order of their eigenvalues, the second moments with them; then orthogonalised."""
        grown = mean @ basis + RIDGE.get(mean.dtype, 0.0) * traces(mean) * basis
        order = (basis * grown).sum(-2).argsort(-1, descending=True)
        along = order[:, :, None] if side == "left" else order[:, None, :]
        second = self.state["second"]
        second.copy_(second.gather(-2 if side == "left" else -1, along.expand_as(second)))
        return torch.linalg.qr(grown.gather(-1, order[:, None, :].expand_as(grown)))[0]

    def into_basis(self, matrices: Tensor) -> Tensor:
        if "left_basis" in self.state:
            matrices = self.state["left_basis"].mT @ matrices
        return matrices @ self.state["right_basis"] if "right_basis" in self.state else matrices

    def out_of_basis(self, matrices: Tensor) -> Tensor:
        if "left_basis" in self.state:
            matrices = self.state["left_basis"] @ matrices
        return matrices @ self.state["right_basis"].mT if "right_basis" in self.state else matrices


def eigenvectors(means: Tensor) -> Tensor:
    """Columns in the order of their eigenvalues, the largest first.

    In double precision: in single, LAPACK finds no numbers for some matrices of rank one.
    """
    order = torch.linspace(1.0, 0.0, means.shape[-1], dtype=torch.float64, device=means.device).diag()
    ridge = RIDGE.get(means.dtype, 0.0) * traces(means) * order
    return torch.linalg.eigh(means.double() + ridge)[1].flip(-1)


def traces(matrices: Tensor) -> Tensor:
    """(k, 1, 1)"""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """All axes but the last together; one row for a vector, and for a column."""
    last = weight.shape[-1] if weight.dim() else 1
    rows = weight.numel() // last
    return (1, rows) if last == 1 else (rows, last)
