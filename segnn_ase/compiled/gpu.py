"""Passes over a network (`passes.py`) on a GPU: row operations compiled by Triton, matrix products by PyTorch.

All tensors have fixed places and sizes and no number is read back, so that a step can be recorded in a CUDA graph
(`gpu_recording.py`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from segnn_ase.compiled.kernels import Topology, kernel
from segnn_ase.compiled.passes import Storage
from segnn_ase.compiled.steps import MatrixProduct, Place, RowOperation, Segment, View, Weight, WeightGradient, steps_of


class GpuPasses:
    """Passes over one memory. `trained` are weights whose gradients are wanted, added up from each `clear` on. Raises
    CompilerError."""

    def __init__(
        self,
        segments: list[Segment],
        storage: dict[Place, Storage],
        dtype: torch.dtype,
        device: torch.device,
        *,
        trained: Sequence[Weight] = (),
    ):
        self._storage, self._dtype, self._device = storage, dtype, device
        self._counts: dict[str, int] = {}
        self._memory: dict[Storage, Tensor] = {}
        weights = {w for step in steps_of(segments) for w in step.weights()}
        self._weights = {w: (w.parameter.detach().double() * w.scale).to(device, dtype) for w in weights}
        self._changing = [w for w in weights if isinstance(w.whole, Parameter)]  # others are constants
        sizes = [w.parameter.numel() for w in trained]
        self._gradients = torch.zeros(sum(sizes), dtype=dtype, device=device)
        pieces = zip(trained, self._gradients.split(sizes), strict=True)
        self.gradients = {w: piece.view(w.parameter.shape) for w, piece in pieces}

    def load(self) -> None:
        """Take the present values of the parameters."""
        if self._changing:
            loaded = [self._weights[w] for w in self._changing]
            torch._foreach_copy_(loaded, [w.parameter.detach() for w in self._changing])
            torch._foreach_mul_(loaded, [w.scale for w in self._changing])

    def clear(self) -> None:
        """Gradients of weights are added up from zero on again."""
        self._gradients.zero_()

    def reserve(self, counts: dict[str, int]) -> None:
        """Make room for just so many nodes and edges."""
        if self._counts == counts:
            return
        self._counts = {}  # until all is there: what is half made must not be used
        rows = {**counts, "scratch": counts["node"]}
        with torch.inference_mode(False):  # the memory outlives this call
            for storage in set(self._storage.values()):
                known = self._memory.get(storage)
                if known is None or len(known) != rows[storage.where]:
                    shape = (rows[storage.where], storage.size)
                    self._memory[storage] = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._counts = dict(counts)

    def at(self, place: Place) -> Tensor:
        return self._memory[self._storage[place]]

    def tensors(self) -> list[Tensor]:
        """What is read and written."""
        return [*self._memory.values(), *self._weights.values()]

    def run(self, segments: Iterable[Segment], nodes: Topology, edges: Topology) -> None:
        there: set[Place] = set()  # what edges have added to
        alone = {where: edges._replace(n=n) for where, n in self._counts.items()} | {"node": nodes}
        for segment in segments:
            topology = edges if segment.summed else alone[segment.where]
            for step in segment.steps:
                if isinstance(step, RowOperation):
                    self._rows(step, topology, there)
                elif isinstance(step, MatrixProduct):
                    self._product(step)
                else:
                    self._weight_gradient(step)

    def _rows(self, step: RowOperation, topology: Topology, there: set[Place]) -> None:
        outputs = [self.gradients[x] if isinstance(x, Weight) else x and self.at(x) for x in step.outputs]
        if step.operation.edges:  # what several programs add to; gradients of edges go on adding up
            for place, x in zip(step.outputs, outputs, strict=True):
                if isinstance(place, Place) and place.array.where != "edge" and place not in there:
                    x.zero_()
                    there.add(place)
        inputs = [self._weights[x] if isinstance(x, Weight) else x and self.at(x) for x in step.inputs]
        kernel(step.operation).launch(step.order, topology, inputs, outputs)

    def _product(self, step: MatrixProduct) -> None:
        weight = self._weights[step.weight]
        weight = weight.T if step.transposed else weight
        a, c = self._matrix(step.a, weight.shape[0]), self._matrix(step.c, weight.shape[1])
        d = None if step.d is None else self._matrix(step.d, weight.shape[1])
        bias = None if step.bias is None else self._weights[step.bias]
        added = [x for x in (d, bias) if x is not None]
        if step.add:
            c.addmm_(a, weight)
        elif added:
            torch.addmm(added.pop(), a, weight, out=c)
        else:
            torch.mm(a, weight, out=c)
        for x in added:
            c += x

    def _weight_gradient(self, step: WeightGradient) -> None:
        total = self.gradients[step.weight]
        g = self._matrix(step.g, total.shape[-1])
        if step.a is None:
            total += g.sum(0)
        else:
            total.addmm_(self._matrix(step.a, len(total)).T, g)

    def _matrix(self, view: View, width: int) -> Tensor:
        """The rows of a view, (atoms * rows, width), in place."""
        return self.at(view.array).view(-1, view.stride)[:, view.offset : view.offset + width]
