"""The gradient of a loss in compiled code on the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor

from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.cpu import CpuPasses
from segnn_ase.compiled.kernels import receiver_ranges
from segnn_ase.compiled.steps import Array, Place, Segment, Weight
from segnn_ase.compiled.training import CompiledLossGradient, Links

EDGE_WORK = 128  # all passes over an edge; see `kernels.WORK_PER_THREAD`
BEHIND = 64  # numbers that C may read and write behind the gradients, which are never used


class CpuLossGradient(CompiledLossGradient):
    """Every thread adds up gradients of its own."""

    name = "all passes in C"

    def _make(self, passes: dict[str, list[Segment]], weights: list[Weight], storage: dict) -> None:
        sizes = [w.parameter.numel() for w in weights]
        self._all = torch.zeros(torch.get_num_threads(), sum(sizes) + BEHIND, dtype=self._dtype)
        self._of = dict(zip(weights, self._all[0, : sum(sizes)].split(sizes), strict=True))
        self._passes = CpuPasses(passes, storage, self._dtype, self._of, self._all.shape[1])

    def _start(self, links: Links) -> None:
        counts = links.counts
        self._cuts = receiver_ranges(links.first, counts["node"], counts["edge"], EDGE_WORK, len(self._all))
        self._passes.reserve(counts, len(self._cuts) - 1)
        self._passes.weights.load()
        tensors = [links.first, links.src, links.pair]
        self._addresses = pointers([*tensors, torch.empty_like(links.pair)]), pointers([*tensors, links.kind])

    def _run(self, name: str, links: Links) -> None:
        if name == "dual":
            self._all.zero_()
        self._passes.run(name, links.counts, self._cuts, *self._addresses)

    def _at(self, role: str, array: Array) -> Tensor:
        return self._passes.at(Place(role, array))

    def _gradients(self) -> Iterable[tuple[Weight, Tensor]]:
        self._all[0] = self._all.sum(0)
        return self._of.items()
