"""Steerable layers in plain torch: the clear, slow twin of any faster path, with the same parameters.

Notation: f steerable features of nodes, a steerable attributes (spherical harmonics), (x) the
Clebsch-Gordan product. Weights are drawn from N(0, 1) and divided by the square root of the fan-in
when they are used (e3nn's "element" normalisation), so that one learning rate suits every layer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.kernels import Topology
from segnn_ase.model.irreps import spherical_harmonics


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
    distance = distance_of(vectors)
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
    distance = distance_of(vectors)
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


def distance_of(vectors: Tensor) -> Tensor:
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
    distance = distance_of(r)
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
