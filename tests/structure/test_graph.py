"""Graphs: batches, edge vectors, volumes, sums."""

import sys
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.neighborlist import neighbor_list as ase_neighbor_list
from helpers.systems import CUTOFF, NAMED, WITH_VOLUME, left_handed, triclinic
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.structure.graph import (
    Graph,
    Per,
    collate,
    copy_rows,
    edge_vectors,
    fields_of,
    fragment,
    graph_from_atoms,
    graphs_of_norms,
    padding,
    sum_over_atoms,
    sum_over_structure_edges,
    volume,
    with_pairs,
    within,
)
from segnn_ase.structure.skin import DeviceNeighbors, SkinGraphs


def graphs(*names: str) -> list[Graph]:
    return [with_pairs(graph_from_atoms(NAMED[name](), CUTOFF)) for name in names or NAMED]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "dimer_at_cutoff"])
def test_edge_vectors_equal_ase(name):
    graph = graph_from_atoms(NAMED[name](), CUTOFF)
    i, j, S, D = ase_neighbor_list("ijSD", NAMED[name](), CUTOFF)
    ours = np.column_stack([graph.edge_dst, graph.edge_src, graph.edge_shift, edge_vectors(graph)])
    theirs = np.column_stack([i, j, S, D])
    by_pair = [x[np.lexsort(x[:, :5].T)] for x in (ours, theirs)]
    np.testing.assert_allclose(*by_pair, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_graph_made_on_the_device_is_the_same(name):
    pytest.importorskip("torch_cluster")
    atoms = NAMED[name]()
    expected = graph_from_atoms(atoms, CUTOFF, "torch_cluster")
    graphs = SkinGraphs(CUTOFF, 0.0, "torch_cluster", torch.device("cpu"))
    graphs.neighbors = DeviceNeighbors(CUTOFF, 0.0, torch.device("cpu"))
    made = graphs(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    pairs = [np.column_stack([g.edge_dst, g.edge_src, g.edge_shift]) for g in (made, expected)]
    np.testing.assert_array_equal(*(x[np.lexsort(x.T)] for x in pairs))
    for field in ("numbers", "positions", "cell", "batch"):
        assert torch.equal(getattr(made, field), getattr(expected, field))
    assert [x.dtype for x in made[:7]] == [x.dtype for x in expected[:7]]


@pytest.mark.parametrize("name", NAMED)
def test_graphs_with_a_skin_have_all_pairs_and_know_how_near_atoms_can_be(name):
    atoms, graphs = NAMED[name](), SkinGraphs(CUTOFF, 0.6, "matscipy", torch.device("cpu"))
    rng = np.random.default_rng(0)
    for _ in range(15):
        geometry = atoms.positions, atoms.cell.array, atoms.pbc
        graph = graphs(atoms.numbers, *geometry)
        found, expected = within(graph, CUTOFF), graph_from_atoms(atoms, CUTOFF)
        for a, b in zip(found[:7], expected[:7], strict=True):
            assert torch.equal(a, b)
        distances = edge_vectors(expected).norm(dim=1)
        closest = float(distances.min()) if len(distances) else CUTOFF
        assert not graphs.apart(closest + 1e-9, atoms.cell.array)
        assert graphs.apart(closest - 1.3, atoms.cell.array)
        atoms.positions += rng.normal(0, 0.04, (len(atoms), 3))
    atoms.cell *= 1.01
    graphs(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    assert graphs.apart(0.0, np.eye(3)) is False
    atoms.numbers[0] += 1
    assert int(graphs(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc).numbers[0]) == atoms.numbers[0]


def test_collate_puts_structures_side_by_side():
    parts = graphs()
    batch = collate(parts)
    assert batch.n_graphs == len(parts)
    assert torch.equal(edge_vectors(batch), torch.cat([edge_vectors(g) for g in parts]))
    assert torch.equal(batch.batch[batch.edge_src], batch.batch[batch.edge_dst])
    assert torch.equal(batch.numbers[batch.edge_src], torch.cat([g.numbers[g.edge_src] for g in parts]))
    assert torch.bincount(batch.batch, minlength=batch.n_graphs).tolist() == [len(g.numbers) for g in parts]


def test_collate_of_batches_is_the_batch_of_all():
    parts = graphs()
    nested = collate([collate(parts[:3]), parts[3], collate(parts[4:])])
    for ours, expected in zip(nested, collate(parts), strict=True):
        assert (ours is expected is None) or torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))


def test_collate_of_one_is_that_one():
    (graph,) = graphs("triclinic")
    for ours, expected in zip(collate([graph]), graph, strict=True):
        assert (ours is expected is None) or torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))


CUES = {  # fields that someone may add: of every group, and indices of each kind
    "charge": Annotated[Tensor | None, Per("node")],
    "order": Annotated[Tensor | None, Per("edge")],
    "strength": Annotated[Tensor | None, Per("structure")],
    "partner": Annotated[Tensor | None, Per("node", "node")],
    "host": Annotated[Tensor | None, Per("edge", "structure")],
}
Cued = NamedTuple("Cued", [*get_type_hints(Graph, include_extras=True).items(), *CUES.items()])
Cued.to = Graph.to


def cued(graph: Graph) -> Cued:
    """With cues that follow from the other fields, so that they can be checked after whatever is done to a graph."""
    return Cued(
        *graph,
        charge=10.0 * graph.numbers + graph.positions[:, 0],
        order=graph.numbers[graph.edge_src] - 0.5 * graph.numbers[graph.edge_dst],
        strength=2.0 * graph.cell[:, 0],
        partner=torch.arange(len(graph.numbers)),
        host=graph.batch[graph.edge_dst],
    )


def assert_cues_follow(graph: Cued) -> None:
    expected = cued(Graph(*graph[: len(Graph._fields)]))
    for name in CUES:
        assert torch.equal(getattr(graph, name), getattr(expected, name)), name


def test_new_fields_go_through_all_that_is_done_to_graphs():
    parts = [cued(g) for g in graphs()]
    batch = collate(parts)
    assert_cues_follow(batch)
    cut, part = within(batch, 0.7 * CUTOFF), fragment(batch, 12)
    assert 0 < len(cut.edge_src) < len(batch.edge_src) and len(part.numbers) == 12 and len(part.edge_src)
    for graph in (cut, part, fragment(within(batch, 0.7 * CUTOFF), 20)):
        assert_cues_follow(graph)
        assert type(graph) is Cued and graph.edge_pair is None
    assert {x.device.type for x in batch.to("meta") if isinstance(x, Tensor)} == {"meta"}
    lacking = collate([parts[0], parts[1]._replace(charge=None)])
    assert lacking.charge is None and lacking.order is not None


def test_padding_and_copies_have_every_field():
    """As recordings of fixed size use them: room for more, then another graph in the same places."""
    one, other = (cued(graph_from_atoms(NAMED[name](), CUTOFF)) for name in ("triclinic", "left_handed"))
    assert len(one.numbers) == len(other.numbers)
    room = max(len(g.edge_src) for g in (one, other)) + 3
    spare = room - len(one.edge_src)
    padded = collate([one, padding(one, nodes=2, edges=spare)._replace(edge_dst=torch.ones(spare, dtype=torch.long))])
    lacking = {name for name, x in zip(Cued._fields, padded, strict=True) if x is None}
    assert lacking == {"edge_pair", "cues", "field"}
    assert [x.dtype for x in padded if isinstance(x, Tensor)] == [x.dtype for x in one if isinstance(x, Tensor)]
    n, last = len(one.numbers), [x[-1].clone() for x in padded if isinstance(x, Tensor)]
    assert padded.n_graphs == 2 and padded.edge_src[-1] == n and padded.edge_dst[-1] == n + 1
    places = [x.data_ptr() for x in padded if isinstance(x, Tensor)]
    for graph in (other, one, other):
        copy_rows(padded, graph, "node")
        copy_rows(padded, graph, "edge", fill=True)
        copy_rows(padded, graph, "structure")
        sizes = {"node": n, "edge": len(graph.edge_src), "structure": 1}
        for name, per in fields_of(Cued).items():
            x, expected = getattr(padded, name), getattr(graph, name)
            assert expected is None or torch.equal(x[: sizes[per.rows]], expected), name
        assert (padded.edge_src[sizes["edge"] :] == n).all() and (padded.edge_dst[sizes["edge"] :] == n + 1).all()
    assert places == [x.data_ptr() for x in padded if isinstance(x, Tensor)]
    assert all(torch.equal(a[-1], b) for a, b in zip((x for x in padded if isinstance(x, Tensor)), last, strict=True))
    with pytest.raises(ValueError, match="charge"):
        copy_rows(padded, one._replace(charge=None), "node")


def test_edge_vectors_are_differentiable_in_positions_and_cell():
    graph = collate(graphs("wire", "triclinic", "left_handed"))

    def vectors(positions, cell):
        return edge_vectors(graph._replace(positions=positions, cell=cell))

    assert torch.autograd.gradcheck(vectors, (graph.positions.requires_grad_(), graph.cell.requires_grad_()))


def test_volume_is_positive_for_left_handed_cells():
    right, left = graph_from_atoms(triclinic(), CUTOFF), graph_from_atoms(left_handed(), CUTOFF)
    assert torch.linalg.det(left.cell) < 0
    torch.testing.assert_close(volume(left), volume(right))


def test_volume_equals_ase():
    expected = torch.tensor([abs(NAMED[name]().get_volume()) for name in WITH_VOLUME], dtype=torch.float64)
    torch.testing.assert_close(volume(collate(graphs(*WITH_VOLUME))), expected)


def test_sums_over_atoms_and_edges_go_by_structure():
    parts = graphs("one_atom", "water", "wire")
    batch = collate(parts)
    atoms, edges = torch.ones(len(batch.numbers), 2), torch.ones(len(batch.edge_src))
    assert sum_over_atoms(atoms, batch).tolist() == [[len(g.numbers)] * 2 for g in parts]
    assert sum_over_structure_edges(edges, batch).tolist() == [len(g.edge_src) for g in parts]


def test_graph_owns_its_numbers_and_leaves_the_atoms_alone():
    atoms = NAMED["outside"]()
    graph = graph_from_atoms(atoms, CUTOFF)
    graph.positions.zero_()
    graph.cell.zero_()
    graph.numbers.zero_()
    assert atoms == NAMED["outside"]()


def test_graph_keeps_float64_and_moves_as_a_whole():
    (graph,) = graphs("triclinic")
    assert graph.positions.dtype == graph.cell.dtype == graph.edge_shift.dtype == torch.float64
    moved = graph.to("meta")
    assert moved.n_graphs == 1
    assert {x.device.type for x in moved if isinstance(x, torch.Tensor)} == {"meta"}


def test_structures_without_a_neighbor_list_are_refused():
    atoms = NAMED["water"]()
    atoms.pbc = True
    with pytest.raises(StructureError, match="span no volume"):
        graph_from_atoms(atoms, CUTOFF)


def test_what_is_known_of_distances_survives_new_elements():
    """The atoms may have moved by half the skin since the pairs were found, whatever they are called meanwhile."""
    graphs = SkinGraphs(CUTOFF, 1.0, "matscipy", torch.device("cpu"))
    cell, pbc = np.zeros((3, 3)), np.zeros(3, bool)
    for numbers, distance in (([6, 6], 1.0), ([6, 8], 1.98), ([6, 8], 0.02)):
        graphs(np.array(numbers), np.array([[0, 0, -distance / 2], [0, 0, distance / 2]]), cell, pbc)
    assert graphs.neighbors.rebuilds == 1
    assert not graphs.apart(0.05, cell)


def test_a_step_that_reuses_its_pairs_is_lean():
    """What did not change is the same tensor, and few functions are called: small molecules take a millisecond."""
    atoms, graphs, calls = triclinic(), SkinGraphs(CUTOFF, 1.0, "matscipy", torch.device("cpu")), []
    first = graphs(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    moved = atoms.positions + 0.01

    def count(frame, event, argument):
        if event == "call" and "segnn_ase" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    second = graphs(atoms.numbers, moved, atoms.cell.array, atoms.pbc)
    known = graphs.apart(0.0, atoms.cell.array)
    sys.setprofile(None)
    assert known and len(calls) <= 4, calls
    assert [name for name, a, b in zip(Graph._fields, first, second, strict=True) if a is not b] == ["positions"]
    assert torch.equal(second.positions, torch.tensor(moved))


def test_what_is_changed_in_place_is_noticed():
    atoms, graphs = triclinic(), SkinGraphs(CUTOFF, 1.0, "matscipy", torch.device("cpu"))
    given = atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc
    graphs(*given)
    atoms.cell.array[0] *= 1.001
    assert torch.equal(graphs(*given).cell[0], torch.tensor(atoms.cell.array)) and graphs.neighbors.rebuilds == 1
    assert not graphs.apart(-9.0, atoms.cell.array)
    atoms.numbers[0] = 8
    assert graphs(*given).numbers.tolist() == atoms.numbers.tolist() and graphs.neighbors.rebuilds == 1
    atoms.positions[0] += 2.0
    expected = within(graph_from_atoms(atoms, CUTOFF), CUTOFF)
    assert all(torch.equal(a, b) for a, b in zip(within(graphs(*given), CUTOFF)[:7], expected[:7], strict=True))


def test_what_norms_are_taken_from_has_few_pairs(monkeypatch):
    crystal = graph_from_atoms(bulk("Cu", cubic=True), 4.0)
    pairs = len(crystal.edge_src)
    assert len(graphs_of_norms([crystal] * 640)) == 64 and len(graphs_of_norms([crystal] * 3)) == 3
    monkeypatch.setattr("segnn_ase.structure.graph.PAIRS", 10 * pairs)
    some = graphs_of_norms([crystal] * 640)
    assert 5 <= len(some) <= 10
    monkeypatch.setattr("segnn_ase.structure.graph.PAIRS", pairs // 2)
    (part,) = graphs_of_norms([crystal] * 8)
    assert len(part.edge_src) <= pairs // 2 and len(part.numbers) == 2
