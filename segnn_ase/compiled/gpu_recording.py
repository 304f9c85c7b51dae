"""A potential's evaluation as a CUDA graph: the whole step, from positions to forces, is recorded once and replayed.

A step of a small system is some hundred short kernels; to start them one by one from Python takes longer than to run
them. Everything recorded keeps its place and its size, so pairs are padded to a capacity with some headroom.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationError
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Prediction, predict
from segnn_ase.structure.graph import Graph

HEADROOM = 1.15  # of the pairs, so that a few more do not need another recording
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}  # sums of a GPU have no fixed order


class CapturedPredict:
    """`predict` on a GPU for one structure after another; what changes little is not recorded again.

    The padding is a structure of its own behind the others, two atoms of the first species that are further apart
    than the cutoff, with as many pairs as there is room for; its results are left out.
    """

    def __init__(self, potential: Potential):
        self.potential = potential
        self._state: tuple | None = None  # what has been recorded
        self._asked: tuple | None = None  # what was asked for last
        self._replay: Callable[[], Prediction] | None = None
        self._kept: tuple | None = None

    def __getstate__(self) -> dict:
        # a recording stays in its process
        return {"potential": self.potential, "_state": None, "_asked": None, "_replay": None, "_kept": None}

    def __call__(self, graph: Graph, *, forces: bool = True, stress: bool = False) -> Prediction:
        """See `predict`; the pairs must be sorted by receiver, and those beyond the cutoff do nothing.

        Recorded is what is asked for twice running. Raises AccelerationError if the replayed recording does not give
        what was recorded.
        """
        n, n_pairs = len(graph.numbers), len(graph.edge_src)
        state = (self.potential.engine, n, graph.n_graphs, forces, stress)
        known, self._asked = self._asked == state, state
        if self._state != state and not known:
            return predict(self.potential, graph, forces=forces, stress=stress)
        fresh = self._state != state or n_pairs > len(self._graph.edge_src)
        if fresh:
            self._state = self._replay = None  # until all is there
            self._graph = padded(graph, math.ceil(HEADROOM * n_pairs) + 1, self.potential)
            self._pairs = self._numbers = None
        self._copy(graph)
        if fresh:
            self._replay = self._record(forces, stress)
            self._state = state
        return _without_padding(self._replay(), n, graph.n_graphs)

    def _copy(self, graph: Graph) -> None:
        """Into the places that are read by the recording; what has not been replaced since is there already."""
        static, n, n_pairs = self._graph, len(graph.numbers), len(graph.edge_src)
        if self._numbers is not graph.numbers:
            if n and int(self.potential.species_index[graph.numbers].min()) < 0:
                raise ValueError(f"numbers has elements that are not of {self.potential.symbols}")
            static.numbers[:n].copy_(graph.numbers)
            static.batch[:n].copy_(graph.batch)
            self._numbers = graph.numbers
        if self._pairs is not graph.edge_src:
            static.edge_src[n_pairs:], static.edge_dst[n_pairs:], static.edge_shift[n_pairs:] = n, n + 1, 0.0
            for place, x in zip(static[3:6], graph[3:6], strict=True):
                place[:n_pairs].copy_(x)
            self._pairs = graph.edge_src
        static.positions[:n].copy_(graph.positions, non_blocking=True)
        static.cell[: graph.n_graphs].copy_(graph.cell, non_blocking=True)

    def _record(self, forces: bool, stress: bool) -> Callable[[], Prediction]:
        static, engine = self._graph, self.potential.engine

        def run() -> Prediction:
            return predict(self.potential, static, forces=forces, stress=stress)

        device = static.positions.device
        if device.type != "cuda":
            return run
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
            recording.replay()
        self._check(found, expected)
        # evaluations in between may replace what the recording reads and writes: it keeps its own
        tensors = [buffer.tensor for buffer in engine.buffers()]
        self._kept = (static, engine, tensors, self.potential.constants())

        def replay() -> Prediction:
            with torch.cuda.device(device):
                recording.replay()
            return found

        return replay

    def _check(self, found: Prediction, expected: Prediction) -> None:
        """Nothing may have been left out of the recording."""
        size = max(self.potential.scales)
        pairs = [("energies", size, found.energies, expected.energies)]
        if expected.forces is not None:
            pairs.append(("forces", max(size, float(expected.forces.abs().max())), found.forces, expected.forces))
        for name, size, a, b in pairs:
            if not float((a - b).abs().max()) <= ROUNDING[self.potential.dtype] * size:
                raise AccelerationError(f"the replayed CUDA graph does not give the {name} that were recorded")


def padded(graph: Graph, n_pairs: int, potential: Potential) -> Graph:
    """A graph of its own with room for as many pairs, two atoms and a structure more than there are."""
    n, device = len(graph.numbers), graph.positions.device
    apart = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0 * potential.cutoff]], dtype=torch.float64, device=device)
    two = torch.ones(2, dtype=torch.long, device=device)
    pairs = torch.full((n_pairs,), n, dtype=torch.long, device=device)
    return Graph(
        numbers=torch.cat([graph.numbers, two * potential.species[0]]),
        positions=torch.cat([graph.positions, apart]),
        cell=torch.cat([graph.cell, torch.eye(3, dtype=torch.float64, device=device)[None]]),
        edge_src=pairs,
        edge_dst=pairs + 1,
        edge_shift=torch.zeros(n_pairs, 3, dtype=torch.float64, device=device),
        batch=torch.cat([graph.batch, two * graph.n_graphs]),
        n_graphs=graph.n_graphs + 1,
    )


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
        close=p.close.clone() if isinstance(p.close, Tensor) else p.close,
    )
