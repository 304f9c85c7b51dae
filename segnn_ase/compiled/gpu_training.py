"""The gradient of a loss on a GPU: row operations by Triton, matrix products by PyTorch, each pass a CUDA graph.

The passes of a batch of molecules are some hundred short kernels, which take longer to start than to run. So each pass
is recorded, for as many atoms and pairs as the largest batch so far has, and replayed.
"""

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled.gpu import GpuPasses
from segnn_ase.compiled.gpu_recording import HEADROOM, ROUNDING, recorded
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.steps import Array, Place, Segment, Weight
from segnn_ase.compiled.training import CompiledLossGradient, TrainingLinks


class GpuLossGradient(CompiledLossGradient):
    """What is run the second time in the same room is recorded. The atoms behind those of a batch have no pairs, and
    the pairs behind have vectors of an earlier batch, but no edges."""

    name = "all passes by Triton"

    def _make(self, passes: dict[str, list[Segment]], weights: list[Weight], storage: dict) -> None:
        everything = [segment for segments in passes.values() for segment in segments]
        self._segments = passes
        self._passes = GpuPasses(everything, storage, self._dtype, self._potential.device, trained=weights)
        self._room: dict[str, int] = {}  # of nodes, pairs and edges
        self._seen: set[str] = set()  # passes that have been run in this room
        self._replays: dict[str, Callable] = {}
        self._failed = False

    def _start(self, links: TrainingLinks) -> None:
        if any(n > self._room.get(name, 0) for name, n in links.counts.items()):
            self._make_room(links)
        static, n, n_edges = self._static, links.counts["node"], links.counts["edge"]
        static.first[: n + 1], static.first[n + 1 :] = links.first, n_edges
        static.kind[:n], static.kind[n:] = links.kind, 0
        static.src[:n_edges], static.pair[:n_edges] = links.src, links.pair

    def _make_room(self, links: TrainingLinks) -> None:
        self._replays, self._seen, self._room = {}, set(), {}  # until all is there
        room = {name: max(math.ceil(HEADROOM * n), 1) for name, n in links.counts.items()}
        self._passes.reserve(room)
        for vectors in (self._network.vectors, self._network.pair_vectors):
            self._at("value", vectors)[:] = 0.5 * self._potential.cutoff  # any that have directions
            self._at("tangent", vectors).zero_()
        sizes = {"first": room["node"] + 1, "src": room["edge"], "pair": room["edge"], "kind": room["node"]}
        places = {name: getattr(links, name).new_zeros(size) for name, size in sizes.items()}
        self._static, self._room = TrainingLinks(counts=room, **places), room

    def _run(self, name: str, links: TrainingLinks) -> None:
        if name in self._replays:
            self._replays[name]()
        elif name not in self._seen or self._failed or not self._record(name):
            self._seen.add(name)
            self._run_once(name)

    def _run_once(self, name: str) -> None:
        if name == "value":
            self._passes.load()
        if name == "dual":
            self._passes.clear()
        static = self._static
        nodes = Topology(static.counts["node"], static.first, static.src, static.pair, static.kind)
        self._passes.run(self._segments[name], nodes, nodes._replace(knot=None))

    def _record(self, name: str) -> bool:
        """Whether that works and gives what it gave when it was recorded."""
        try:
            replay, expected = recorded(lambda: self._outcome(name), self._potential.device)
            before = torch.cat([x.flatten() for x in expected])  # the replay writes to the same places
            off = (torch.cat([x.flatten() for x in replay()]) - before).abs().max()
            if not float(off) <= ROUNDING[self._dtype] * float(before.abs().max()):
                raise AccelerationError(f"the {name} pass gives something else when it is replayed")
        except (AccelerationError, RuntimeError) as error:  # the latter are CUDA's
            self._failed, self._replays = True, {}
            message = f"the passes are not recorded as CUDA graphs, their kernels are started one by one: {error}"
            warnings.warn(message, AccelerationWarning, stacklevel=5)
            return False
        self._replays[name] = replay
        return True

    def _outcome(self, name: str) -> list[Tensor]:
        """Run a pass without a recording, which again changes nothing; what others take from it."""
        self._run_once(name)
        network = self._network
        last = {"gradient": [network.vectors, network.pair_vectors], "dual": []}.get(name, [network.epsilon])
        return [self._at(name, x) for x in last] or list(self._passes.gradients.values())

    def _at(self, role: str, array: Array) -> Tensor:
        return self._passes.at(Place(role, array))

    def _gradients(self) -> Iterable[tuple[Weight, Tensor]]:
        return self._passes.gradients.items()
