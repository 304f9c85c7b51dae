"""Evaluation of a potential in compiled code on the CPU: energies, forces and stress without PyTorch's overhead."""

import ctypes
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu import HEADROOM, CpuPasses
from segnn_ase.compiled.kernels import receiver_ranges
from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.passes import evaluation
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, stress_of
from segnn_ase.model.repulsion import repelled
from segnn_ase.structure.graph import Graph, sum_over_atoms, within

EDGE_WORK = 20  # of an edge, in the units of `kernels.WORK_PER_THREAD`: 1,500 edges are worth a thread


class Links(NamedTuple):
    """The pairs within the cutoff, in order of their receivers; room for as many as there have been."""

    vectors: Tensor  # (E, 3) Å
    src: Tensor  # (E,) senders
    knot: Tensor  # (E,) of the radial tables
    first: Tensor  # (N + 1,) see `kernels.Topology`


class CpuEvaluator(Evaluator):
    """The network with tabulated radial functions; calls share memory, so one waits for the other.

    Raises CompilerError, and ValueError for radial functions that are too rough for tables.
    """

    name = "the network in C"

    def __init__(self, potential: Potential):
        self._dtype, self._cutoff = potential.dtype, potential.cutoff
        tables = radial_tables(potential)
        plan = self._plan = evaluation(make_steps(potential, tables.coefficients))
        passes = {"energies": plan.energies, "all": plan.everything}
        self._passes = CpuPasses(passes, plan.storage(), self._dtype, potential.config.lmax_attr)
        self._runtime = self._passes.runtime
        knots = round(self._cutoff / tables.step)
        self._numbers = (ctypes.c_double * 3)(self._cutoff, tables.step, knots)
        self._links, self._addresses, self._lock = _room_for(0, 0, self._dtype), None, Lock()
        self.elements = potential.elements(self._lonely(len(potential.species)))

    def _lonely(self, n: int) -> Tensor:
        """Epsilon of one atom of each species without neighbours."""
        self._make_room(n, 0)
        self._links.first[: n + 1] = 0
        self._run(torch.arange(n), 0, None)
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
        n, elements = len(kind), self.elements
        self._make_room(n, len(graph.edge_src))
        n_edges, close = self._find_edges(graph, kind)
        if n_edges < 0:
            return None
        self._run(kind, n_edges, elements.scale[kind] if wanted else None)
        vectors, src, _, first = self._links
        vectors, src, neighbors = vectors[:n_edges], src[:n_edges], first[: n + 1].diff()
        energies = elements.energies(kind, self._passes.at(self._plan.epsilon)[:n, 0])
        features, g = self._passes.at(self._plan.features)[:n].clone(), self._edge_gradient if wanted else None
        if close and elements.repels:
            near = graph._replace(edge_src=src, edge_dst=torch.repeat_interleave(neighbors))
            energies, g = repelled(energies, g, near, kind, vectors, elements.core)
        energy = sum_over_atoms(energies, graph)
        if not wanted:
            return Prediction(energy, energies, None, None, None, features, neighbors, close)
        forces, virial = self._gather(graph, n, g, stress)
        s = None if virial is None else stress_of(virial, graph)
        return Prediction(energy, energies, forces, s, g.double(), features, neighbors, close)

    def _make_room(self, n: int, n_pairs: int) -> None:
        nodes, pairs = len(self._links.first) - 1, len(self._links.src)
        if n > nodes or n_pairs > pairs:
            with torch.inference_mode(False):
                self._links = _room_for(max(n, nodes), max(int(HEADROOM * n_pairs), pairs), self._dtype)
                self._addresses = None

    def _find_edges(self, graph: Graph, kind: Tensor) -> tuple[int, bool]:
        """Put the pairs within the cutoff into `_links`: how many, and whether there are any within a core radius."""
        radii, close = self.elements.radii, ctypes.c_int64()
        given = pointers(
            [graph.positions.double(), graph.cell.double(), graph.edge_shift.double(), radii.double() ** 2]
        )
        vectors, src, _, first = self._links
        links = pointers([graph.batch, graph.edge_dst, graph.edge_src, kind, first, src])
        sizes = len(kind), len(graph.edge_src), len(radii)
        out = pointers([vectors])
        return self._runtime.edges(*sizes, self._cutoff**2, given, links, out, ctypes.byref(close)), close.value > 0

    def _run(self, kind: Tensor, n_edges: int, weight: Tensor | None) -> None:
        """The network on `_links`; weight (N,): of epsilon in the sum whose gradient goes to `_edge_gradient`."""
        n, passes, runtime = len(kind), self._passes, self._runtime
        _, src, _, first = self._links
        cuts = receiver_ranges(first, n, n_edges, EDGE_WORK)
        threads, bounds = len(cuts) - 1, (ctypes.c_int64 * len(cuts))(*cuts)
        counts = {"node": n, "pair": 0, "edge": n_edges}
        if passes.reserve(counts, threads) or self._addresses is None:
            self._addresses = self._find_addresses()
        links, values, gradients = self._addresses
        runtime.geometry(threads, bounds, links, self._numbers, values, gradients)
        if weight is not None:
            passes.at(self._plan.weight)[:n, 0] = weight
        passes.run("energies" if weight is None else "all", counts, cuts, links, pointers([first, src, src, kind]))
        if weight is not None:
            self._edge_gradient = torch.empty(n_edges, 3, dtype=self._dtype)
            out = pointers([self._edge_gradient])
            runtime.geometry_gradient(threads, bounds, links, self._numbers, values, gradients, out)

    def _find_addresses(self) -> tuple[ctypes.Array, ...]:
        """Links of the edges, geometry and its gradients; until something is moved."""
        vectors, src, knot, first = self._links
        values, gradients = (
            [self._passes.at(x) for x in places] for places in (self._plan.values, self._plan.gradients)
        )
        return pointers([first, src, src, knot]), pointers([vectors, *values]), pointers(gradients)

    def _gather(self, graph: Graph, n: int, g: Tensor, stress: bool) -> tuple[Tensor, Tensor | None]:
        """Forces (N, 3) and, with `stress`, virials sum r (x) g (B, 3, 3), float64, from g = dE/dr_ij."""
        forces = torch.zeros(n, 3, dtype=torch.float64)
        virial = torch.zeros(graph.n_graphs, 3, 3, dtype=torch.float64) if stress else None
        vectors, src, _, first = self._links
        links = pointers([graph.batch, first, src])
        self._runtime.gather(n, links, pointers([vectors, g]), pointers([forces, virial]))
        return forces, virial

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


def _room_for(n: int, n_pairs: int, dtype: torch.dtype) -> Links:
    whole = {"dtype": torch.long}
    return Links(
        torch.empty(n_pairs, 3, dtype=dtype),
        torch.empty(n_pairs, **whole),
        torch.empty(n_pairs, **whole),
        torch.zeros(n + 1, **whole),
    )
