"""Geometry of the edges: distances, Bessel functions, envelope, harmonics, and the attributes of the nodes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segnn_ase.model.irreps import spherical_harmonics

CLOSEST = 1e-6  # Å; two atoms on one spot have no direction: a tiny distance keeps every derivative finite


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
    harmonics: Tensor  # (E, (lmax_attr + 1)^2), and behind them the attributes of cues
    radial: Tensor  # (E, n_radial)
    envelope: Tensor  # (E, 1)
    steering: list[list[Tensor]] | None = None  # of the couplings of messages, where several messages share it
    slopes: Tensor | None = None  # (E, 1) factors of what is derived with respect to the senders, see `heat_flux`

    def sum_neighbors(self, values: Tensor) -> Tensor:
        """(E, ...) -> (N, ...)."""
        return values.unflatten(0, (self.n_atoms, self.width)).sum(1)

    def to_slots(self, values: Tensor) -> Tensor:
        """Per-edge values in the caller's order (E_real, ...) to slots, zero where empty: (E, ...)."""
        return values.new_zeros(len(self.src), *values.shape[1:]).index_copy(0, self.slot, values)

    def from_senders(self, values: Tensor) -> Tensor:
        """(N, rows, channels) -> (E, rows, channels)."""
        sent = values[self.src]
        return sent if self.slopes is None else sent.detach() + (sent - sent.detach()) * self.slopes[:, :, None]

    def from_pairs(self, receiver: Tensor, sender: Tensor) -> Tensor:
        """receiver_i + sender_j on every edge: (N, ...), (N, ...) -> (E, ...)."""
        gathered = self.from_senders(sender).unflatten(0, (self.n_atoms, self.width))
        return (gathered + receiver[:, None]).flatten(0, 1)


def distance_of(vectors: Tensor) -> Tensor:
    """(E, 1) Å, at least `CLOSEST`."""
    return vectors.square().sum(1, keepdim=True).clamp_min(CLOSEST**2).sqrt()


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


def node_attributes(edges: Any, *, smooth: bool, lmax: int | None = None) -> Tensor:
    """a_i: 1 for l = 0, and for l > 0 the harmonics of the neighbours, averaged (N, (lmax + 1)^2).

    edges: `Edges`, or what has the same envelope, harmonics and `sum_neighbors`.
    smooth: sum_j u Y / (1 + sum_j u), continuous when the last neighbour leaves. Otherwise the paper's
    mean over neighbours, which jumps when an atom crosses the cutoff. lmax: of what is averaged; None: of all there is.
    """
    weight = edges.envelope if smooth else edges.mask
    total = edges.sum_neighbors(weight)
    steered = edges.sum_neighbors(weight * edges.harmonics[:, 1 : None if lmax is None else (lmax + 1) ** 2])
    normalised = steered / (1.0 + total) if smooth else steered / total.clamp_min(1.0)
    return torch.cat([torch.ones_like(total), normalised], dim=1)


def inverse_density(edges: Any) -> Tensor:
    """1 / (1 + sum_j u(d_ij)), (N, 1): PointConv's weights (Wu et al., CVPR 2019, eq. 4), their kernel the envelope."""
    return 1.0 / (1.0 + edges.sum_neighbors(edges.envelope))
