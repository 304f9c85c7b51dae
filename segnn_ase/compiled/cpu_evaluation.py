"""Evaluation of a potential in compiled code on the CPU: energies, forces and stress without PyTorch's overhead."""

import ctypes
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.kernels import receiver_ranges
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.newness import CompiledNewness, PlainNewness, chosen_newness
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.newness import KnownSurroundings, Newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, stress_of
from segnn_ase.model.repulsion import Core, core_of, repelled, seen_by_network
from segnn_ase.structure.graph import Graph, sum_over_atoms, within

EDGE_WORK = 20  # of an edge, in the units of `kernels.WORK_PER_THREAD`: 1,500 edges are worth a thread


class Links:
    """The pairs within the cutoff, in order of their receivers: first edges of the atoms, senders and knots."""

    def __init__(self, n: int, n_pairs: int):
        with torch.inference_mode(False):  # they outlive this call
            self.first = torch.zeros(n + 1, dtype=torch.long)  # see `kernels.Topology`
            self.src, self.knot = torch.empty(2, n_pairs, dtype=torch.long)
        self.addresses = pointers([self.first, self.src, self.src, self.knot])


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
        self._newness: CompiledNewness | PlainNewness | None = None
        self.elements = potential.elements(self._lonely(len(potential.species)))

    def _lonely(self, n: int) -> Tensor:
        """Epsilon of one atom of each species without neighbours."""
        self._make_room(n, 0, 1)
        self._links.first.zero_()
        self._run(torch.arange(n), 0, [0, n], None)
        return self._passes.at(self._plan.epsilon)[:n, 0].clone()

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        kind = self.elements.kinds(graph.numbers)
        with self._lock:
            found = self._evaluate(graph, kind, forces or stress, stress)
        return found or self._sorted(graph, forces=forces, stress=stress)

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
        n, elements, at = len(kind), self.elements, self._passes.at
        self._make_room(n, 0, 1)
        n_edges, close = self._find_edges(graph, kind)
        if n_edges < 0:
            return None
        cuts = receiver_ranges(self._links.first, n, n_edges, EDGE_WORK)
        if self._make_room(n, n_edges, len(cuts) - 1):
            self._find_edges(graph, kind)
        vectors, g = at(self._plan.vectors)[:n_edges], at(self._plan.gradient)[:n_edges]
        neighbors, core = self._links.first[: n + 1].diff(), None
        if close and elements.repels:
            near = graph._replace(edge_src=self._links.src[:n_edges], edge_dst=torch.repeat_interleave(neighbors))
            core = core_of(near, kind, vectors, elements.core)
            vectors = self._put_apart(vectors, core)
        self._run(kind, n_edges, cuts, elements.scale[kind] if wanted else None)
        energies = elements.energies(kind, at(self._plan.epsilon)[:n, 0])
        features = at(self._plan.features)[:n].clone()
        energies, g = repelled(energies, g if wanted else None, vectors, core)
        energy = sum_over_atoms(energies, graph)
        if not wanted:
            return Prediction(energy, energies, None, None, None, features, neighbors, close)
        forces, virial = self._gather(graph, vectors, g, stress)
        s = None if virial is None else stress_of(virial, graph)
        return Prediction(energy, energies, forces, s, g.to(torch.float64, copy=True), features, neighbors, close)

    def _make_room(self, n: int, n_edges: int, threads: int) -> bool:
        """Whether anything was moved."""
        moved = self._passes.reserve({"node": n, "pair": 0, "edge": n_edges}, threads)
        room = self._passes.capacity
        if len(self._links.first) <= room["node"] or len(self._links.src) < room["edge"]:
            self._links, moved = Links(room["node"], room["edge"]), True
        return moved

    def _find_edges(self, graph: Graph, kind: Tensor) -> tuple[int, bool]:
        """Put the pairs within the cutoff into `_links` and their vectors into the memory, as far as there is room: how
        many there are, and whether any are within a core radius."""
        radii, links, close = self.elements.radii, self._links, ctypes.c_int64()
        given = [graph.positions.double(), graph.cell.double(), graph.edge_shift.double(), radii.double() ** 2]
        tensors = [graph.batch, graph.edge_dst, graph.edge_src, kind, links.first, links.src, links.knot]
        n_edges = self._runtime.edges(
            *(len(kind), len(graph.edge_src), len(radii), len(links.src)),
            *(self._limits, pointers(given), pointers(tensors)),
            *(self._passes.at(self._plan.vectors).data_ptr(), ctypes.byref(close)),
        )
        return n_edges, close.value > 0

    def _put_apart(self, vectors: Tensor, core: Core | None) -> Tensor:
        """Let the network see the pairs of the core further apart than they are; their true vectors (E, 3) Å."""
        true, (_, step, knots) = vectors.clone(), self._limits
        vectors.copy_(seen_by_network(true, core))
        self._links.knot[: len(true)] = (vectors.norm(dim=1) / step).long().clamp_max(int(knots) - 1)
        return true

    def _run(self, kind: Tensor, n_edges: int, cuts: list[int], weight: Tensor | None) -> None:
        """The network; weight (N,): of epsilon in the sum whose gradient is taken, too, if it is given."""
        n, passes, links = len(kind), self._passes, self._links
        if weight is not None:
            passes.at(self._plan.weight)[:n, 0] = weight
        on_nodes = pointers([links.first, links.src, links.src, kind])
        counts = {"node": n, "pair": 0, "edge": n_edges}
        passes.run("energies" if weight is None else "all", counts, cuts, links.addresses, on_nodes)

    def _gather(self, graph: Graph, vectors: Tensor, g: Tensor, stress: bool) -> tuple[Tensor, Tensor | None]:
        """Forces (N, 3) and, with `stress`, virials sum r (x) g (B, 3, 3), float64, from g = dE/dr_ij."""
        forces = torch.zeros(len(graph.numbers), 3, dtype=torch.float64)
        virial = torch.zeros(graph.n_graphs, 3, 3, dtype=torch.float64) if stress else None
        links = pointers([graph.batch, self._links.first, self._links.src])
        self._runtime.gather(len(forces), links, pointers([vectors, g]), pointers([forces, virial]))
        return forces, virial

    def newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        if self._newness is None or self._newness.known is not known:
            self._newness = chosen_newness(known, self._cutoff, graph, kind)
        return self._newness and self._newness(graph, kind)

    def inside_and_deviations(
        self, given: "list[Tensor | None]", forms: Tensor | None, limits: int, numbers: ctypes.Array
    ) -> tuple[bool, np.ndarray]:
        n, k, features = len(given[0]), 0, given[3]
        if forms is not None:
            k = features.shape[1]
            if forms.shape != (2, k, k) or not forms.dtype == features.dtype == self._dtype:
                raise ValueError(f"forms are {forms.dtype} {tuple(forms.shape)} for {k} features of {features.dtype}")
        out = np.empty(4 * n + 1 if k else 0)
        addresses = pointers([*given, forms])
        inside = self._runtime.watch(n, k, *addresses, limits, numbers, out.__array_interface__["data"][0])
        return bool(inside), out
