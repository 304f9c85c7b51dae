"""Evaluation of a potential in compiled code on the CPU: energies, forces and stress without PyTorch's overhead."""

import ctypes
from operator import is_
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.build import address, pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.cpu_watch import CpuWatch
from segnn_ase.compiled.kernels import receiver_ranges
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.newness import CompiledNewness, PlainNewness, SortedPairs, chosen_newness
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.elements import Elements
from segnn_ase.model.newness import KnownSurroundings
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, stress_of
from segnn_ase.model.repulsion import Core, core_of, repelled, seen_by_network
from segnn_ase.model.watch import Judgement, Watched
from segnn_ase.structure.graph import Graph, within

EDGE_WORK = 20  # of an edge, in the units of `kernels.WORK_PER_THREAD`: 1,500 edges are worth a thread


class Rows(NamedTuple):
    """Where the passes have what goes in and comes out; there may be more rows than are used."""

    vectors: Tensor  # of edges
    gradient: Tensor
    epsilon: Tensor  # of atoms
    features: Tensor
    weight: Tensor


class Links:
    """The pairs within the cutoff, in order of their receivers: first edges of the atoms, senders and knots."""

    def __init__(self, n: int, n_pairs: int):
        self.n, self.n_pairs = n, n_pairs
        with torch.inference_mode(False):  # they outlive this call
            self.first = torch.zeros(n + 1, dtype=torch.long)  # see `kernels.Topology`
            self.src, self.knot = torch.empty(2, n_pairs, dtype=torch.long)
        self.addresses = pointers([self.first, self.src, self.src, self.knot])


class Addresses:
    """What C reads and writes as long as the tensors are the same: at a step only positions and results are others.

    The order is that of `edges`, `run_nodes` and `finish` in `cpu_runtime.c`.
    """

    def __init__(self, graph: Graph, kind: Tensor, links: Links, memory: Rows, elements: Elements):
        first, src, knot = links.first, links.src, links.knot
        squares, features = elements.radii.double() ** 2, memory.features
        self.of = _what_stays(graph, kind, links, memory)
        self.given = pointers([None, graph.cell.double(), graph.edge_shift.double(), squares, elements.scale])
        self.pairs = pointers([graph.batch, graph.edge_dst, graph.edge_src, kind, first, src, knot])
        self.vectors = pointers([memory.vectors, memory.weight])
        self.nodes = pointers([first, src, src, kind])
        self.links = pointers([graph.batch, first, src, kind, None])
        self.rows = pointers([memory.vectors, memory.gradient, memory.epsilon, elements.isolated, features, None])
        self.elements = pointers([elements.reference, elements.scale, None])
        self.seen = SortedPairs(kind, memory.vectors, first, src)


def _what_stays(graph: Graph, kind: Tensor, links: Links, memory: Rows) -> tuple:
    pairs = graph.batch, graph.edge_dst, graph.edge_src, graph.edge_shift
    return *pairs, graph.cell, kind, links, memory


class Held(NamedTuple):
    """SortedPairs of a graph that are in the memory."""

    graph: Graph
    addresses: Addresses
    n_edges: int
    close: bool  # whether any are within a core radius
    cuts: list[int]  # of the receivers, one range for each thread


class Apart(NamedTuple):
    """SortedPairs of the core are further apart for the network than they are."""

    core: Core
    vectors: Tensor  # (E, 3) Å, the true ones


class CpuEvaluator(Evaluator):
    """The network with tabulated radial functions; calls share memory, so one waits for the other.

    Raises CompilerError, and ValueError for radial functions that are too rough for tables.
    """

    name = "the network in C"

    def __init__(self, potential: Potential):
        self._dtype, self._cutoff = potential.dtype, potential.cutoff
        tables = radial_tables(potential)
        plan = self._plan = evaluation(make_steps(potential, tables))
        passes = {"energies": plan.energies, "all": plan.everything}
        self._passes = CpuPasses(passes, plan.storage(), self._dtype)
        self._runtime = self._passes.runtime
        self._limits = (ctypes.c_double * 3)(self._cutoff, tables.step, round(self._cutoff / tables.step))
        self._links, self._lock = Links(0, 0), Lock()
        self._memory: Rows | None = None
        self._known_addresses: Addresses | None = None
        self._newness: CompiledNewness | PlainNewness | None = None
        self._watch: CpuWatch | None = None
        self.elements = potential.elements(self._lonely(len(potential.species)))
        self._last = (torch.zeros(0), torch.zeros(0))  # atomic numbers and species of the atoms met last

    def _lonely(self, n: int) -> Tensor:
        """Epsilon of one atom of each species without neighbours."""
        self._make_room(n, 0, 1)
        self._links.first.zero_()
        nodes = pointers([self._links.first, self._links.src, self._links.src, torch.arange(n)])
        self._run("energies", nodes, n, 0, [0, n])
        return self._passes.at(self._plan.epsilon)[:n, 0].clone()

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        kind = self._kinds(graph.numbers)
        with self._lock:
            found = self._evaluate(graph, kind, forces or stress, stress)
        return found or self._sorted(graph, forces=forces, stress=stress)

    def _kinds(self, numbers: Tensor) -> Tensor:
        known = self._last
        if known[0] is not numbers:
            known = self._last = (numbers, self.elements.kinds(numbers))
        return known[1]

    def _sorted(self, graph: Graph, *, forces: bool, stress: bool) -> Prediction:
        """The same for pairs in any order."""
        graph = within(graph, self._cutoff)
        order = torch.argsort(graph.edge_dst, stable=True)
        pairs = {name: getattr(graph, name)[order] for name in ("edge_src", "edge_dst", "edge_shift")}
        found = self(graph._replace(**pairs, edge_pair=None), forces=forces, stress=stress)
        if found.edge_gradients is None:
            return found
        return found._replace(
            edge_gradients=torch.empty_like(found.edge_gradients).index_copy_(0, order, found.edge_gradients)
        )

    def _evaluate(self, graph: Graph, kind: Tensor, wanted: bool, stress: bool) -> Prediction | None:
        """None for pairs that are not sorted by receiver."""
        held, apart = self._hold(graph, kind), None
        if held is None:
            return None
        if held.close and self.elements.repels:
            apart = self._put_apart(held, kind)
        name = "all" if wanted else "energies"
        self._run(name, held.addresses.nodes, kind.shape[0], held.n_edges, held.cuts)
        return self._finish(held, apart, wanted, stress)

    def _hold(self, graph: Graph, kind: Tensor) -> Held | None:
        """Have the pairs of a graph in the memory; None for pairs that are not sorted by receiver."""
        n, self._passes.holds = kind.shape[0], None
        self._make_room(n, 0, 1)
        n_edges, close = self._find_edges(graph, kind)
        if n_edges < 0:
            return None
        cuts = receiver_ranges(self._links.first, n, n_edges, EDGE_WORK)
        if self._make_room(n, n_edges, len(cuts) - 1):
            self._find_edges(graph, kind)
        held = self._passes.holds = Held(graph, self._addresses(graph, kind), n_edges, close, cuts)
        return held

    def _make_room(self, n: int, n_edges: int, threads: int) -> bool:
        """Whether anything was moved."""
        moved = self._passes.reserve({"node": n, "pair": 0, "edge": n_edges}, threads)
        room = self._passes.capacity
        if self._links.n < room["node"] or self._links.n_pairs < room["edge"]:
            self._links, moved = Links(room["node"], room["edge"]), True
        return moved

    def _addresses(self, graph: Graph, kind: Tensor) -> Addresses:
        at, plan, memory, known = self._passes.at, self._plan, self._memory, self._known_addresses
        if memory is None or memory.vectors is not at(plan.vectors):
            places = plan.vectors, plan.gradient, plan.epsilon, plan.features, plan.weight
            memory = self._memory = Rows(*map(at, places))
        if known is None or not all(map(is_, known.of, _what_stays(graph, kind, self._links, memory))):
            known = self._known_addresses = Addresses(graph, kind, self._links, memory, self.elements)
        return known

    def _find_edges(self, graph: Graph, kind: Tensor) -> tuple[int, bool]:
        """Put the pairs within the cutoff into `_links`, their vectors and the weights of atoms into the memory, as far
        as there is room: how many pairs there are, and whether any are within a core radius."""
        to, close, positions = self._addresses(graph, kind), ctypes.c_int64(), graph.positions.double().contiguous()
        to.given[0] = positions.data_ptr()
        n_edges = self._runtime.edges(
            *(kind.shape[0], graph.edge_src.shape[0], len(self.elements.symbols), self._links.n_pairs),
            *(self._limits, to.given, to.pairs, to.vectors, ctypes.byref(close)),
        )
        return n_edges, close.value > 0

    def _put_apart(self, held: Held, kind: Tensor) -> Apart | None:
        """Let the network see the pairs of the core further apart than they are."""
        graph, n_edges, (_, step, knots) = held.graph, held.n_edges, self._limits
        self._passes.holds, vectors = None, self._memory.vectors[:n_edges]
        receivers = torch.repeat_interleave(self._links.first[: kind.shape[0] + 1].diff())
        near = graph._replace(edge_src=self._links.src[:n_edges], edge_dst=receivers)
        core, true = core_of(near, kind, vectors, self.elements.core), vectors.clone()
        vectors.copy_(seen_by_network(true, core))
        self._links.knot[:n_edges] = (vectors.norm(dim=1) / step).long().clamp_max(int(knots) - 1)
        return core and Apart(core, true)

    def _run(self, name: str, nodes: ctypes.Array, n: int, n_edges: int, cuts: list[int]) -> None:
        self._passes.run(name, {"node": n, "pair": 0, "edge": n_edges}, cuts, self._links.addresses, nodes)

    def _finish(self, held: Held, apart: Apart | None, wanted: bool, stress: bool) -> Prediction:
        """Sums over what lies in the memory; wanted: whether derivatives are."""
        graph, to, memory, exact = held.graph, held.addresses, self._memory, torch.float64
        n, n_graphs, width = graph.numbers.shape[0], graph.n_graphs, memory.features.shape[1]
        energies, energy = torch.empty(n, dtype=exact), torch.empty(n_graphs, dtype=exact)
        neighbors, features = torch.empty(n, dtype=torch.long), torch.empty(n, width, dtype=self._dtype)
        forces = virial = gradients = None
        if wanted:
            forces, gradients = torch.empty(n, 3, dtype=exact), torch.empty(held.n_edges, 3, dtype=exact)
            virial = torch.empty(n_graphs, 3, 3, dtype=exact) if stress else None
        vectors, g, added = memory.vectors, memory.gradient if wanted else None, None
        if apart is not None:
            g = None if g is None else g[: held.n_edges]
            added, g = repelled(torch.zeros(n, dtype=exact), g, vectors := apart.vectors, apart.core)
        to.links[4], to.elements[2], to.rows[5] = neighbors.data_ptr(), address(added), features.data_ptr()
        to.rows[0], to.rows[1] = vectors.data_ptr(), address(g)
        out = (ctypes.c_void_p * 5)(*map(address, (energies, energy, forces, virial, gradients)))
        self._runtime.finish(n, n_graphs, width, to.links, to.rows, to.elements, out)
        s = None if virial is None else stress_of(virial, graph)
        return Prediction(energy, energies, forces, s, gradients, features, neighbors, held.close)

    def judge(self, graph: Graph, p: Prediction, volume: float | None, watched: Watched) -> Judgement | None:
        with self._lock:
            held = self._passes.holds
            if held is None or held.graph is not graph or held.addresses is not self._known_addresses:
                held = self._hold(graph, self._kinds(graph.numbers))
            if held is None or p.neighbors is None:
                return None
            if self._watch is None or self._watch.watched is not watched:
                newness = self._newness_for(watched.surroundings, graph, held.addresses.seen.kind)
                self._watch = CpuWatch(watched, self._runtime, p.features, newness)
            return self._watch(graph, p, volume, held.addresses.seen, len(held.cuts) - 1)

    def _newness_for(
        self, known: KnownSurroundings | None, graph: Graph, kind: Tensor
    ) -> CompiledNewness | PlainNewness | None:
        if known is None:
            return None
        if self._newness is None or self._newness.known is not known:
            self._newness = chosen_newness(CompiledNewness, known, self._cutoff, graph, kind)
        return self._newness
