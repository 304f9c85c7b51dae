"""L2-SP: a penalty on the distance from the starting weights (Li, Grandvalet, Davoine, ICML 2018)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pull(NamedTuple):
    """loss + strength / 2 sum (w - w0)^2, of which only the gradient is ever needed."""

    strength: float
    towards: list[Tensor]  # w0, one for each trained weight


@torch.no_grad()
def add_pull(weights: list[Tensor], pull: Pull | None) -> None:
    """Add the penalty's gradient, strength (w - w0), to the gradients of the weights."""
    if pull is None:
        return
    for weight, towards in zip(weights, pull.towards, strict=True):
        if weight.grad is not None:
            weight.grad.add_(weight - towards, alpha=pull.strength)
