"""The gradient of a loss on a GPU: row operations by Triton, matrix products by PyTorch."""

from collections.abc import Iterable

from torch import Tensor

from segnn_ase.compiled.gpu import GpuPasses
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.steps import Array, Place, Segment, Weight
from segnn_ase.compiled.training import CompiledLossGradient, Links


class GpuLossGradient(CompiledLossGradient):
    name = "all passes by Triton"

    def _make(self, passes: dict[str, list[Segment]], weights: list[Weight], storage: dict) -> None:
        everything = [segment for segments in passes.values() for segment in segments]
        self._segments = passes
        self._passes = GpuPasses(everything, storage, self._dtype, self._potential.device, trained=weights)

    def _start(self, links: Links) -> None:
        self._passes.reserve(links.counts)
        self._passes.load()

    def _run(self, name: str, links: Links) -> None:
        nodes = Topology(links.counts["node"], links.first, links.src, links.pair, links.kind)
        self._passes.run(self._segments[name], nodes, nodes._replace(knot=None))

    def _at(self, role: str, array: Array) -> Tensor:
        return self._passes.at(Place(role, array))

    def _gradients(self) -> Iterable[tuple[Weight, Tensor]]:
        return self._passes.gradients.items()
