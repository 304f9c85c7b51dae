"""Edges sorted by receiver, and their geometry in PyTorch for the compiled operations of single layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.kernels import Topology
from segnn_ase.model.cues import Term
from segnn_ase.model.edges import bessel, distance_of, envelope
from segnn_ase.model.irreps import spherical_harmonics


class SortedEdges(NamedTuple):
    """What the fused kernels work on."""

    topology: Topology
    distance: Tensor  # (E, 1) Å
    harmonics: Tensor  # (E, (lmax_attr + 1)^2)
    radial: Tensor  # (pairs, n_radial)
    envelope: Tensor  # (E, 1)
    receiver: Tensor  # (E,)
    cues: Tensor | None = None  # (N, width), where messages are steered by them
    terms: tuple[Term, ...] = ()  # what of them

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
) -> SortedEdges:
    """The same as `model.edges.make_edges` for compiled operations.

    edge_pair (E,): an edge of the same pair of atoms, j -> i or i -> j, equal for both: the radial functions are
    evaluated once for it.
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
    distance = distance_of(vectors)
    chosen, pair = torch.unique(edge_pair, return_inverse=True)
    return SortedEdges(
        topology=topology._replace(pair=pair),
        distance=distance,
        harmonics=spherical_harmonics(vectors / distance, lmax),
        radial=bessel(distance[chosen], n_radial, cutoff),
        envelope=envelope(distance / cutoff),
        receiver=edge_dst,
    )


def first_edges(edge_dst: Tensor, n_atoms: int) -> Tensor:
    """Number of the first edge of each receiver, of sorted ones, and of all: (N + 1,)."""
    return edge_dst.new_zeros(n_atoms + 1).index_add(0, edge_dst + 1, torch.ones_like(edge_dst)).cumsum(0)
