"""`Graph`: one structure or a batch of them, as tensors; everything in Å, positions and cells in float64."""

from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.structure.neighbors import Neighbors, neighbor_list


class Graph(NamedTuple):
    numbers: Tensor  # (N,) atomic numbers
    positions: Tensor  # (N, 3) Å
    cell: Tensor  # (B, 3, 3) Å, rows are lattice vectors
    edge_src: Tensor  # (E,) senders j
    edge_dst: Tensor  # (E,) receivers i
    edge_shift: Tensor  # (E, 3) cell shifts S
    batch: Tensor  # (N,) structure of each atom
    n_graphs: int
    edge_pair: Tensor | None = None  # (E,) an edge of the same pair of atoms, the same one for both directions

    def to(self, device) -> "Graph":
        return Graph(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


def graph_from_arrays(numbers, positions, cell, neighbors: Neighbors) -> Graph:
    return Graph(
        numbers=torch.as_tensor(numbers, dtype=torch.long),
        positions=torch.as_tensor(positions, dtype=torch.float64),
        cell=torch.as_tensor(np.asarray(cell), dtype=torch.float64).view(1, 3, 3),
        edge_src=torch.as_tensor(neighbors.j, dtype=torch.long),
        edge_dst=torch.as_tensor(neighbors.i, dtype=torch.long),
        edge_shift=torch.as_tensor(neighbors.S, dtype=torch.float64),
        batch=torch.zeros(len(numbers), dtype=torch.long),
        n_graphs=1,
    )


def graph_from_atoms(atoms: Atoms, cutoff: float, backend: str = "matscipy") -> Graph:
    """Build the graph of one structure. Raises StructureError for what has no neighbour list."""
    neighbors = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff, backend)
    return graph_from_arrays(atoms.numbers.copy(), atoms.positions.copy(), atoms.cell.array.copy(), neighbors)


def within(graph: Graph, cutoff: float) -> Graph:
    """The graph without pairs beyond the cutoff."""
    near = edge_vectors(graph).square().sum(1) < cutoff**2
    if bool(near.all()):
        return graph
    return graph._replace(
        edge_src=graph.edge_src[near], edge_dst=graph.edge_dst[near], edge_shift=graph.edge_shift[near], edge_pair=None
    )


def collate(graphs: list[Graph]) -> Graph:
    """Put several graphs side by side, with no edge between them."""
    sizes = torch.tensor([len(g.numbers) for g in graphs])
    offsets = (sizes.cumsum(0) - sizes).tolist()
    counts = [0]
    for g in graphs:
        counts.append(counts[-1] + g.n_graphs)
    return Graph(
        numbers=torch.cat([g.numbers for g in graphs]),
        positions=torch.cat([g.positions for g in graphs]),
        cell=torch.cat([g.cell for g in graphs]),
        edge_src=torch.cat([g.edge_src + o for g, o in zip(graphs, offsets, strict=True)]),
        edge_dst=torch.cat([g.edge_dst + o for g, o in zip(graphs, offsets, strict=True)]),
        edge_shift=torch.cat([g.edge_shift for g in graphs]),
        batch=torch.cat([g.batch + c for g, c in zip(graphs, counts[:-1], strict=True)]),
        n_graphs=counts[-1],
        edge_pair=_collate_pairs(graphs),
    )


def _collate_pairs(graphs: list[Graph]) -> Tensor | None:
    if any(g.edge_pair is None for g in graphs):
        return None
    counts = torch.tensor([len(g.edge_src) for g in graphs])
    return torch.cat([g.edge_pair + o for g, o in zip(graphs, (counts.cumsum(0) - counts).tolist(), strict=True)])


def with_pairs(graph: Graph) -> Graph:
    """Find both directions of every pair of atoms: what depends on their distance is then evaluated once."""
    i, j, shift = graph.edge_dst, graph.edge_src, graph.edge_shift.long()
    flip = (i > j) | ((i == j) & (_sign(shift) < 0))
    key = torch.where(flip[:, None], torch.stack([j, i], 1), torch.stack([i, j], 1))
    key = torch.cat([key, torch.where(flip[:, None], -shift, shift)], 1)
    _, pair = torch.unique(key, dim=0, return_inverse=True)
    edge = torch.zeros(int(pair.max()) + 1 if len(pair) else 0, dtype=torch.long, device=pair.device)
    edge[pair] = torch.arange(len(pair), device=pair.device)  # any of the two
    return graph._replace(edge_pair=edge[pair])


def _sign(shift: Tensor) -> Tensor:
    """-1 or 1 by the first component that is not zero: opposite shifts have opposite signs."""
    x, y, z = shift.sign().unbind(1)
    return torch.where(x != 0, x, torch.where(y != 0, y, z))


def fragment(graph: Graph, size: int) -> Graph:
    """The neighbourhood of the first atom, grown until it has `size` atoms, with the edges within it."""
    n = len(graph.numbers)
    if n <= size:
        return graph
    device = graph.numbers.device
    inside = torch.zeros(n, dtype=torch.bool, device=device)
    inside[0] = True
    while int(inside.sum()) < size:
        reached = inside.clone()
        reached[graph.edge_src[inside[graph.edge_dst]]] = True
        if bool((reached == inside).all()):
            reached[int((~inside).nonzero()[0])] = True  # nothing else is connected: go on with another atom
        inside = reached
    atoms = inside.nonzero()[:, 0][:size]
    place = torch.full((n,), -1, device=device)
    place[atoms] = torch.arange(len(atoms), device=device)
    kept = (place[graph.edge_src] >= 0) & (place[graph.edge_dst] >= 0)
    return Graph(
        numbers=graph.numbers[atoms],
        positions=graph.positions[atoms],
        cell=graph.cell,
        edge_src=place[graph.edge_src[kept]],
        edge_dst=place[graph.edge_dst[kept]],
        edge_shift=graph.edge_shift[kept],
        batch=graph.batch[atoms],
        n_graphs=graph.n_graphs,
    )


def edge_vectors(graph: Graph) -> Tensor:
    """r_ij = r_j + S h - r_i, (E, 3) Å, differentiable in positions and cell."""
    if graph.n_graphs == 1:
        shift = graph.edge_shift @ graph.cell[0]
    else:
        shift = torch.einsum("ea,eab->eb", graph.edge_shift, graph.cell[graph.batch[graph.edge_dst]])
    return graph.positions[graph.edge_src] - graph.positions[graph.edge_dst] + shift


def volume(graph: Graph) -> Tensor:
    """|det h| of each structure, (B,) Å^3; positive for left-handed cells too."""
    a, b, c = graph.cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1).abs()


def sum_over_atoms(values: Tensor, graph: Graph) -> Tensor:
    """Add up per-atom values (N, ...) by structure: (B, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch, values)


def sum_over_structure_edges(values: Tensor, graph: Graph) -> Tensor:
    """Add up per-edge values (E, ...) by structure: (B, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch[graph.edge_dst], values)
