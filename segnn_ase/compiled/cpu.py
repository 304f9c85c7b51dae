"""Passes over a network (`passes.py`) in compiled code on the CPU.

Chunks of atoms go through all the steps between two messages, so that what is in between stays in the cache; several
threads share the chunks, and the edges of a message.
"""

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.build import load_libraries
from segnn_ase.compiled.c_steps import GradientOf, Panels, StepInC, TensorInC, privately, shape_of, steps_in_c
from segnn_ase.compiled.passes import Storage
from segnn_ase.compiled.runtime import CHUNK, KINDS, SLOTS, CSegment, CStep, Memory, Slot, load_runtime
from segnn_ase.compiled.steps import MatrixProduct, Place, RowOperation, Segment, Step, Weight, steps_of

HEADROOM = 1.15  # of the memory, so that it does not grow at every step
ALIGNED = 16  # numbers: a line of the cache
LARGE = 1 << 22  # bytes: two large pages


class PackedWeights:
    """Weights as the compiled steps read them: scaled, and those of matrix products cut into panels."""

    def __init__(self, steps: Iterable[Step], runtime: ctypes.CDLL, dtype: torch.dtype):
        self._runtime, self._dtype = runtime, dtype
        panels: dict[tuple[Weight, bool], None] = {}  # in the order in which they are read
        self._plain: dict[Weight, Tensor] = {}
        for step in steps:
            if isinstance(step, MatrixProduct):
                panels[step.weight, step.transposed] = None
                if step.bias is not None:
                    panels[step.bias, False] = None
            else:
                for weight in step.weights():
                    self._plain[weight] = torch.empty(weight.parameter.shape, dtype=dtype)
        self._panels = dict(zip(panels, in_one_piece([self._length(*key) for key in panels], dtype), strict=True))
        self.load()

    def _length(self, weight: Weight, transposed: bool) -> int:
        inner, outer = shape_of(weight, transposed)
        width = self._runtime.width
        return inner * -(-outer // width) * width

    def load(self) -> None:
        """Take the present values of the parameters."""
        for (weight, transposed), out in self._panels.items():
            p = weight.parameter.detach().to(self._dtype).contiguous()
            inner, outer = shape_of(weight, transposed)
            strides = (1, inner) if transposed else (outer, 1)
            self._runtime.pack(inner, outer, p.data_ptr(), *strides, weight.scale, out.data_ptr())
        for weight, out in self._plain.items():
            torch.mul(weight.parameter.detach().to(self._dtype), weight.scale, out=out)

    def panels(self, weight: Weight, transposed: bool = False) -> Slot:
        return fixed(self._panels[weight, transposed])

    def plain(self, weight: Weight) -> Slot:
        return fixed(self._plain[weight])


class CpuPasses:
    """Named passes over one memory. Raises CompilerError where there is no compiler.

    storage: of every place. Without `gradients`, the tensors of the weights' gradients, no pass may ask for them; every
    thread has its own, `apart` numbers behind those of the thread before.
    """

    def __init__(
        self,
        passes: Mapping[str, list[Segment]],
        storage: dict[Place, Storage],
        dtype: torch.dtype,
        gradients: dict[Weight, Tensor] | None = None,
        apart: int = 0,
    ):
        self.runtime, self.dtype = load_runtime(dtype), dtype
        self._passes, self._storage = passes, storage
        self._gradients = (
            {w: Slot(x.data_ptr(), apart, Memory.SUMMED, 0, 0) for w, x in gradients.items()} if gradients else {}
        )
        self._steps = [step for segments in passes.values() for step in steps_of(segments)]
        self.weights = PackedWeights(self._steps, self.runtime, dtype)
        self._functions = self._compile()
        self._private = set().union(*(privately(segments, storage) for segments in passes.values()))
        self.capacity = dict.fromkeys((*KINDS, "threads"), 0)
        self._memory: dict[Storage, Tensor] = {}
        self.holds: Any = None  # whose rows are there, for those who share the memory
        self._segments: dict[str, list[_Prepared]] = {}
        self.in_c: dict[str, tuple[ctypes.Array[CSegment], int]] = {}  # of each pass: its segments, and how many

    def _compile(self) -> dict:
        """The functions of all row operations, compiled side by side where they are not in the cache."""
        wanted = {(s.operation, s.order): None for s in self._steps if isinstance(s, RowOperation)}
        libraries = load_libraries(wanted, self.dtype)
        return {key: ctypes.cast(library.rows, ctypes.c_void_p) for key, library in zip(wanted, libraries, strict=True)}

    # memory

    def reserve(self, counts: dict[str, int], threads: int = 1) -> bool:
        """Make room for so many nodes, pairs, edges and threads; whether anything was moved."""
        room, wanted = self.capacity, {**counts, "threads": threads}
        for kind, n in wanted.items():
            if n > room[kind]:
                break
        else:
            return False
        grown = {k: max(room[k], n if k == "threads" else 1 + int(HEADROOM * n)) for k, n in wanted.items()}
        self.capacity = dict.fromkeys(self.capacity, 0)  # until all is there: what is half made must not be used
        with torch.inference_mode(False):  # the memory outlives this call
            self._memory = {}
            rows = {storage: self._rows_of(storage, grown) for storage in self._storage.values()}
            pieces = in_one_piece([n * storage.size for storage, n in rows.items()], self.dtype)
            for (storage, n), piece in zip(rows.items(), pieces, strict=True):
                self._memory[storage] = piece.view(n, storage.size)
            self._segments = {name: self._prepared(segments) for name, segments in self._passes.items()}
            self.in_c = {name: _segments_in_c(segments) for name, segments in self._segments.items()}
        self.capacity = grown
        return True

    def _rows_of(self, storage: Storage, room: dict[str, int]) -> int:
        rows = room["threads"] * CHUNK if storage.where == "scratch" else room[storage.where]
        return rows * room["threads"] if storage in self._private else rows

    def at(self, place: Place) -> Tensor:
        """Where a place lies: (rows, size), of which as many are used as were asked for."""
        return self._memory[self._storage[place]]

    # steps

    def _prepared(self, segments: list[Segment]) -> "list[_Prepared]":
        both = zip(segments, steps_in_c(segments, self._storage), strict=True)
        return [_Prepared(s.where, s.summed, (CStep * len(d))(*map(self._c_step, d))) for s, d in both]

    def _c_step(self, step: StepInC) -> CStep:
        slots, n_in = [self._slot(x) for x in step.tensors], step.n_in
        function = None if step.function is None else self._functions[step.function]
        numbers = {"n_in": n_in, "n_out": len(slots) - n_in, "function": function, **step.numbers}
        return CStep(slots=(Slot * SLOTS)(*slots), **numbers)

    def _slot(self, x: TensorInC) -> Slot:
        if isinstance(x.of, Panels):
            return self.weights.panels(*x.of)
        if isinstance(x.of, Weight):
            return self.weights.plain(x.of)
        if isinstance(x.of, GradientOf):
            return self._gradients[x.of.weight]
        if x.of is None:
            return Slot(None, 0, 0, 0, 0)
        storage, tensor = self._storage[x.of], self.at(x.of)
        return Slot(tensor.data_ptr() + x.offset * tensor.element_size(), storage.size, x.memory, x.where, x.clear)

    def run(self, name: str, counts: dict[str, int], cuts: list[int], on_edges, on_nodes) -> None:
        """Run a pass: cuts of the receivers for each thread; addresses of links (`Topology`) of edges and nodes."""
        threads, bounds = len(cuts) - 1, (ctypes.c_int64 * len(cuts))(*cuts)
        rows = (ctypes.c_int64 * 3)(counts["node"], counts["pair"], counts["edge"])  # as in KINDS
        self.runtime.run_pass(*self.in_c[name], threads, bounds, on_edges, on_nodes, rows, rows)


class _Prepared(NamedTuple):
    """A segment as the runtime reads it."""

    where: str
    summed: bool
    steps: "ctypes.Array[CStep]"


def _segments_in_c(segments: "list[_Prepared]") -> "tuple[ctypes.Array[CSegment], int]":
    """Addresses of steps, which `segments` keeps."""
    found = ((KINDS.index(s.where), s.summed, len(s.steps), ctypes.addressof(s.steps)) for s in segments)
    return (CSegment * len(segments))(*(CSegment(*one) for one in found)), len(segments)


def in_one_piece(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Zeros, one behind the other: what is read in this order is fetched in time, and with pages of their own they
    would meet in the same cache lines."""
    sizes = [(1 - (-n // ALIGNED)) * ALIGNED for n in lengths]
    pieces = _zeros(sum(sizes) + ALIGNED, dtype)[: sum(sizes)].split(sizes)
    return [piece[:n] for piece, n in zip(pieces, lengths, strict=True)]


def _zeros(n: int, dtype: torch.dtype) -> Tensor:
    """In large pages where the system lends them: what senders have lies all over the memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or n * dtype.itemsize < LARGE:
        return torch.zeros(n, dtype=dtype)
    room = mmap.mmap(-1, n * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=dtype)


def fixed(tensor: Tensor) -> Slot:
    """A tensor without rows."""
    return Slot(tensor.data_ptr(), 0, Memory.WHOLE, 0, 0)
