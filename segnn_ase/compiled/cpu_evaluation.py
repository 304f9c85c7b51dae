"""Evaluation of a potential in compiled code on the CPU: energies, forces and stress without PyTorch's overhead."""

import copy
import ctypes
from operator import is_
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.build import address, pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.cpu_watch import CpuWatch
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.newness import CompiledNewness, PlainNewness, SortedPairs, chosen_newness
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.runtime import CGraph
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.elements import Elements
from segnn_ase.model.newness import KnownSurroundings
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, in_any_order, stress_of, with_charges
from segnn_ase.model.readouts import columns_read
from segnn_ase.model.repulsion import core_of, pulled_back, repelled, seen_by_network
from segnn_ase.model.responses import in_field
from segnn_ase.model.watch import Judgement, Watched
from segnn_ase.structure.graph import Graph, sum_over_atoms, within

EDGES_PER_THREAD = 1500  # another thread for fewer costs more than it saves
EXACT = torch.float64


class Rows(NamedTuple):
    """Where the passes have what goes in and comes out; there may be more rows than are used."""

    vectors: Tensor  # of edges
    gradient: Tensor
    epsilon: Tensor  # of atoms
    features: Tensor
    weight: Tensor


class Links:
    """The pairs within the cutoff, in order of their receivers: first edges of the atoms, senders and knots."""

    def __init__(self, capacity: dict[str, int]):
        self.capacity = capacity  # of the passes that they are for
        with torch.inference_mode(False):  # they outlive this call
            self.first = torch.zeros(capacity["node"] + 1, dtype=torch.long)  # see `kernels.Topology`
            self.src, self.knot = torch.empty(2, capacity["edge"], dtype=torch.long)
        self.addresses = pointers([self.first, self.src, self.src, self.knot])


class Held:
    """A graph as C sees it, while its pairs are the same: at a step only positions, cell and results are others."""

    def __init__(self, graph: Graph, kind: Tensor, links: Links, memory: Rows, elements: Elements):
        self.of, self.graph, self.memory = _what_stays(graph, kind, links), graph, memory
        self.pairs = SortedPairs(kind, memory.vectors, links.first, links.src)
        tensors = {"batch": graph.batch, "receivers": graph.edge_dst, "senders": graph.edge_src, "kind": kind}
        tensors |= {"shifts": graph.edge_shift.double(), "core": elements.radii.double() ** 2, "scale": elements.scale}
        tensors |= {"reference": elements.reference, "isolated": elements.isolated, **memory._asdict()}
        tensors |= {"first": links.first, "src": links.src, "knot": links.knot}
        self._kept = {name: x.contiguous() for name, x in tensors.items()}
        self.scale = self._kept["scale"]
        self.c = CGraph(
            n=len(kind),
            n_pairs=len(graph.edge_src),
            n_graphs=graph.n_graphs,
            n_species=len(elements.symbols),
            width=memory.features.shape[1],
            room=links.capacity["edge"],
            room_for_threads=links.capacity["threads"],
            edges_per_thread=EDGES_PER_THREAD,
            **{name: x.data_ptr() for name, x in self._kept.items()},
        )
        self.address = ctypes.byref(self.c)

    def place(self, graph: Graph) -> None:
        """Take the positions and the cell of a graph with the same pairs."""
        self.graph, positions, cell = graph, graph.positions.double().contiguous(), graph.cell.double().contiguous()
        self._placed = positions, cell
        self.c.positions, self.c.cell = positions.data_ptr(), cell.data_ptr()

    def room(self, wanted: bool, stress: bool) -> tuple:
        """Where C will write energy, energies, features, and where they are wanted forces, gradients and virial."""
        c = self.c
        energy, energies = torch.empty(c.n_graphs, dtype=EXACT), torch.empty(c.n, dtype=EXACT)
        features = torch.empty(c.n, c.width, dtype=self.memory.features.dtype)
        forces = gradients = virial = None
        if wanted:
            forces, gradients = torch.empty(c.n, 3, dtype=EXACT), torch.empty(c.n_pairs, 3, dtype=EXACT)
            virial = torch.empty(c.n_graphs, 3, 3, dtype=EXACT) if stress else None
        results = energy, energies, features, forces, gradients, virial
        c.energy, c.energies, c.descriptors, c.forces, c.gradients, c.virial = map(address, results)
        return results


def _what_stays(graph: Graph, kind: Tensor, links: Links) -> tuple:
    return graph.batch, graph.edge_dst, graph.edge_src, graph.edge_shift, kind, links


class CpuEvaluator(Evaluator):
    """The network with tabulated radial functions; calls share memory, so one waits for the other.

    Raises CompilerError, and ValueError for radial functions that are too rough for tables.
    """

    name = "the network in C"

    def __init__(self, potential: Potential):
        self._dtype, self._cutoff = potential.dtype, potential.cutoff
        tables = radial_tables(potential)
        plan = self._plan = evaluation(make_steps(potential, tables), apart=potential.charges is not None)
        passes = {"energies": plan.energies, "all": plan.everything, "back": plan.back}
        self._passes = CpuPasses(passes, plan.storage(), self._dtype)
        self._runtime = self._passes.runtime
        self._limits = self._cutoff, tables.step, round(self._cutoff / tables.step)
        self._links, self._lock = Links(self._passes.capacity), Lock()
        self._held: Held | None = None
        self._newness: CompiledNewness | PlainNewness | None = None
        self._watch: CpuWatch | None = None
        self.elements = potential.elements(self._lonely(len(potential.species)))
        self._responses, self._charges = copy.deepcopy(potential.responses), copy.deepcopy(potential.charges)
        self._nothing = torch.zeros_like(self.elements.scale)
        self._last = (torch.zeros(0), torch.zeros(0))  # atomic numbers and species of the atoms met last

    def _lonely(self, n: int) -> Tensor:
        """Epsilon of one atom of each species without neighbours."""
        self._make_room(n, 0, 1)
        self._links.first.zero_()
        self._tell(None, n)
        nodes = pointers([self._links.first, self._links.src, self._links.src, torch.arange(n)])
        self._passes.run("energies", {"node": n, "pair": 0, "edge": 0}, [0, n], self._links.addresses, nodes)
        return self._passes.at(self._plan.epsilon)[:n, 0].clone()

    def _tell(self, cues: Tensor | None, n: int) -> None:
        """Cues of n atoms; None: nothing is told of them."""
        if self._plan.cues is not None:
            self._passes.at(self._plan.cues)[:n] = 0 if cues is None else cues

    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        kind = self._kinds(graph.numbers)
        with self._lock:
            if self._charges is None:
                seeds = None if self._responses is None else self._responses.seeds(graph)
                found = self._evaluate(graph, kind, forces or stress, stress, seeds)
            else:
                found = self._charged(graph, kind, forces or stress, stress)
            if found is not None and self._responses is not None:
                found = self._with_responses(graph, kind, found, along)
        if found is None:
            found = in_any_order(self, within(graph, self._cutoff), forces=forces, stress=stress, along=along)
        return found

    def _charged(self, graph: Graph, kind: Tensor, wanted: bool, stress: bool) -> Prediction | None:
        """First the charges, then with their potential the derivatives. None for pairs that are not sorted."""
        p = self._evaluate(graph, kind, False, False, None)
        if p is None:
            return None
        added = self._charges.long_range(self._read(len(kind)), graph, derivatives=wanted)
        if wanted:
            held = self._passes.holds  # none where there are cores in contact
            if held is None:
                p = self._evaluate(graph, kind, True, stress, added.slope)
            else:
                results = held.room(True, stress)
                self._seed(held.c.n, added.slope)
                self._runtime.run_found(held.address, *self._passes.in_c["back"])
                self._runtime.finish(held.address)
                p = self._prediction(held.c, results, graph)
        return with_charges(p, added, graph)

    def _seed(self, n: int, seeds: Tensor | None) -> None:
        """Weights of what is read out in the sum whose gradient is taken."""
        sizes = [place.array.size for place in self._plan.read_weight]
        for place, values in zip(self._plan.read_weight, columns_read(seeds, sizes), strict=True):
            self._passes.at(place)[:n] = 0 if values is None else values

    def _read(self, n: int) -> Tensor:
        return torch.cat([self._passes.at(x)[:n] for x in self._plan.read], dim=1)

    def _with_responses(self, graph: Graph, kind: Tensor, p: Prediction, along: Tensor | None) -> Prediction:
        added, responses = in_field(graph, self._responses.of_atoms(kind, self._read(len(kind))))
        energies = p.energies + added
        p = p._replace(energy=sum_over_atoms(energies, graph), energies=energies, **responses._asdict())
        if along is None:
            return p
        slopes = self._evaluate(graph, kind, True, False, -self._responses.slopes(along, graph), nothing=True)
        return p._replace(dipole_slopes=slopes.forces)

    def _kinds(self, numbers: Tensor) -> Tensor:
        known = self._last
        if known[0] is not numbers:
            known = self._last = (numbers, self.elements.kinds(numbers))
        return known[1]

    def _evaluate(
        self, graph: Graph, kind: Tensor, wanted: bool, stress: bool, seeds: Tensor | None, *, nothing: bool = False
    ) -> Prediction | None:
        """wanted: whether derivatives are, of the energy, or with `nothing` of nothing, and of what is read out times
        seeds (N, as much as that is). None for pairs that are not sorted by receiver."""
        held, segments = self._hold(graph, kind), self._passes.in_c["all" if wanted else "energies"]
        c, results = held.c, held.room(wanted, stress)
        self._tell(graph.cues, c.n)
        self._seed(c.n, seeds)
        c.scale, c.repels = address(self._nothing if nothing else held.scale), self.elements.repels
        if self._runtime.evaluate(held.address, *segments):
            self._passes.holds = held
        elif c.n_edges < 0:
            return None
        elif self._make_room(c.n, c.n_edges, c.threads):
            return self._evaluate(graph, kind, wanted, stress, seeds, nothing=nothing)
        else:
            self._evaluate_apart(held, segments, nothing=nothing)
        return self._prediction(c, results, graph)

    def _prediction(self, c: CGraph, results: tuple, graph: Graph) -> Prediction:
        """Of what C has written."""
        energy, energies, features, forces, gradients, s = results
        s = None if s is None else stress_of(s, graph)
        found = Prediction(energy, energies, forces, s, None, features, close=c.close > 0)
        if forces is None:
            return found
        found = found._replace(edge_gradients=gradients[: c.n_edges])
        if self._plan.cue_gradient is None:
            return found
        return found._replace(cue_gradients=self._passes.at(self._plan.cue_gradient)[: c.n].to(EXACT, copy=True))

    def _hold(self, graph: Graph, kind: Tensor) -> Held:
        """A graph for C, with what there is of room for its pairs, which are still to be found."""
        self._passes.holds = None
        self._make_room(kind.shape[0], 0, 1)
        held = self._held
        if held is None or not all(map(is_, held.of, _what_stays(graph, kind, self._links))):
            at, plan = self._passes.at, self._plan
            memory = Rows(*map(at, (plan.vectors, plan.gradient, plan.epsilon, plan.features, plan.weight)))
            held = self._held = Held(graph, kind, self._links, memory, self.elements)
            held.c.cutoff, held.c.knot_distance, knots = self._limits
            held.c.last_knot = knots - 1
        held.place(graph)
        held.c.repels, held.c.most_threads = self.elements.repels, torch.get_num_threads()
        return held

    def _make_room(self, n: int, n_edges: int, threads: int) -> bool:
        """Whether anything was moved."""
        moved = self._passes.reserve({"node": n, "pair": 0, "edge": n_edges}, threads)
        if self._links.capacity is not self._passes.capacity:
            self._links = Links(self._passes.capacity)
        return moved

    def _evaluate_apart(self, held: Held, segments: tuple, *, nothing: bool) -> None:
        """Let the network see the pairs of the core further apart than they are, and add their repulsion; `nothing`: do
        not add it."""
        c, links, (_, step, knots), n_edges = held.c, self._links, self._limits, held.c.n_edges
        seen = held.memory.vectors[:n_edges]
        receivers = torch.repeat_interleave(links.first[: c.n + 1].diff())
        near = held.graph._replace(edge_src=links.src[:n_edges], edge_dst=receivers)
        core, true = core_of(near, held.pairs.kind, seen, self.elements.core), seen.clone()
        seen.copy_(seen_by_network(true, core))
        links.knot[:n_edges] = (seen.norm(dim=1) / step).long().clamp_max(knots - 1)
        self._runtime.run_found(held.address, *segments)
        gradient, usual = held.memory.gradient[:n_edges] if c.forces else None, (c.vectors, c.gradient, c.added)
        added = torch.zeros(c.n, dtype=EXACT)
        if nothing:
            gradient = pulled_back(gradient, true, core)
        else:
            added, gradient = repelled(added, gradient, true, core)
        c.vectors, c.gradient, c.added = map(address, (true, gradient, added))
        self._runtime.finish(held.address)
        c.vectors, c.gradient, c.added = usual

    def judge(self, graph: Graph, p: Prediction, volume: float | None, watched: Watched) -> Judgement | None:
        with self._lock:
            held = self._held
            if held is None or held.graph is not graph or self._passes.holds is not held:
                held = self._find(graph, self._kinds(graph.numbers))
            if held is None:
                return None
            if self._watch is None or self._watch.watched is not watched:
                newness = self._newness_for(watched.surroundings, graph, held.pairs.kind)
                self._watch = CpuWatch(watched, self._runtime, p.features, newness)
            return self._watch(graph, p, volume, held.pairs, held.c.threads)

    def _find(self, graph: Graph, kind: Tensor) -> Held | None:
        """Have the pairs of a graph in the memory; None for pairs that are not sorted by receiver."""
        held = self._hold(graph, kind)
        if self._runtime.find_edges(held.address):
            self._passes.holds = held
            return held
        c = held.c
        return self._find(graph, kind) if c.n_edges >= 0 and self._make_room(c.n, c.n_edges, c.threads) else None

    def _newness_for(
        self, known: KnownSurroundings | None, graph: Graph, kind: Tensor
    ) -> CompiledNewness | PlainNewness | None:
        if known is None:
            return None
        if self._newness is None or self._newness.known is not known:
            self._newness = chosen_newness(CompiledNewness, known, self._cutoff, graph, kind)
        return self._newness
