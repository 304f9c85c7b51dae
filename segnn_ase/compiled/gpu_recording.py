"""A step on a GPU as a CUDA graph: all of it, from positions to forces, is recorded once and replayed.

A step of a small system is some hundred short kernels; to start them one by one from Python takes longer than to run
them. Everything recorded keeps its place and its size, so pairs are padded to a capacity with some headroom.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled.gpu_evaluation import GpuEvaluator
from segnn_ase.compiled.gpu_newness import GpuNewness, as_newness
from segnn_ase.model.fingerprints import groups_by_element
from segnn_ase.model.newness import KnownSurroundings, Newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction
from segnn_ase.structure.graph import Graph, collate, copy_rows, padding

HEADROOM = 1.15  # of the pairs, so that a few more do not need another recording
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}  # sums of a GPU have no fixed order


class RecordingEvaluator(Evaluator):
    """`GpuEvaluator` for one structure after another; what is asked for twice running is recorded and replayed.

    The padding is a structure of its own behind the others, two atoms of the first species that are further apart
    than the cutoff, with as many pairs as there is room for; its results are left out. The pairs must be sorted by
    receiver. Where a recording fails, the kernels are started one by one from then on, with a warning, or with
    `require` AccelerationError is raised.
    """

    def __init__(self, potential: Potential, *, require: bool = False):
        self._inner, self._require = GpuEvaluator(potential), require
        self.name, self.elements = f"{self._inner.name}, recorded", self._inner.elements
        self._dtype, self._cutoff, self._first = potential.dtype, potential.cutoff, potential.species[0]
        self._failed = False
        self._state: tuple | None = None  # what has been recorded
        self._asked: tuple | None = None  # what was asked for last
        self._replays: dict[bool, tuple[Callable[[], Prediction], list[Tensor]]] = {}  # without and with the core
        self._newness: tuple | None = None  # of what surroundings, and its recording
        self._positions: Tensor | None = None  # of the structure that was evaluated last
        self._close = False  # whether atoms of the last structure were closer than their core radius

    def pairwise(self, graph: Graph) -> Tensor:
        return self._inner.pairwise(graph)

    def without_core(self) -> Evaluator:
        return self._inner.without_core()

    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        if along is not None:  # now and then
            return self._inner(graph, forces=forces, stress=stress, along=along)
        if not self._failed:
            try:
                return self._recorded(graph, forces, stress)
            except (AccelerationError, RuntimeError) as error:  # the latter are CUDA's
                self._give_up(error)
        return self._inner(graph, forces=forces, stress=stress)

    def newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        if self._state is not None and self._positions is graph.positions:
            try:
                found = self._recorded_newness(graph, kind, known)
                if found is not None:
                    return found
            except (AccelerationError, RuntimeError) as error:
                self._give_up(error)
        return self._inner.newness(graph, kind, known)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self._forget()
        if self._require:
            raise AccelerationError(f"the step cannot be recorded as a CUDA graph: {error}") from error
        message = f"the step is not recorded as a CUDA graph, its kernels are started one by one: {error}"
        warnings.warn(message, AccelerationWarning, stacklevel=4)

    def _forget(self) -> None:
        self._state, self._replays, self._newness = None, {}, None

    def _recorded(self, graph: Graph, forces: bool, stress: bool) -> Prediction:
        graph = graph._replace(edge_pair=None)  # of no use here
        n, n_pairs = len(graph.numbers), len(graph.edge_src)
        state = (n, graph.n_graphs, forces, stress)
        known, self._asked = self._asked == state, state
        if self._state != state and not known:
            return self._inner(graph, forces=forces, stress=stress)
        if self._state != state or n_pairs >= len(self._graph.edge_src):
            self._forget()  # until all is there
            self._graph = padded(graph, math.ceil(HEADROOM * n_pairs) + 1, self._first, self._cutoff)
            self._pairs = self._numbers = None
        self._copy(graph)
        self._positions = graph.positions
        found = self._replay(forces, stress, core=self._close)
        self._state, before, self._close = state, self._close, bool(found.close)
        if self._close and not before:
            found = self._replay(forces, stress, core=True)
        return _without_padding(found._replace(close=self._close), n, graph.n_graphs)

    def _replay(self, forces: bool, stress: bool, *, core: bool) -> Prediction:
        """The core is a matter of few structures, but takes as many kernels as the rest."""
        if core not in self._replays:
            replay = self._record(forces, stress, core)
            # evaluations in between may replace what is read and written
            self._replays[core] = replay, self._inner.passes.tensors()
        return self._replays[core][0]()

    def _recorded_newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        """Of the structure that has been evaluated last; None where it is not measured by `GpuNewness`."""
        if self._newness is None or self._newness[0] is not known:
            chosen, static = self._inner.newness_of(graph, kind, known), self._graph
            if not isinstance(chosen, GpuNewness):
                return None
            groups = groups_by_element(kind)  # without the padding

            def measure():
                return chosen.measured(static, self.elements.kinds(static.numbers), groups)

            replay, _ = recorded(measure, static.positions.device)
            self._newness = known, replay
        atoms, *others = self._newness[1]()
        bonds = others[1][: len(kind)]
        return as_newness((atoms[: len(kind)], others[0], bonds, others[2]))

    def _copy(self, graph: Graph) -> None:
        """Into the places that are read by the recording; what has not been replaced since is there already."""
        static, n = self._graph, len(graph.numbers)
        if self._numbers is not graph.numbers:
            if n and int(self.elements.index[graph.numbers].min()) < 0:
                raise ValueError(f"numbers has elements that are not of {list(self.elements.symbols)}")
            static.numbers[:n].copy_(graph.numbers)
            static.batch[:n].copy_(graph.batch)
            self._numbers, self._newness = graph.numbers, None
        if self._pairs is not graph.edge_src:
            if bool((graph.edge_dst[1:] < graph.edge_dst[:-1]).any()):
                raise ValueError("the pairs of the graph are not sorted by receiver")
            copy_rows(static, graph, "edge", fill=True)
            self._pairs = graph.edge_src
        static.positions[:n].copy_(graph.positions, non_blocking=True)
        static.cell[: graph.n_graphs].copy_(graph.cell, non_blocking=True)
        if static.cues is not None:
            static.cues[:n].copy_(graph.cues, non_blocking=True)
        if static.field is not None:
            static.field[: graph.n_graphs].copy_(graph.field, non_blocking=True)

    def _record(self, forces: bool, stress: bool, core: bool) -> Callable[[], Prediction]:
        static = self._graph

        def run() -> Prediction:
            return self._inner.of_sorted(static, forces=forces, stress=stress, core=core)

        replay, expected = recorded(run, static.positions.device)
        self._check(replay(), expected)
        return replay

    def _check(self, found: Prediction, expected: Prediction) -> None:
        """Nothing may have been left out of the recording."""
        size = float(self.elements.scale.max())
        pairs = [("energies", size, found.energies, expected.energies)]
        if expected.forces is not None:
            pairs.append(("forces", max(size, float(expected.forces.abs().max())), found.forces, expected.forces))
        for name, size, a, b in pairs:
            if not float((a - b).abs().max()) <= ROUNDING[self._dtype] * size:
                raise AccelerationError(f"the replayed CUDA graph does not give the {name} that were recorded")


def recorded(run: Callable, device: torch.device) -> tuple[Callable, Any]:
    """What runs it again, into the same places, and a result of before; on a CPU the function itself.

    What `run` refers to is read and stays; it must hold all that it reads.
    """
    if device.type != "cuda":
        return run, run()
    with torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):  # kernels are compiled and chosen before
            for _ in range(2):
                expected = run()
        here.wait_stream(side)
        recording = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(recording, stream=side):
                found = run()
        finally:
            torch.cuda.set_stream(here)  # a failure would leave the other one

    def replay(reads: Callable = run):
        with torch.cuda.device(device):
            recording.replay()
        return found

    return replay, expected


def padded(graph: Graph, n_pairs: int, species: int, cutoff: float) -> Graph:
    """A graph of its own with room for as many pairs, two atoms and a structure more than there are."""
    behind = padding(graph, nodes=2, edges=n_pairs - len(graph.edge_src))
    behind.numbers.fill_(species)
    behind.positions[1, 2] = 2.0 * cutoff
    behind.cell.copy_(torch.eye(3, dtype=behind.cell.dtype))
    behind.edge_dst.fill_(1)
    return collate([graph, behind])


def _without_padding(p: Prediction, n: int, n_graphs: int) -> Prediction:
    """Copies, as the next replay writes to the same places; gradients of pairs are left out."""

    def first(x: Tensor | None, count: int) -> Tensor | None:
        return None if x is None else x[:count].clone()

    return Prediction(
        energy=first(p.energy, n_graphs),
        energies=first(p.energies, n),
        forces=first(p.forces, n),
        stress=first(p.stress, n_graphs),
        edge_gradients=None,
        features=first(p.features, n),
        neighbors=first(p.neighbors, n),
        close=p.close,
        cue_gradients=first(p.cue_gradients, n),
        dipole=first(p.dipole, n_graphs),
        polarizability=first(p.polarizability, n_graphs),
    )
