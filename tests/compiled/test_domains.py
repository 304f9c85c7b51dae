"""Where atoms of another process are asked for: two domains that exchange just that give what one process gives."""

import ctypes

import pytest
import torch
from helpers.systems import CUTOFF, NAMED

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.runtime import KINDS
from segnn_ase.compiled.steps import Place
from segnn_ase.structure.graph import edge_vectors, graph_from_atoms


class Domain:
    """Some atoms of a structure with all their pairs, and behind them copies of the neighbours that others own."""

    def __init__(self, potential, graph, owned: torch.Tensor):
        inside = torch.isin(graph.edge_dst, owned)
        ghosts = torch.tensor(sorted(set(graph.edge_src[inside].tolist()) - set(owned.tolist())), dtype=torch.long)
        self.atoms, self.n_owned, self.edges = torch.cat([owned, ghosts]), len(owned), inside
        place = torch.full((len(graph.numbers),), -1)
        place[self.atoms] = torch.arange(len(self.atoms))
        dst, order = place[graph.edge_dst[inside]].sort(stable=True)
        self.order = inside.nonzero()[:, 0][order]
        n, n_edges, ev = len(self.atoms), len(order), CpuEvaluator(potential)
        self.segments = ev._passes._passes["all"]
        self.ev, self.passes, self.kind = ev, ev._passes, potential.species_index[graph.numbers[self.atoms]]
        ev._make_room(n, n_edges, 1)
        links, vectors = ev._links, edge_vectors(graph)[self.order]
        self.passes.at(ev._plan.vectors)[:n_edges] = vectors
        links.src[:n_edges] = place[graph.edge_src[self.order]]
        links.first[: n + 1] = torch.searchsorted(dst, torch.arange(n + 1))
        links.knot[:n_edges] = (vectors.norm(dim=1) / ev._limits[1]).long()
        self.counts = {"node": n, "pair": 0, "edge": n_edges}
        self.bounds = (ctypes.c_int64 * 2)(0, n)
        weight = self.passes.at(ev._plan.weight)
        weight[:n] = 0
        weight[: self.n_owned, 0] = torch.tensor(potential.scales, dtype=torch.float64)[self.kind[: self.n_owned]]

    def run(self, k: int) -> None:
        where, summed, steps = self.passes._segments["all"][k]
        links = self.ev._links
        if summed:
            rows = (ctypes.c_int64 * 3)(*(self.counts[kind] for kind in KINDS))
            self.ev._runtime.run_edges(steps, 1, self.bounds, links.addresses, rows)
        else:
            nodes = pointers([links.first, links.src, links.src, self.kind])
            on = links.addresses if where == "edge" else nodes
            self.ev._runtime.run_nodes(steps, len(steps), self.counts[where], 1, on)

    def rows(self, place: Place) -> torch.Tensor:
        return self.passes.at(place)[: len(self.atoms)]

    def edge_gradients(self) -> torch.Tensor:
        return self.passes.at(self.ev._plan.gradient)[: self.counts["edge"]]


@pytest.mark.parametrize("variant", ["segnn", "uneven", "tfn"])
def test_two_domains_are_one_structure(variant, new_potential):
    potential = new_potential(variant)
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    expected = CpuEvaluator(potential).without_core()(graph)
    n = len(graph.numbers)
    domains = [Domain(potential, graph, torch.arange(n)[k::2]) for k in range(2)]
    asked = sent = 0
    for k in range(len(domains[0].segments)):
        here = [d.segments[k] for d in domains]
        for places in zip(*(segment.asked_for() for segment in here), strict=True):
            whole = torch.zeros(n, places[0].array.size, dtype=torch.float64)
            for d, place in zip(domains, places, strict=True):
                whole[d.atoms[: d.n_owned]] = d.rows(place)[: d.n_owned]
            for d, place in zip(domains, places, strict=True):
                d.rows(place)[:] = whole[d.atoms]
                asked += 1
        for d in domains:
            d.run(k)
        for places in zip(*(segment.sent_back() for segment in here), strict=True):
            whole = torch.zeros(n, places[0].array.size, dtype=torch.float64)
            for d, place in zip(domains, places, strict=True):
                whole.index_add_(0, d.atoms, d.rows(place))
            for d, place in zip(domains, places, strict=True):
                rows = d.rows(place)
                rows[: d.n_owned], rows[d.n_owned :] = whole[d.atoms[: d.n_owned]], 0
                sent += 1
    assert asked > sent > 0
    epsilon, g = torch.zeros(n, dtype=torch.float64), torch.zeros(len(graph.edge_src), 3, dtype=torch.float64)
    for d in domains:
        epsilon[d.atoms[: d.n_owned]] = d.rows(d.ev._plan.epsilon)[: d.n_owned, 0]
        g[d.order] = d.edge_gradients()
    kind = potential.species_index[graph.numbers]
    energies = CpuEvaluator(potential).elements.energies(kind, epsilon)
    torch.testing.assert_close(energies, expected.energies, rtol=0, atol=1e-12)
    torch.testing.assert_close(g, expected.edge_gradients, rtol=0, atol=1e-11)
