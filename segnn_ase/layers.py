"""Steerable layers in plain torch: the clear, slow twin of any faster path, with the same parameters.

Notation: f steerable features of nodes, a steerable attributes (spherical harmonics), (x) the
Clebsch-Gordan product. Weights are drawn from N(0, 1) and divided by the square root of the fan-in
when they are used (e3nn's "element" normalisation), so that one learning rate suits every layer.
"""

import itertools
import math
from typing import NamedTuple

import torch
from e3nn.o3 import Irreps
from torch import Tensor, nn

from segnn_ase.kernels import (
    Topology,
    linear_message_kernel,
    message_kernel,
    product_kernel,
    self_product_kernel,
)
from segnn_ase.o3 import SCALAR, Coupling, Features, Kind, kinds, multiplicities, spherical_harmonics, spherical_kinds


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
        self.fused = False
        self.uniform = len(set(mul_in)) == 1

    def forward(self, f: Features, a: Tensor) -> Features:
        """f: one (n, 2l+1, mul) per irrep of irreps_in; a: (n, attribute dim). Returns irreps_out likewise."""
        c = self.coupling
        if self.fused and self.uniform:
            rows = product_kernel(c, f[0].shape[2])(Topology(len(a)), *f, a)
            products = by_component(rows, c.out)
        else:
            products = side_by_side(c, c.products(f, c.matrices(a)))
        out = []
        for k, x in enumerate(products):
            weight = self.weights[k]
            y = x @ (weight * max(len(weight), 1) ** -0.5)
            out.append(y + self.bias if k == self.scalar else y)
        return tuple(out)


def by_component(rows: tuple[Tensor, ...], kinds_out: tuple[Kind, ...]) -> Features:
    """What a fused kernel writes, (n, (2l+1) c) for each out kind, as (n, 2l+1, c)."""
    return tuple(x.unflatten(1, (kind.dim, x.shape[1] // kind.dim)) for x, kind in zip(rows, kinds_out, strict=True))


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


class Edges(NamedTuple):
    """Geometry of all edges in a padded table of K neighbours for each of N atoms; E = N K slots.

    Empty slots have envelope and mask 0. The regular shape lets the sum over neighbours and the second
    tensor product of a message be one matrix product per atom.
    """

    slot: Tensor  # (E_real,) slot of each edge in the caller's order
    src: Tensor  # (E,) senders
    n_atoms: int
    width: int  # K
    mask: Tensor  # (E, 1) 1 for an edge, 0 for an empty slot
    distance: Tensor  # (E, 1) Å
    harmonics: Tensor  # (E, (lmax_attr + 1)^2)
    radial: Tensor  # (E, n_radial)
    envelope: Tensor  # (E, 1)

    def sum_neighbors(self, values: Tensor) -> Tensor:
        """(E, ...) -> (N, ...)."""
        return values.unflatten(0, (self.n_atoms, self.width)).sum(1)

    def to_slots(self, values: Tensor) -> Tensor:
        """Per-edge values in the caller's order (E_real, ...) to slots, zero where empty: (E, ...)."""
        return values.new_zeros(len(self.src), *values.shape[1:]).index_copy(0, self.slot, values)

    def from_pairs(self, receiver: Tensor, sender: Tensor) -> Tensor:
        """receiver_i + sender_j on every edge: (N, ...), (N, ...) -> (E, ...)."""
        gathered = sender[self.src].unflatten(0, (self.n_atoms, self.width))
        return (gathered + receiver[:, None]).flatten(0, 1)


class SortedEdges(NamedTuple):
    """Geometry of all edges, sorted by receiver: what the fused kernels work on."""

    topology: Topology
    distance: Tensor  # (E, 1) Å
    harmonics: Tensor  # (E, (lmax_attr + 1)^2)
    radial: Tensor | None  # (pairs, n_radial), None with tables
    fraction: Tensor | None  # (E, 1) of the way from a knot of the radial tables to the next
    envelope: Tensor  # (E, 1)
    receiver: Tensor  # (E,)

    def sum_neighbors(self, values: Tensor) -> Tensor:
        """(E, ...) -> (N, ...)."""
        return values.new_zeros(self.topology.n, *values.shape[1:]).index_add(0, self.receiver, values)


def sorted_edges(
    vectors: Tensor,
    edge_src: Tensor,
    edge_dst: Tensor,
    n_atoms: int,
    *,
    cutoff: float,
    lmax: int,
    n_radial: int,
    edge_pair: Tensor | None = None,
    table_step: float | None = None,
) -> SortedEdges:
    """The same as `make_edges` for the fused kernels.

    edge_pair (E,): an edge of the same pair of atoms, j -> i or i -> j, equal for both: the radial functions are
    evaluated once for it. table_step: distance of the knots of the radial tables, Å, where there are any.
    """
    if edge_pair is None:
        edge_pair = torch.arange(len(edge_dst), device=edge_dst.device)
    if not bool((edge_dst[1:] >= edge_dst[:-1]).all()):
        order = torch.argsort(edge_dst, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        vectors, edge_src, edge_dst, edge_pair = (
            vectors[order],
            edge_src[order],
            edge_dst[order],
            place[edge_pair[order]],
        )
    topology = Topology(n_atoms, first_edges(edge_dst, n_atoms), edge_src.contiguous())
    if table_step is not None:
        return tabulated_edges(vectors, edge_dst, topology, cutoff=cutoff, lmax=lmax, table_step=table_step)
    distance = _distance(vectors)
    chosen, pair = torch.unique(edge_pair, return_inverse=True)
    return SortedEdges(
        topology=topology._replace(pair=pair),
        distance=distance,
        harmonics=spherical_harmonics(vectors / distance, lmax),
        radial=bessel(distance[chosen], n_radial, cutoff),
        fraction=None,
        envelope=envelope(distance / cutoff),
        receiver=edge_dst,
    )


def tabulated_edges(
    vectors: Tensor, edge_dst: Tensor, topology: Topology, *, cutoff: float, lmax: int, table_step: float
) -> SortedEdges:
    """Geometry of sorted edges where the radial functions come from tables with knots `table_step` Å apart."""
    distance = _distance(vectors)
    scaled = distance.clamp_max(cutoff) / table_step  # beyond the cutoff the envelope is zero
    place = scaled.detach().long().clamp(0, round(cutoff / table_step) - 1)
    return SortedEdges(
        topology=topology._replace(knot=place[:, 0].contiguous()),
        distance=distance,
        harmonics=spherical_harmonics(vectors / distance, lmax),
        radial=None,
        fraction=scaled - place,
        envelope=envelope(distance / cutoff),
        receiver=edge_dst,
    )


def first_edges(edge_dst: Tensor, n_atoms: int, count: Tensor | None = None) -> Tensor:
    """Number of the first edge of each receiver, of sorted ones, and of all: (N + 1,); count (E,) 0 leaves one out."""
    count = torch.ones_like(edge_dst) if count is None else count
    return edge_dst.new_zeros(n_atoms + 1).index_add(0, edge_dst + 1, count).cumsum(0)


def _distance(vectors: Tensor) -> Tensor:
    """(E, 1); two atoms on one spot have no direction: a tiny distance keeps every derivative finite."""
    return vectors.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()


def neighbor_table(edge_dst: Tensor, n_atoms: int) -> tuple[Tensor, int]:
    """Slot of each edge in a table with the same number of slots for every receiver: (E,), K."""
    order = torch.argsort(edge_dst, stable=True)
    degree = torch.bincount(edge_dst, minlength=n_atoms)
    width = int(degree.max()) if len(edge_dst) else 0
    first = degree.cumsum(0) - degree
    sorted_dst = edge_dst[order]
    slot = torch.empty_like(edge_dst)
    slot[order] = sorted_dst * width + torch.arange(len(edge_dst), device=edge_dst.device) - first[sorted_dst]
    return slot, width


def make_edges(
    vectors: Tensor, edge_src: Tensor, edge_dst: Tensor, n_atoms: int, *, cutoff: float, lmax: int, n_radial: int
) -> Edges:
    """Evaluate harmonics, Bessel functions and envelope on the edges r_ij = vectors (E, 3) Å."""
    slot, width = neighbor_table(edge_dst, n_atoms)
    n_slots = n_atoms * width
    src = edge_src.new_zeros(n_slots).index_copy(0, slot, edge_src)
    mask = vectors.new_zeros(n_slots, 1).index_fill(0, slot, 1.0)
    far = vectors.new_tensor([0.0, 0.0, cutoff]).expand(n_slots, 3)  # where the envelope and its slope vanish
    r = far.index_copy(0, slot, vectors)
    distance = _distance(r)
    x = distance / cutoff
    return Edges(
        slot=slot,
        src=src,
        n_atoms=n_atoms,
        width=width,
        mask=mask,
        distance=distance,
        harmonics=spherical_harmonics(r / distance, lmax),
        radial=bessel(distance, n_radial, cutoff),
        envelope=envelope(x) * mask,
    )


def envelope(x: Tensor) -> Tensor:
    """u(x) = 1 - 28 x^6 + 48 x^7 - 21 x^8 for x < 1, else 0; u, u', u'' vanish at 1 (DimeNet, eq. 8, p = 6)."""
    x = x.clamp_max(1.0)
    return 1.0 - x**6 * (28.0 - 48.0 * x + 21.0 * x**2)


def bessel(distance: Tensor, n: int, cutoff: float) -> Tensor:
    """B_k = sqrt(2 / r_c) sin(k pi d / r_c) / d, k = 1 ... n (DimeNet, eq. 7): (E, n) Å^{-3/2}.

    Not scaled to unit variance: larger inputs make rho a rougher function of d and the errors larger.
    """
    k = torch.arange(1, n + 1, dtype=distance.dtype, device=distance.device)
    return math.sqrt(2.0 / cutoff) * torch.sin(math.pi / cutoff * k * distance) / distance


def node_attributes(edges: Edges | SortedEdges, *, smooth: bool) -> Tensor:
    """a_i: 1 for l = 0, and for l > 0 the harmonics of the neighbours, averaged (N, (lmax + 1)^2).

    smooth: sum_j u Y / (1 + sum_j u), continuous when the last neighbour leaves. Otherwise the paper's
    mean over neighbours, which jumps when an atom crosses the cutoff.
    """
    weight = edges.envelope if smooth else edges.mask
    total = edges.sum_neighbors(weight)
    steered = edges.sum_neighbors(weight * edges.harmonics[:, 1:])
    normalised = steered / (1.0 + total) if smooth else steered / total.clamp_min(1.0)
    return torch.cat([torch.ones_like(total), normalised], dim=1)


class Message(nn.Module):
    """M_i: what the neighbours send to atom i, with a non-linear steerable message.

    h_ij = Gate( rho(d_ij) * [ (W^r f_i + W^s f_j) (x) a_ij ] )      rho: a factor per channel and path
    m_i = W sum_j u(d_ij) ( h_ij (x) a_ij )
    Both products go channel by channel; all weights act on nodes: W commutes with the Clebsch-Gordan
    coefficients, and the last W with the sum. With `linear` the gate and the second product are left
    out: m_i = W sum_j u rho * [ (W^s f_j) (x) a_ij ] (tensor field networks, NequIP).
    """

    def __init__(self, irreps: Irreps, lmax: int, *, linear: bool, n_radial: int, hidden: tuple[int, ...]):
        super().__init__()
        self.linear = linear
        self.blocks = ChannelBlocks(irreps)
        mul = multiplicities(irreps)
        blocks = range(len(self.blocks.ranges))
        self.couplings = message_couplings(self.blocks, lmax)
        self.pair = nn.ModuleList(Dense(m, m if linear else 2 * m) for m in mul)
        self.n_factors = [len(c.paths) * self.blocks.width(b) for b, c in enumerate(self.couplings)]
        self.radial = MLP(n_radial, *hidden, sum(self.n_factors))
        self.tables: list[Tensor] | None = None
        if not linear:
            # the paths from one left kind into 0e are one scalar: there is one path from each kind
            scalars = [c.paths_into(c.out.index(SCALAR)) for c in self.couplings]
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

    def forward(self, f: Features, edges: Edges | SortedEdges, steering: list[list[Tensor]] | None) -> Features:
        """f as irreps; steering: for each block the matrices of its coupling with a_ij, `Coupling.matrices`."""
        pair = tuple(dense(x) for dense, x in zip(self.pair, f, strict=True))
        if isinstance(edges, SortedEdges):
            received = self._fused(pair, edges)
        else:
            received = self._by_steps(pair, edges, steering)
        joined = self.blocks.join(received)
        return tuple(dense(x) for dense, x in zip(self.out, joined, strict=True))

    def tabulate(self, coefficients: Tensor | None) -> None:
        """Take rho from a table, (rows, factors), or with None from the MLP again; see `tables.tabulate`."""
        split = None if coefficients is None else coefficients.to(self.pair[0].weight).split(self.n_factors, dim=1)
        self.tables = None if split is None else [x.contiguous() for x in split]

    def _fused(self, pair: Features, edges: SortedEdges) -> list[Features]:
        tabulated = edges.radial is None
        radial = (
            [[table, edges.fraction] for table in self.tables] if tabulated else [[x] for x in self._factors(edges)]
        )
        received = []
        for b, coupling in enumerate(self.couplings):
            width = self.blocks.width(b)
            tensors = [*self._pair_block(pair, b), *radial[b], edges.harmonics, edges.envelope]
            if self.linear:
                message = linear_message_kernel(coupling, width, tabulated)
            else:
                message = message_kernel(coupling, width, SILU_SCALE, SIGMOID_SCALE, tabulated)
                tensors += [self.mix[b], self.bias[b]]
            received.append(by_component(message(edges.topology, *tensors), coupling.out))
        return received

    def _pair_block(self, pair: Features, b: int) -> Features:
        """The channels of one block, receiver's and sender's side by side."""
        if len(self.blocks.ranges) == 1:
            return pair
        halves = [pair] if self.linear else zip(*(x.chunk(2, dim=2) for x in pair), strict=True)
        return tuple(torch.cat(x, dim=2) for x in zip(*(self.blocks.split(half)[b] for half in halves), strict=True))

    def _factors(self, edges: Edges | SortedEdges) -> tuple[Tensor, ...]:
        """rho on every edge, or on every pair, for each block."""
        rho = self.radial(edges.radial)
        return (rho,) if len(self.n_factors) == 1 else rho.split(self.n_factors, dim=1)

    def _by_steps(self, pair: Features, edges: Edges, steering: list[list[Tensor]]) -> list[Features]:
        factors = self._factors(edges)
        received = []
        for b, (coupling, x) in enumerate(zip(self.couplings, self._sent(pair, edges), strict=True)):
            rho = factors[b].unflatten(1, (len(coupling.paths), -1))
            paths = coupling.weigh_paths(coupling.products(x, steering[b]), rho)
            if self.linear:
                received.append(tuple(edges.sum_neighbors(sum(p) * edges.envelope[:, :, None]) for p in paths))
            else:
                h = self._gate(b, paths)
                received.append(self._second_product(coupling, steering[b], h, edges))
        return received

    def _sent(self, pair: Features, edges: Edges) -> list[Features]:
        """W^r f_i + W^s f_j on every edge, or W^s f_j for the linear message, for each block."""
        if self.linear:
            return [tuple(x[edges.src] for x in block) for block in self.blocks.split(pair)]
        receivers, senders = zip(*((x * 0.5**0.5).chunk(2, dim=2) for x in pair), strict=True)
        ends = zip(self.blocks.split(receivers), self.blocks.split(senders), strict=True)
        return [
            tuple(edges.from_pairs(r, s) for r, s in zip(receiver, sender, strict=True)) for receiver, sender in ends
        ]

    def _gate(self, b: int, paths: list[list[Tensor]]) -> Features:
        """Sum the paths of each kind; 0e passes silu, the others a sigmoid of a mixture of the scalar paths."""
        position = self.couplings[b].out.index(SCALAR)
        mixed = sum(x * w for x, w in zip(paths[position], self.mix[b].unbind(1), strict=True)) + self.bias[b]
        scalars, *gates = mixed.split(1, dim=1)  # (E, 1, c) each
        gates = iter(gates)
        return tuple(silu(scalars) if k == position else sum(x) * sigmoid(next(gates)) for k, x in enumerate(paths))

    def _second_product(self, coupling: Coupling, steering: list[Tensor], h: Features, edges: Edges) -> Features:
        """sum_j u h_ij (x) a_ij, every path apart: one matrix product per atom over its neighbours' components."""
        totals = []
        for x, matrix in zip(h, steering, strict=True):
            enveloped = x * edges.envelope[:, :, None]
            left = matrix.reshape(edges.n_atoms, edges.width * matrix.shape[1], matrix.shape[2])
            totals.append(left.mT @ enveloped.reshape(edges.n_atoms, edges.width * x.shape[1], x.shape[2]))
        return side_by_side(coupling, totals)


def message_couplings(blocks: ChannelBlocks, lmax: int) -> list[Coupling]:
    members = [blocks.kinds_of(b) for b in range(len(blocks.ranges))]
    return [Coupling(kinds, spherical_kinds(lmax), kinds, normalize=True) for kinds in members]


class PublishedMessage(nn.Module):
    """The message of the SEGNN paper (eq. 6): two gated steerable layers on f_i, f_j and d^2, summed over j.

    Further invariants of an edge (products of charges, say) are concatenated to d^2.
    """

    def __init__(self, irreps: Irreps, lmax: int, *, n_edge_scalars: int):
        super().__init__()
        attr = spherical_kinds(lmax)
        self.scalar = kinds(irreps).index(SCALAR)
        doubled = [(2 * mul + (1 + n_edge_scalars) * (k == self.scalar), ir) for k, (mul, ir) in enumerate(irreps)]
        self.gate = Gate(irreps)
        self.first = SteerableLinear(Irreps(doubled), attr, self.gate.irreps_in)
        self.second = SteerableLinear(irreps, attr, self.gate.irreps_in)

    def forward(self, f: Features, edges: Edges, attributes: Tensor, edge_scalars: Tensor | None) -> Features:
        extra = [edges.distance.square()] + ([] if edge_scalars is None else [edge_scalars])
        pairs = []
        for k, x in enumerate(f):
            zero = torch.zeros_like(x)
            pair = edges.from_pairs(torch.cat([x, zero], 2), torch.cat([zero, x], 2))
            pairs.append(torch.cat([pair, torch.cat(extra, 1)[:, None]], 2) if k == self.scalar else pair)
        h = self.gate(self.first(tuple(pairs), attributes))
        m = self.gate(self.second(h, attributes))
        return tuple(edges.sum_neighbors(x * edges.mask[:, :, None]) for x in m)


class SelfProduct(nn.Module):
    """V_1 m + V_2 (m (x) m) + V_3 ((m (x) m) (x) m), channel by channel with a weight per path.

    The message steers itself: the body order grows at the cost of an operation on nodes (MACE's idea).
    """

    def __init__(self, irreps: Irreps, order: int):
        super().__init__()
        self.order = order
        # E[z^4] = 3 and E[z^6] = 15 for z ~ N(0, 1): the scales keep every power at unit variance
        self.scales = (3**-0.5, 5**-0.5)[: order - 1]
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
        self.fused = False

    def forward(self, m: Features) -> Features:
        powers = [m, *(self._fused(m) if self.fused else self._by_steps(m))]
        return tuple(
            dense(torch.cat(x, dim=2)) for dense, x in zip(self.linear, zip(*powers, strict=True), strict=True)
        )

    def _fused(self, m: Features) -> list[Features]:
        results = []
        for b, block in enumerate(self.blocks.split(m)):
            weights = [w[b][0] for w in self.weights]
            couplings = tuple(power[b] for power in [self.square, self.cube][: self.order - 1])
            power_kernel = self_product_kernel(couplings, self.blocks.width(b), self.scales)
            rows = power_kernel(Topology(len(m[0])), *block, *weights)
            results.append(by_component(rows, self.blocks.kinds_of(b) * (self.order - 1)))
        powers = []
        for q in range(self.order - 1):
            blocks = []
            for r, members in zip(results, self.blocks.members, strict=True):
                blocks.append(tuple(r[q * len(members) : (q + 1) * len(members)]))
            powers.append(self.blocks.join(blocks))
        return powers

    def _by_steps(self, m: Features) -> list[Features]:
        powers = []
        current = blocks = self.blocks.split(m)
        vectors = [torch.cat(x, dim=1) for x in blocks]
        for couplings, weights, scale in zip([self.square, self.cube], self.weights, self.scales, strict=False):
            current = [
                tuple(sum(paths) for paths in c.weigh_paths(c.channelwise(x, y), w * scale))
                for c, x, y, w in zip(couplings, current, vectors, weights, strict=True)
            ]
            powers.append(self.blocks.join(current))
        return powers


class Update(nn.Module):
    """f <- f + TP( Gate( TP(f + M; a) ); a ) / sqrt(2), f + M side by side (SEGNN paper, eq. 7).

    The change has about the variance of f: the factor keeps many interactions from doubling it each.
    """

    def __init__(self, irreps: Irreps, lmax: int):
        super().__init__()
        attr = spherical_kinds(lmax)
        self.gate = Gate(irreps)
        self.first = SteerableLinear(Irreps([(2 * mul, ir) for mul, ir in irreps]), attr, self.gate.irreps_in)
        self.second = SteerableLinear(irreps, attr, irreps)

    def forward(self, f: Features, message: Features, a: Tensor) -> Features:
        both = tuple(torch.cat(x, dim=2) for x in zip(f, message, strict=True))
        change = self.second(self.gate(self.first(both, a)), a)
        return tuple(x + y * 0.5**0.5 for x, y in zip(f, change, strict=True))
