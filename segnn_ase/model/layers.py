"""Steerable layers in plain PyTorch: tensor product with learned weights, gate, blocks of channels.

Notation: f steerable features of nodes, a steerable attributes (spherical harmonics), (x) the Clebsch-Gordan product.
What may be done by compiled code is a function handed in, of which the plain one stands here.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segnn_ase.model.irreps import SCALAR, Coupling, Features, Irreps, Kind, kinds, multiplicities
from segnn_ase.model.scalars import sigmoid, silu

Product = Callable[[Coupling, Features, Tensor], Features]  # `steered`, or what does the same


class SteerableLinear(nn.Module):
    """TP(f; a): f (x) a with a weight per path and pair of channels (SEGNN paper, eq. 3).

    Equal to e3nn's FullyConnectedTensorProduct with an attribute of multiplicity one, plus a bias on 0e.
    """

    def __init__(self, irreps_in: Irreps, kinds_attr: tuple[Kind, ...], irreps_out: Irreps):
        super().__init__()
        self.irreps_in, self.irreps_out = irreps_in, irreps_out
        mul_in, mul_out = multiplicities(irreps_in), multiplicities(irreps_out)
        self.coupling = Coupling(kinds(irreps_in), kinds_attr, kinds(irreps_out))
        fan_in = [
            sum(m * row[k] for m, row in zip(mul_in, self.coupling.n_paths, strict=True)) for k in range(len(mul_out))
        ]
        self.weights = nn.ParameterList(torch.randn(f, mul) for f, mul in zip(fan_in, mul_out, strict=True))
        has_scalars = SCALAR in kinds(irreps_out)
        self.scalar = kinds(irreps_out).index(SCALAR) if has_scalars else None
        self.bias = nn.Parameter(torch.zeros(mul_out[self.scalar])) if has_scalars else None

    def forward(self, f: Features, a: Tensor, product: Product | None = None) -> Features:
        """f: one (n, 2l+1, mul) per irrep of irreps_in; a: (n, attribute dim). Returns irreps_out likewise.

        product: what does the work of `steered`.
        """
        out = []
        for k, x in enumerate((product or steered)(self.coupling, f, a)):
            weight = self.weights[k]
            y = x @ (weight * max(len(weight), 1) ** -0.5)
            out.append(y + self.bias if k == self.scalar else y)
        return tuple(out)


def steered(coupling: Coupling, f: Features, a: Tensor) -> Features:
    """f (x) a channel by channel, the channels of all paths beside each other: (n, 2l+1, paths * c) per out kind."""
    return side_by_side(coupling, coupling.products(f, coupling.matrices(a)))


def side_by_side(coupling: Coupling, products: list[Tensor]) -> Features:
    """Put the channels of all paths into a kind beside each other: one (n, 2l+1, paths * c) per out kind."""
    out: list[list[Tensor]] = [[] for _ in coupling.out]
    for product, row, widths in zip(products, coupling.n_paths, coupling.columns, strict=True):
        for k, (block, n) in enumerate(zip(product.split(widths, dim=1), row, strict=True)):
            out[k].append(block.unflatten(1, (n, coupling.out[k].dim)).transpose(1, 2).flatten(2))
    return tuple(torch.cat(blocks, dim=2) for blocks in out)


class Gate(nn.Module):
    """silu on 0e; every other channel is multiplied by the sigmoid of a scalar of its own.

    `irreps_in` is `irreps_out` plus one 0e for each gated channel.
    """

    def __init__(self, irreps_out: Irreps):
        super().__init__()
        self.irreps_out = irreps_out
        self.kinds, self.mul = kinds(irreps_out), multiplicities(irreps_out)
        n_gates = sum(m for k, m in zip(self.kinds, self.mul, strict=True) if k != SCALAR)
        self.irreps_in = Irreps([(m + n_gates * (k == SCALAR), k) for k, m in zip(self.kinds, self.mul, strict=True)])
        self.scalar = self.kinds.index(SCALAR)

    def forward(self, f: Features) -> Features:
        own = self.mul[self.scalar]
        gated = [m for k, m in zip(self.kinds, self.mul, strict=True) if k != SCALAR]
        scalars, gates = f[self.scalar].split([own, sum(gated)], dim=2)
        gates = iter(sigmoid(gates).split(gated, dim=2))
        return tuple(silu(scalars) if k == self.scalar else x * next(gates) for k, x in enumerate(f))


class ChannelBlocks:
    """Cuts irreps into blocks of channels in which every kind present has the same multiplicity.

    32x0e+32x1o is one block; 32x0e+16x1o is two: 16 channels with l = 0 and 1, and 16 with l = 0 only.
    """

    def __init__(self, irreps: Irreps):
        self.kinds = kinds(irreps)
        mul = multiplicities(irreps)
        edges = [0, *sorted(set(mul))]
        self.ranges = list(itertools.pairwise(edges))
        self.members = [[k for k, m in enumerate(mul) if m >= high] for _, high in self.ranges]

    def kinds_of(self, block: int) -> tuple[Kind, ...]:
        return tuple(self.kinds[k] for k in self.members[block])

    def width(self, block: int) -> int:
        low, high = self.ranges[block]
        return high - low

    def split(self, f: Features) -> list[Features]:
        """The features of each block, one (n, 2l+1, channels) per kind."""
        if len(self.ranges) == 1:
            return [f]
        return [
            tuple(f[k][:, :, low:high] for k in members)
            for (low, high), members in zip(self.ranges, self.members, strict=True)
        ]

    def join(self, blocks: list[Features]) -> Features:
        """Put per-block, per-kind tensors (n, 2l+1, c) side by side again, channels of all blocks together."""
        joined: list[list[Tensor]] = [[] for _ in self.kinds]
        for members, block in zip(self.members, blocks, strict=True):
            for k, x in zip(members, block, strict=True):
                joined[k].append(x)
        return tuple(torch.cat(x, dim=2) for x in joined)
