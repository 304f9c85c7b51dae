"""Operations compiled for the machine they run on, with first and second derivatives for PyTorch's autograd."""

import ctypes
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.build import load_libraries, load_triton, pointers, runs_on_triton
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.triton_code import ROWS, lanes_of, triton_source

PROGRAMS = 4096  # that a large GPU can hold at a time
MAX_PARTS = 16  # of a receiver's edges, on a GPU
MOST_THREADS = 4096
WORK_PER_THREAD = 30_000  # rows times channels below which another thread costs more than it saves


class Topology(NamedTuple):
    """Rows of an operation: for nodes only their number n. Edges are sorted by receiver: those of receiver i are
    first[i] ... first[i + 1] - 1 (N + 1,), with sender src, number of their pair of atoms, and place in a radial
    table, (E,) each; pair or knot may be missing where it is not used."""

    n: int
    first: Tensor | None = None
    src: Tensor | None = None
    pair: Tensor | None = None
    knot: Tensor | None = None

    def parts(self, edges: bool, work: int) -> list[int]:
        """Cut the receivers, or rows, into one range per thread."""
        if edges:
            return receiver_ranges(self.first, self.n, int(self.first[-1]), work)
        threads = _threads(self.n * work)
        return [self.n * t // threads for t in range(threads + 1)]


def receiver_ranges(first: Tensor, n: int, n_edges: int, work: int, most: int = MOST_THREADS) -> list[int]:
    """Cut n receivers into one range for each of at most so many threads, of equal numbers of edges; work: of one."""
    threads = min(most, _threads(n_edges * work))
    if threads == 1 or n == 0:
        return [0, n]
    targets = torch.tensor([n_edges * t // threads for t in range(1, threads)])
    return [0, *torch.searchsorted(first[: n + 1], targets).tolist(), n]


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), 1 + work // WORK_PER_THREAD)


class Output(NamedTuple):
    """A tensor to be written: its shape, and where its rows go (see `Operand`)."""

    shape: tuple[int, ...]
    where: str


class Kernel:
    """An operation that runs: compiled on demand for each dtype and order of derivative."""

    def __init__(self, operation: Operation):
        self.operation = operation
        self._libraries: dict = {}
        self._where: dict[int, str] = {}  # where the gradient of each input goes
        for o in operation.inputs:
            if not o.constant:
                # a tensor read by receivers and by senders is written by both
                self._where[o.tensor] = "sender" if "sender" in (o.where, self._where.get(o.tensor)) else o.where

    def library(self, order: "int | str", dtype: torch.dtype) -> ctypes.CDLL:
        if (order, dtype) not in self._libraries:
            (library,) = load_libraries([(self.operation, order)], dtype)
            self._libraries[order, dtype] = library
        return self._libraries[order, dtype]

    def launch(self, order: "int | str", topology: Topology, tensors, outputs: list[Tensor | None]) -> None:
        """Run on a GPU into tensors that are there; what is added to must be zero, or what it is to be added to."""
        if topology.n == 0:
            return
        if (order, "triton") not in self._libraries:
            self._libraries[order, "triton"] = load_triton(triton_source(self.operation, order))
        kernel, parts = self._libraries[order, "triton"], 1
        grid: tuple[int, ...] = (min(topology.n, PROGRAMS),)
        if self.operation.rows_are_lanes:
            grid = (-(-topology.n // ROWS),)
        elif self.operation.edges:
            while parts < MAX_PARTS and topology.n * parts < PROGRAMS:
                parts *= 2
            grid = (topology.n, parts)
        links = (topology.first, topology.src, topology.pair, topology.knot)
        device = next(t.device for t in tensors if t is not None)
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                kernel[grid](topology.n, *links, *tensors, *outputs, **_options(self.operation, order, tensors))
        except Exception as error:  # Triton's have no common base
            raise CompilerError(f"Triton does not compile or run a kernel: {type(error).__name__}: {error}") from error

    def __call__(self, topology: Topology, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _Forward.apply(self, topology, *tensors)

    def run(self, order: int, topology: Topology, tensors, outputs: list[Output | None]) -> tuple[Tensor | None, ...]:
        """Call the compiled code; outputs: shape of each written tensor and where its rows go, None for none."""
        operation, dtype, device = self.operation, tensors[0].dtype, tensors[0].device
        tensors = [None if t is None else t.contiguous() for t in tensors]
        if any(t is not None and (t.dtype is not dtype or t.device != device) for t in tensors):
            raise TypeError(f"fused kernels need tensors of one dtype and device, not {[t.dtype for t in tensors]}")
        if runs_on_triton(device):
            zeros = [None if p is None else torch.zeros(p.shape, dtype=dtype, device=device) for p in outputs]
            self.launch(order, topology, tensors, zeros)
            return tuple(zeros)
        bounds = topology.parts(operation.edges, operation.channels)
        parts = len(bounds) - 1
        written: list[Tensor | None] = []
        addresses: list[tuple[int | None, int]] = []  # of each output, and the distance to the next thread's
        for place in outputs:
            if place is None:
                written.append(None)
                addresses.append((None, 0))
                continue
            # several threads would add to one row: each has its own, added up at the end
            private = parts > 1 and place.where in ("sender", "pair", "knot", "shared")
            new = torch.empty if place.where == "row" else torch.zeros
            w = new((parts, *place.shape) if private else place.shape, dtype=dtype)
            written.append(w)
            addresses.append((w.data_ptr(), w.stride(0) * w.element_size() if private else 0))
        written_to = [a if a is None else a + t * step for t in range(parts) for a, step in addresses]
        links = (topology.first, topology.src, topology.pair, topology.knot)
        self.library(order, dtype).run(
            parts,
            (ctypes.c_int64 * len(bounds))(*bounds),
            pointers(links),
            pointers(tensors),
            (ctypes.c_void_p * len(written_to))(*written_to),
            len(written),
        )
        return tuple(w.sum(0) if step else w for w, (_, step) in zip(written, addresses, strict=True))

    def input_places(self, tensors) -> list[Output | None]:
        """Shapes and destinations of gradients with respect to the inputs; None for constants."""
        return [Output(t.shape, self._where[k]) if k in self._where else None for k, t in enumerate(tensors)]

    def output_places(self, topology: Topology) -> list[Output | None]:
        return [Output((topology.n, o.size), o.where) for o in self.operation.outputs]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Kernel, topology: Topology, *tensors):
        ctx.kernel, ctx.topology = kernel, topology
        ctx.save_for_backward(*tensors)
        return kernel.run(0, topology, tensors, kernel.output_places(topology))

    @staticmethod
    def backward(ctx, *gradients):
        out = _Backward.apply(ctx.kernel, ctx.topology, len(gradients), *gradients, *ctx.saved_tensors)
        return (None, None, *out)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Kernel, topology: Topology, n: int, *tensors):
        ctx.kernel, ctx.topology, ctx.n = kernel, topology, n
        ctx.save_for_backward(*tensors)
        gradients, inputs = tensors[:n], tensors[n:]
        return kernel.run(1, topology, (*inputs, *gradients), kernel.input_places(inputs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *directions):
        kernel, topology, n = ctx.kernel, ctx.topology, ctx.n
        gradients, inputs = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        places = [*kernel.input_places(inputs), *kernel.output_places(topology)]
        out = kernel.run(2, topology, (*inputs, *gradients, *directions), places)
        return (None, None, None, *out[len(inputs) :], *out[: len(inputs)])


def _options(operation: Operation, order: "int | str", tensors) -> dict:
    """For Triton. Two float32 channels a lane are loaded and added at once, and a sum over channels needs no barrier
    where they are all in one warp; with fewer registers more warps hide what the gradients of edges wait for."""
    lanes, single = lanes_of(operation), any(t is not None and t.dtype is torch.float32 for t in tensors)
    paired = single and not operation.rows_are_lanes
    options = {"num_warps": max(1, lanes // (64 if paired else 32)), "enable_fp_fusion": True}
    if operation.edges and order == 1 and single:
        options["maxnreg"] = 128 if lanes > 32 else 168
    return options


kernel = cache(Kernel)  # of an operation, compiled once
