"""What an interaction is made of: message, self-product and update, in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segnn_ase.model.edges import Edges
from segnn_ase.model.irreps import SCALAR, Coupling, Features, Irreps, Kind, multiplicities
from segnn_ase.model.layers import ChannelBlocks, Gate, Product, SteerableLinear, side_by_side
from segnn_ase.model.scalars import MLP, Dense, sigmoid, silu


class Message(nn.Module):
    """M_i: what the neighbours send to atom i, with a non-linear steerable message.

    h_ij = Gate( rho(d_ij) * [ (W^r f_i + W^s f_j) (x) a_ij ] )      rho: a factor per channel and path
    m_i = W sum_j u(d_ij) ( h_ij (x) a_ij )
    Both products go channel by channel; all weights act on nodes: W commutes with the Clebsch-Gordan
    coefficients, and the last W with the sum. With `linear` the gate and the second product are left
    out: m_i = W sum_j u rho * [ (W^s f_j) (x) a_ij ] (tensor field networks, NequIP).
    """

    def __init__(
        self,
        irreps: Irreps,
        attr: tuple[Kind, ...],
        *,
        linear: bool,
        n_radial: int,
        hidden: tuple[int, ...],
        gating: int = 0,
    ):
        super().__init__()
        self.linear = linear
        self.blocks = ChannelBlocks(irreps)
        mul = multiplicities(irreps)
        blocks = range(len(self.blocks.ranges))
        self.couplings = message_couplings(self.blocks, attr, gating)
        self.pair = nn.ModuleList(Dense(m, m if linear else 2 * m) for m in mul)
        self.n_factors = [len(c.paths) * self.blocks.width(b) for b, c in enumerate(self.couplings)]
        self.radial = MLP(n_radial, *hidden, sum(self.n_factors))
        if not linear:
            # the paths from one left kind into 0e are one scalar
            scalars = [sum(row[c.out.index(SCALAR)] > 0 for row in c.n_paths) for c in self.couplings]
            outputs = [len(self.blocks.members[b]) for b in blocks]  # the 0e channel and a gate per other kind
            widths = [self.blocks.width(b) for b in blocks]
            self.mix = nn.ParameterList(torch.randn(o, s, w) for o, s, w in zip(outputs, scalars, widths, strict=True))
            self.bias = nn.ParameterList(torch.zeros(o, w) for o, w in zip(outputs, widths, strict=True))
        fan_in = [0] * len(mul)
        for b, members in enumerate(self.blocks.members):
            for position, k in enumerate(members):
                paths = 1 if linear else self.couplings[b].paths_into(position)
                fan_in[k] += paths * self.blocks.width(b)
        self.out = nn.ModuleList(Dense(f, m) for f, m in zip(fan_in, mul, strict=True))

    def forward(
        self, f: Features, edges: Any, received: "Received | None" = None, senders: Tensor | None = None
    ) -> Features:
        """f as irreps; edges as `received`, which does the work of `received_by_steps`, takes them; senders (N, 1):
        what is multiplied with all that an atom sends."""
        pair = tuple(dense(x) for dense, x in zip(self.pair, f, strict=True))
        if senders is not None:
            pair = tuple(self._weighted(x, senders[:, :, None]) for x in pair)
        joined = self.blocks.join((received or received_by_steps)(self, pair, edges))
        return tuple(dense(x) for dense, x in zip(self.out, joined, strict=True))

    def _weighted(self, x: Tensor, senders: Tensor) -> Tensor:
        """W^s f_j times a weight of j; W^r f_i is left as it is."""
        if self.linear:
            return x * senders
        receiver, sender = x.chunk(2, dim=2)
        return torch.cat([receiver, sender * senders], dim=2)

    def factors(self, radial: Tensor) -> tuple[Tensor, ...]:
        """rho for each block, (n, paths * channels), from radial functions (n, n_radial)."""
        rho = self.radial(radial)
        return (rho,) if len(self.n_factors) == 1 else rho.split(self.n_factors, dim=1)

    def gated(self, b: int, paths: list[list[Tensor]]) -> Features:
        """Sum the paths of each kind; 0e passes silu, the others a sigmoid of a mixture of the scalar paths."""
        position = self.couplings[b].out.index(SCALAR)
        mixed = sum(x * w for x, w in zip(paths[position], self.mix[b].unbind(1), strict=True)) + self.bias[b]
        scalars, *gates = mixed.split(1, dim=1)  # (E, 1, c) each
        gates = iter(gates)
        return tuple(silu(scalars) if k == position else sum(x) * sigmoid(next(gates)) for k, x in enumerate(paths))


Received = Callable[[Message, Features, Any], list[Features]]  # `received_by_steps`, or what does the same


def received_by_steps(message: Message, pair: Features, edges: Edges) -> list[Features]:
    """What each atom receives, every path apart, for each block of channels; pair: W^r f and W^s f side by side."""
    factors, steering = message.factors(edges.radial), edges.steering or steering_of(message.couplings, edges)
    received = []
    for b, (coupling, x) in enumerate(zip(message.couplings, _sent(message, pair, edges), strict=True)):
        rho = factors[b].unflatten(1, (len(coupling.paths), -1))
        paths = coupling.weigh_paths(coupling.products(x, steering[b]), rho)
        if message.linear:
            received.append(tuple(edges.sum_neighbors(sum(p) * edges.envelope[:, :, None]) for p in paths))
        else:
            received.append(_second_product(coupling, steering[b], message.gated(b, paths), edges))
    return received


def steering_of(couplings: list[Coupling], edges: Edges) -> list[list[Tensor]]:
    """For each block the matrices of its coupling with a_ij, `Coupling.matrices`."""
    return [coupling.matrices(edges.harmonics) for coupling in couplings]


def _sent(message: Message, pair: Features, edges: Edges) -> list[Features]:
    """W^r f_i + W^s f_j on every edge, or W^s f_j for the linear message, for each block."""
    split = message.blocks.split
    if message.linear:
        return [tuple(edges.from_senders(x) for x in block) for block in split(pair)]
    receivers, senders = zip(*((x * 0.5**0.5).chunk(2, dim=2) for x in pair), strict=True)
    return [
        tuple(edges.from_pairs(r, s) for r, s in zip(receiver, sender, strict=True))
        for receiver, sender in zip(split(receivers), split(senders), strict=True)
    ]


def _second_product(coupling: Coupling, steering: list[Tensor], h: Features, edges: Edges) -> Features:
    """sum_j u h_ij (x) a_ij, every path apart: one matrix product per atom over its neighbours' components."""
    totals = []
    for x, matrix in zip(h, steering, strict=True):
        enveloped = x * edges.envelope[:, :, None]
        left = matrix.reshape(edges.n_atoms, edges.width * matrix.shape[1], matrix.shape[2])
        totals.append(left.mT @ enveloped.reshape(edges.n_atoms, edges.width * x.shape[1], x.shape[2]))
    return side_by_side(coupling, totals)


def message_couplings(blocks: ChannelBlocks, attr: tuple[Kind, ...], gating: int = 0) -> list[Coupling]:
    """Of each block; the last `gating` attributes, of what is known of a pair besides, multiply scalars alone: these
    gate all kinds, and with all kinds a step takes a quarter longer."""
    members = [blocks.kinds_of(b) for b in range(len(blocks.ranges))]
    return [Coupling(kinds, attr, kinds, normalize=True, with_scalars=gating) for kinds in members]


class SelfProduct(nn.Module):
    """V_1 m + V_2 (m (x) m) + V_3 ((m (x) m) (x) m), channel by channel with a weight per path.

    The message steers itself: the body order grows at the cost of an operation on nodes (MACE's idea). In the powers, m
    is `bounded`. The square begins `power_scale` as large as m, the cube `power_scale`^2.
    """

    def __init__(self, irreps: Irreps, order: int, bound: float = 0.0, power_scale: float = 1.0):
        super().__init__()
        self.order, self.bound = order, bound
        # E[z^4] = 3 and E[z^6] = 15 for z ~ N(0, 1): at power_scale 1 the scales keep every power at unit variance
        self.scales = (power_scale * 3**-0.5, power_scale * 5**-0.5)[: order - 1]  # the cube is made of the square
        self.blocks = ChannelBlocks(irreps)
        members = [self.blocks.kinds_of(b) for b in range(len(self.blocks.ranges))]
        widths = [self.blocks.width(b) for b in range(len(members))]
        self.square = [Coupling(k, k, k, normalize=True, symmetric=True) for k in members]
        self.cube = [Coupling(k, k, k, normalize=True) for k in members]
        powers = [self.square, self.cube][: order - 1]
        self.weights = nn.ModuleList(
            nn.ParameterList(torch.randn(1, len(c.paths), w) for c, w in zip(power, widths, strict=True))
            for power in powers
        )
        self.linear = nn.ModuleList(Dense(order * m, m) for m in multiplicities(irreps))

    def couplings(self, b: int) -> tuple[Coupling, ...]:
        """Those of the powers of block b."""
        return tuple(power[b] for power in [self.square, self.cube][: self.order - 1])

    def forward(self, m: Features, powers: "Powers | None" = None) -> Features:
        """m as irreps; powers: what does the work of `powers_by_steps`."""
        all_powers = [m, *(powers or powers_by_steps)(self, m)]
        return tuple(
            dense(torch.cat(x, dim=2)) for dense, x in zip(self.linear, zip(*all_powers, strict=True), strict=True)
        )


Powers = Callable[[SelfProduct, Features], list[Features]]  # `powers_by_steps`, or what does the same


def powers_by_steps(product: SelfProduct, m: Features) -> list[Features]:
    """Powers 2 ... of m with a weight per path."""
    powers = []
    current = blocks = [bounded(x, product.bound) for x in product.blocks.split(m)]
    vectors = [torch.cat(x, dim=1) for x in blocks]
    for couplings, weights, scale in zip([product.square, product.cube], product.weights, product.scales, strict=False):
        current = [
            tuple(sum(paths) for paths in c.weigh_paths(c.channelwise(x, y), w * scale))
            for c, x, y, w in zip(couplings, current, vectors, weights, strict=True)
        ]
        powers.append(product.blocks.join(current))
    return powers


def bounded(m: Features, bound: float) -> Features:
    """m / sqrt(1 + mean(m^2) / bound^2) for each channel, the mean over the components of all kinds; m, if bound is 0.

    So powers cannot explode where messages are larger than any in training.
    """
    if not bound:
        return m
    mean = torch.cat([x.square() for x in m], dim=1).mean(dim=1, keepdim=True)
    return tuple(x * (1.0 + mean / bound**2).rsqrt() for x in m)


class Update(nn.Module):
    """f <- f + TP( Gate( TP(f + M; a) ); a ) / sqrt(2), f + M side by side (SEGNN paper, eq. 7).

    The change has about the variance of f: the factor keeps many interactions from doubling it each.
    """

    def __init__(self, irreps: Irreps, attr: tuple[Kind, ...]):
        super().__init__()
        self.gate = Gate(irreps)
        self.first = SteerableLinear(Irreps([(2 * mul, ir) for mul, ir in irreps]), attr, self.gate.irreps_in)
        self.second = SteerableLinear(irreps, attr, irreps)

    def forward(self, f: Features, message: Features, a: Tensor, product: Product | None = None) -> Features:
        both = tuple(torch.cat(x, dim=2) for x in zip(f, message, strict=True))
        change = self.second(self.gate(self.first(both, a, product)), a, product)
        return tuple(x + y * 0.5**0.5 for x, y in zip(f, change, strict=True))
