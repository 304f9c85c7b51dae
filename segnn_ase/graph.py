"""`Graph`: one structure or a batch of them, as tensors; everything in Å, positions and cells in float64."""

from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.neighbors import NO_PAIRS, Neighbors, device_neighbor_list, neighbor_list


class Graph(NamedTuple):
    numbers: Tensor  # (N,) atomic numbers
    positions: Tensor  # (N, 3) Å
    cell: Tensor  # (B, 3, 3) Å, rows are lattice vectors
    edge_src: Tensor  # (E,) senders j
    edge_dst: Tensor  # (E,) receivers i
    edge_shift: Tensor  # (E, 3) cell shifts S
    batch: Tensor  # (N,) structure of each atom
    n_graphs: int

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


def graph_on_device(numbers, positions, cell, pbc, cutoff: float, device) -> Graph:
    """Build the graph where it is used: neighbours by torch-cluster, pairs are never copied to the host."""
    i, j, S = device_neighbor_list(positions, cell, pbc, cutoff, device)
    graph = graph_from_arrays(numbers, positions, cell, NO_PAIRS).to(device)
    return graph._replace(edge_src=j, edge_dst=i, edge_shift=S.double())


def graph_from_atoms(atoms: Atoms, cutoff: float, backend: str = "matscipy") -> Graph:
    """Build the graph of one structure. Raises StructureError for what has no neighbour list."""
    neighbors = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff, backend)
    return graph_from_arrays(atoms.numbers.copy(), atoms.positions.copy(), atoms.cell.array.copy(), neighbors)


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
    )


def edge_vectors(graph: Graph) -> Tensor:
    """r_ij = r_j + S h - r_i, (E, 3) Å, differentiable in positions and cell."""
    cell = graph.cell[graph.batch[graph.edge_dst]]
    shift = torch.einsum("ea,eab->eb", graph.edge_shift, cell)
    return graph.positions[graph.edge_src] - graph.positions[graph.edge_dst] + shift


def volume(graph: Graph) -> Tensor:
    """|det h| of each structure, (B,) Å^3; positive for left-handed cells too."""
    return torch.linalg.det(graph.cell).abs()


def sum_over_atoms(values: Tensor, graph: Graph) -> Tensor:
    """Add up per-atom values (N, ...) by structure: (B, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch, values)


def sum_over_structure_edges(values: Tensor, graph: Graph) -> Tensor:
    """Add up per-edge values (E, ...) by structure: (B, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch[graph.edge_dst], values)
