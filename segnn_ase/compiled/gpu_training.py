"""The gradient of a loss on a GPU: row operations by Triton, matrix products by PyTorch, each pass a CUDA graph.

The passes of a batch of molecules are some hundred short kernels, which take longer to start than to run. So each pass
is recorded, for as many atoms and pairs as the largest batch so far has, and replayed.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled.gpu import GpuPasses
from segnn_ase.compiled.gpu_recording import HEADROOM, ROUNDING, recorded
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.steps import Array, Place, Segment, Weight
from segnn_ase.compiled.training import CompiledLossGradient, TrainingLinks
from segnn_ase.model.potential import Potential


class GpuLossGradient(CompiledLossGradient):
    """What is run the second time in the same room is recorded. The atoms behind those of a batch have no pairs, and
    the pairs behind have vectors, but no edges.

    Where a recording fails, the kernels are started one by one from then on, with a warning, or with `require`
    AccelerationError is raised.
    """

    name = "all passes by Triton"

    def __init__(self, potential: Potential, *, require: bool = False):
        super().__init__(potential)
        self._require = require

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
        for x, first in ((self._network.vectors, n_edges), (self._network.pair_vectors, links.counts["pair"])):
            self._at("value", x)[first:] = 0.5 * self._potential.cutoff  # any that have directions
            self._at("tangent", x)[first:] = 0.0  # whatever an earlier batch left there

    def _make_room(self, links: TrainingLinks) -> None:
        before, self._room = self._room, {}  # until all is there
        self._replays, self._seen = {}, set()
        room = {name: max(math.ceil(HEADROOM * n), before.get(name, 1)) for name, n in links.counts.items()}
        self._passes.reserve(room)
        sizes = {"first": room["node"] + 1, "src": room["edge"], "pair": room["edge"], "kind": room["node"]}
        places = {name: getattr(links, name).new_zeros(size) for name, size in sizes.items()}
        self._static, self._room = TrainingLinks(counts=room, **places), room

    def _run(self, name: str, links: TrainingLinks) -> None:
        if name in self._replays:
            self._replays[name]()
            return
        found = self._outcome(name)
        if name in self._seen and not self._failed and all(bool(x.isfinite().all()) for x in found):
            try:
                self._replays[name] = self._recorded(name)
            except (AccelerationError, RuntimeError) as error:  # the latter are CUDA's
                self._give_up(error)
                self._run_once(name)
        self._seen.add(name)

    def _run_once(self, name: str) -> None:
        if name == "value":
            self._passes.load()
        if name == "dual":
            self._passes.clear()
        static = self._static
        nodes = Topology(static.counts["node"], static.first, static.src, static.pair, static.kind)
        self._passes.run(self._segments[name], nodes, nodes._replace(knot=None))

    def _recorded(self, name: str) -> Callable:
        """What runs a pass again. Raises AccelerationError where that gives something else than before."""
        mine = weakref.proxy(self)  # who holds the recording
        replay, expected = recorded(lambda: mine._outcome(name), self._potential.device)
        before = torch.cat([x.flatten() for x in expected])  # the replay writes to the same places
        off = (torch.cat([x.flatten() for x in replay()]) - before).abs().max()
        if not float(off) <= ROUNDING[self._dtype] * float(before.abs().max()):
            raise AccelerationError(f"the {name} pass gives something else when it is replayed")
        return replay

    def _give_up(self, error: Exception) -> None:
        self._failed, self._replays = True, {}
        if self._require:
            raise AccelerationError(f"the passes cannot be recorded as CUDA graphs: {error}") from error
        message = f"the passes are not recorded as CUDA graphs, their kernels are started one by one: {error}"
        warnings.warn(message, AccelerationWarning, stacklevel=5)

    def _outcome(self, name: str) -> list[Tensor]:
        """Run a pass without a recording, which again changes nothing; what others take from it."""
        self._run_once(name)
        network = self._network
        slopes = [network.vectors, network.pair_vectors, *([] if network.cues is None else [network.cues])]
        last = {"gradient": slopes, "dual": []}.get(name, [network.epsilon])
        return [self._at(name, x) for x in last] or list(self._passes.gradients.values())

    def _at(self, role: str, array: Array) -> Tensor:
        return self._passes.at(Place(role, array))

    def _gradients(self) -> Iterable[tuple[Weight, Tensor]]:
        return self._passes.gradients.items()
