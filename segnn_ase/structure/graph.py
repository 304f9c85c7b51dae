"""`Graph`: one structure or a batch of them, as tensors; everything in Å, positions and cells in float64.

A field says with `Per` whether it has a row for each node (atom), edge or structure, and what its values number, where
they are indices. Whatever joins, selects, pads or copies graphs goes by that: a new field is declared in `Graph` alone.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, get_type_hints

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.base.errors import StructureError, expect
from segnn_ase.structure.neighbors import Neighbors, neighbor_list


class Per(NamedTuple):
    """What the rows of a field belong to, and what its values number: "node", "edge" or "structure"."""

    rows: str
    values: str = ""  # of a field that holds no indices


class AnyGraph(Protocol):
    """What all graphs have, those of atoms and those of other bodies, whose fields say what they are by `Per`."""

    @property
    def edge_src(self) -> Tensor: ...
    @property
    def batch(self) -> Tensor: ...
    @property
    def n_graphs(self) -> int: ...


G = TypeVar("G", bound=AnyGraph)
STRUCTURES, PAIRS = 64, 150_000  # whose norms are taken, and pairs in them, at most
FEW = 4  # structures with a sum of their own: additions of many pairs to one place wait for each other on a GPU


class Graph(NamedTuple):
    numbers: Annotated[Tensor, Per("node")]  # (N,) atomic numbers
    positions: Annotated[Tensor, Per("node")]  # (N, 3) Å
    cell: Annotated[Tensor, Per("structure")]  # (B, 3, 3) Å, rows are lattice vectors
    edge_src: Annotated[Tensor, Per("edge", "node")]  # (E,) senders j
    edge_dst: Annotated[Tensor, Per("edge", "node")]  # (E,) receivers i
    edge_shift: Annotated[Tensor, Per("edge")]  # (E, 3) cell shifts S
    batch: Annotated[Tensor, Per("node", "structure")]  # (N,) structure of each atom
    n_graphs: int
    # (E,) an edge of the same pair of atoms, the same one for both directions
    edge_pair: Annotated[Tensor | None, Per("edge", "edge")] = None
    cues: Annotated[Tensor | None, Per("node")] = None  # (N, width) what a potential is told besides, see `model.cues`
    field: Annotated[Tensor | None, Per("structure")] = None  # (B, 3) V/Å, a uniform electric field
    periodic: Annotated[Tensor | None, Per("structure")] = None  # (B, 3) in which directions it repeats; None: in none

    def to(self, device) -> "Graph":
        return type(self)(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


@cache
def fields_of(kind: type) -> dict[str, Per]:
    """The tensors of a graph by their names."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def counts_of(graph: AnyGraph) -> dict[str, int]:
    """How many nodes, edges and structures there are."""
    return {"node": len(graph.batch), "edge": len(graph.edge_src), "structure": graph.n_graphs}


def graph_from_arrays(numbers, positions, cell, pbc, neighbors: Neighbors) -> Graph:
    periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), 3).copy()
    return Graph(
        numbers=torch.as_tensor(numbers, dtype=torch.long),
        positions=torch.as_tensor(positions, dtype=torch.float64),
        cell=torch.as_tensor(np.asarray(cell), dtype=torch.float64).view(1, 3, 3),
        edge_src=torch.as_tensor(neighbors.j, dtype=torch.long),
        edge_dst=torch.as_tensor(neighbors.i, dtype=torch.long),
        edge_shift=torch.as_tensor(neighbors.S, dtype=torch.float64),
        batch=torch.zeros(len(numbers), dtype=torch.long),
        n_graphs=1,
        periodic=torch.from_numpy(periodic)[None],
    )


def graph_from_atoms(atoms: Atoms, cutoff: float, backend: str = "matscipy") -> Graph:
    """Build the graph of one structure. Raises StructureError for what has no neighbour list."""
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    neighbors = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff, backend)
    numbers, positions, cell = (x.copy() for x in (atoms.numbers, atoms.positions, atoms.cell.array))
    return graph_from_arrays(numbers, positions, cell, atoms.pbc, neighbors)


def within(graph: Graph, cutoff: float) -> Graph:
    """The graph without pairs beyond the cutoff."""
    near = edge_vectors(graph).square().sum(1) < cutoff**2
    return graph if bool(near.all()) else select(graph, near)


def select(graph: Graph, edges: Tensor, nodes: Tensor | None = None) -> Graph:
    """Some edges (a mask) and, if given, some nodes (their indices), which hold both ends of all these edges.

    All structures stay; what numbers edges is left out.
    """
    chosen, place = {"edge": edges, "node": nodes, "structure": None}, None
    if nodes is not None:
        place = torch.full_like(graph.batch, -1).index_copy(0, nodes, torch.arange(len(nodes), device=nodes.device))
    fields = {}
    for name, per in fields_of(type(graph)).items():
        x, rows = getattr(graph, name), chosen[per.rows]
        if per.values == "edge" or x is None:
            fields[name] = None
            continue
        x = x if rows is None else x[rows]
        fields[name] = place[x] if per.values == "node" and place is not None else x
    return graph._replace(**fields)


def collate(graphs: list[G]) -> G:
    """Put several graphs side by side, with no edge between them; a field that one of them lacks is left out."""
    kind: Any = type(graphs[0])
    sizes = [counts_of(g) for g in graphs]
    starts = {rows: list(accumulate((size[rows] for size in sizes), initial=0)) for rows in sizes[0]}
    fields = {}
    for name, per in fields_of(kind).items():
        parts = [getattr(g, name) for g in graphs]
        complete = all(x is not None for x in parts)
        if complete and per.values:
            parts = [x + start for x, start in zip(parts, starts[per.values], strict=False)]
        fields[name] = torch.cat(parts) if complete else None
    return kind(**fields, n_graphs=starts["structure"][-1])


def padding(like: Graph, *, nodes: int, edges: int) -> Graph:
    """One structure whose rows are all zero, with the fields of another graph, to be put behind it by `collate`."""
    sizes, fields = {"node": nodes, "edge": edges, "structure": 1}, {}
    for name, per in fields_of(type(like)).items():
        x = getattr(like, name)
        fields[name] = None if x is None else x.new_zeros(sizes[per.rows], *x.shape[1:])
    return type(like)(**fields, n_graphs=1)


def copy_rows(target: Graph, source: Graph, rows: str, *, fill: bool = False) -> None:
    """Overwrite the first rows of the nodes, edges or structures of a graph, in place, by all of a smaller one.

    fill: the rows behind become like the very last one. Raises ValueError where only one of both has a field.
    """
    for name in (name for name, per in fields_of(type(target)).items() if per.rows == rows):
        place, x = getattr(target, name), getattr(source, name)
        if (place is None) != (x is None):
            raise ValueError(f"only one of two graphs has {name}; expected both or none, for rows to be copied")
        if x is not None:
            place[: len(x)].copy_(x, non_blocking=True)
            if fill:
                place[len(x) :] = place[-1:].clone()


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


def graphs_of_norms(graphs: list[Graph]) -> list[Graph]:
    """Evenly from the whole set: frames often come sorted by kind, and norms from crystals alone explode in a melt. All
    are evaluated at once, and so they have a limited number of pairs; of a single one that has more it is a part."""
    most = STRUCTURES
    chosen = graphs[:: -(-len(graphs) // most)]
    while sum(len(graph.edge_src) for graph in chosen) > PAIRS and len(chosen) > 1:
        most //= 2
        chosen = graphs[:: -(-len(graphs) // most)]
    if len(chosen) > 1 or len(chosen[0].edge_src) <= PAIRS:
        return chosen
    return [fragment(chosen[0], len(chosen[0].numbers) * PAIRS // len(chosen[0].edge_src))]


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
    inside = torch.zeros_like(inside).index_fill(0, atoms, True)
    return select(graph, inside[graph.edge_src] & inside[graph.edge_dst], atoms)


def edge_vectors(graph: Graph) -> Tensor:
    """r_ij = r_j + S h - r_i, (E, 3) Å, differentiable in positions and cell."""
    if graph.n_graphs == 1:
        shift = graph.edge_shift @ graph.cell[0]
    else:
        # no product of matrices, which a GPU makes one by one
        shift = (graph.edge_shift[:, :, None] * graph.cell[graph.batch[graph.edge_dst]]).sum(1)
    return graph.positions[graph.edge_src] - graph.positions[graph.edge_dst] + shift


def volume(graph: Graph) -> Tensor:
    """|det h| of each structure, (B,) Å^3; positive for left-handed cells too."""
    a, b, c = graph.cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1).abs()


def sum_over_atoms(values: Tensor, graph: AnyGraph) -> Tensor:
    """Add up per-atom values (N, ...) by structure: (B, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch, values)


def sum_over_structure_edges(values: Tensor, graph: Graph) -> Tensor:
    """Add up per-edge values (E, ...) by structure: (B, ...)."""
    if graph.n_graphs == 1:
        return values.sum(0, keepdim=True)
    owner = graph.batch[graph.edge_dst]
    if graph.n_graphs > FEW:
        return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, owner, values)
    owner = owner.view(-1, *[1] * (values.dim() - 1))
    return torch.stack([values.masked_fill(owner != b, 0).sum(0) for b in range(graph.n_graphs)])


def refuse_wire(pbc: Sequence[bool]) -> None:
    """Raise StructureError where charges repeat in one direction."""
    if sum(map(bool, pbc)) == 1:
        raise StructureError(
            f"pbc is {[bool(x) for x in pbc]}; the charges of `electrostatics` are summed up in molecules, slabs and "
            "crystals: make a wire a crystal with vacuum, whose copies then see its charges"
        )
