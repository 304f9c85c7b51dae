"""Scalar parts of the network: dense layers, MLPs, and activations that keep unit variance.

Weights are drawn from N(0, 1) and divided by the square root of the fan-in when they are used (e3nn's "element"
normalisation), so that one learning rate suits every layer.
"""

import itertools
import math

import torch
from torch import Tensor, nn


def second_moment_scale(activation) -> float:
    """1 / sqrt(E[activation(z)^2]) for z ~ N(0, 1): keeps unit variance through a non-linearity."""
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * activation(z) ** 2, z).rsqrt())


SILU_SCALE = second_moment_scale(nn.functional.silu)
SIGMOID_SCALE = second_moment_scale(torch.sigmoid)


def silu(x: Tensor) -> Tensor:
    return SILU_SCALE * nn.functional.silu(x)


def sigmoid(x: Tensor) -> Tensor:
    return SIGMOID_SCALE * torch.sigmoid(x)


class Dense(nn.Module):
    """y = x W / sqrt(n_in) + b on the last axis."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight * self.weight.shape[0] ** -0.5)
        return y if self.bias is None else y + self.bias


class MLP(nn.Module):
    """Dense layers with silu between them."""

    def __init__(self, *widths: int):
        super().__init__()
        hidden = itertools.pairwise(widths[:-1])
        self.layers = nn.ModuleList([Dense(a, b, bias=True) for a, b in hidden])
        self.last = Dense(widths[-2], widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = silu(layer(x))
        return self.last(x)
