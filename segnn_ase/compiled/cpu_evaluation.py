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
from segnn_ase.structure.graph import Graph, within

EDGE_WORK = 20  # of an edge, in the units of `kernels.WORK_PER_THREAD`: 1,500 edges are worth a thread


class Links:
    """The pairs within the cutoff, in order of their receivers: first edges of the atoms, senders and knots."""

    def __init__(self, n: int, n_pairs: int):
        self.n, self.n_pairs = n, n_pairs
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
        self._squares = self.elements.radii.double() ** 2
        self._last = (torch.zeros(0), torch.zeros(0))  # atomic numbers and species of the atoms met last

    def _lonely(self, n: int) -> Tensor:
        """Epsilon of one atom of each species without neighbours."""
        self._make_room(n, 0, 1)
        self._links.first.zero_()
        self._run("energies", torch.arange(n), 0, [0, n])
        return self._passes.at(self._plan.epsilon)[:n, 0].clone()

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        known = self._last
        if known[0] is not graph.numbers:
            known = self._last = (graph.numbers, self.elements.kinds(graph.numbers))
        with self._lock:
            found = self._evaluate(graph, known[1], forces or stress, stress)
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
        n = kind.shape[0]
        self._make_room(n, 0, 1)
        n_edges, close = self._find_edges(graph, kind)
        if n_edges < 0:
            return None
        cuts = receiver_ranges(self._links.first, n, n_edges, EDGE_WORK)
        if self._make_room(n, n_edges, len(cuts) - 1):
            self._find_edges(graph, kind)
        at, core, added = self._passes.at, None, None
        vectors, g = at(self._plan.vectors), at(self._plan.gradient) if wanted else None
        if close and self.elements.repels:
            core, vectors = self._put_apart(graph, kind, vectors[:n_edges])
        self._run("all" if wanted else "energies", kind, n_edges, cuts)
        if core is not None:
            added = torch.zeros(n, dtype=torch.float64)
            added, g = repelled(added, g if g is None else g[:n_edges], vectors, core)
        return self._finish(graph, kind, n_edges, vectors, g, added, stress)._replace(close=close)

    def _make_room(self, n: int, n_edges: int, threads: int) -> bool:
        """Whether anything was moved."""
        moved = self._passes.reserve({"node": n, "pair": 0, "edge": n_edges}, threads)
        room = self._passes.capacity
        if self._links.n < room["node"] or self._links.n_pairs < room["edge"]:
            self._links, moved = Links(room["node"], room["edge"]), True
        return moved

    def _find_edges(self, graph: Graph, kind: Tensor) -> tuple[int, bool]:
        """Put the pairs within the cutoff into `_links`, their vectors and the weights of atoms into the memory, as far
        as there is room: how many pairs there are, and whether any are within a core radius."""
        links, close, at = self._links, ctypes.c_int64(), self._passes.at
        given = [graph.positions.double(), graph.cell.double(), graph.edge_shift.double()]
        given += [self._squares, self.elements.scale]
        tensors = [graph.batch, graph.edge_dst, graph.edge_src, kind, links.first, links.src, links.knot]
        n_edges = self._runtime.edges(
            *(kind.shape[0], graph.edge_src.shape[0], self._squares.shape[0], links.n_pairs),
            *(self._limits, pointers(given), pointers(tensors)),
            *(pointers([at(self._plan.vectors), at(self._plan.weight)]), ctypes.byref(close)),
        )
        return n_edges, close.value > 0

    def _put_apart(self, graph: Graph, kind: Tensor, vectors: Tensor) -> tuple[Core | None, Tensor]:
        """Let the network see the pairs of the core further apart than they are; their true vectors (E, 3) Å."""
        n_edges, (_, step, knots) = len(vectors), self._limits
        receivers = torch.repeat_interleave(self._links.first[: kind.shape[0] + 1].diff())
        near = graph._replace(edge_src=self._links.src[:n_edges], edge_dst=receivers)
        core, true = core_of(near, kind, vectors, self.elements.core), vectors.clone()
        vectors.copy_(seen_by_network(true, core))
        self._links.knot[:n_edges] = (vectors.norm(dim=1) / step).long().clamp_max(int(knots) - 1)
        return core, true

    def _run(self, name: str, kind: Tensor, n_edges: int, cuts: list[int]) -> None:
        links, counts = self._links, {"node": kind.shape[0], "pair": 0, "edge": n_edges}
        on_nodes = pointers([links.first, links.src, links.src, kind])
        self._passes.run(name, counts, cuts, links.addresses, on_nodes)

    def _finish(
        self,
        graph: Graph,
        kind: Tensor,
        n_edges: int,
        vectors: Tensor,
        g: Tensor | None,
        added: Tensor | None,
        stress: bool,
    ) -> Prediction:
        """Sums over what lies in the memory. g: dE/dr_ij of all vectors, or None; added: to the energies, or None."""
        n, at, elements = kind.shape[0], self._passes.at, self.elements
        energies, energy = torch.empty(n, dtype=torch.float64), torch.zeros(graph.n_graphs, dtype=torch.float64)
        neighbors, features = torch.empty(n, dtype=torch.long), at(self._plan.features)
        copied, forces, virial, gradients = features.new_empty(n, features.shape[1]), None, None, None
        if g is not None:
            forces = torch.zeros(n, 3, dtype=torch.float64)
            gradients = torch.empty(n_edges, 3, dtype=torch.float64)
            virial = torch.zeros(graph.n_graphs, 3, 3, dtype=torch.float64) if stress else None
        links = pointers([graph.batch, self._links.first, self._links.src, kind, neighbors])
        given = pointers([elements.reference, elements.scale, added])
        rows = pointers([vectors, g, at(self._plan.epsilon), elements.isolated, features, copied])
        out = pointers([energies, energy, forces, virial, gradients])
        self._runtime.finish(n, features.shape[1], links, rows, given, out)
        s = None if virial is None else stress_of(virial, graph)
        return Prediction(energy, energies, forces, s, gradients, copied, neighbors)

    def newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        if self._newness is None or self._newness.known is not known:
            self._newness = chosen_newness(CompiledNewness, known, self._cutoff, graph, kind)
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
