"""Newness of the surroundings of atoms (`model.newness`) in compiled code, in float32: a glance at every step."""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationWarning
from segnn_ase.compiled.build import load_library
from segnn_ase.compiled.c_code import prelude
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.model.edges import CLOSEST
from segnn_ase.model.fingerprints import COMPONENTS, HARMONICS, LMAX, MIXED, RADIAL, SPECTRUM
from segnn_ase.model.irreps import raise_degree
from segnn_ase.model.newness import LEAST, SPREAD, KnownSurroundings, Landmarks, Newness, newness
from segnn_ase.structure.graph import Graph

TOLERANCE = 1e-3  # float32, and large numbers where something is far from all
BLOCK = 64  # landmarks at a time
LANES = 16  # pairs at a time
ATOMS_PER_THREAD = 64


class _Tables(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("species", "channels", "points", "structures")),
        *((f"table{n}", ctypes.c_void_p) for n in range(11)),
    )


class _Structure(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "pairs")),
        ("cutoff", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("positions", "cell", "shifts", "receivers", "senders", "kind")),
    )


class CompiledNewness:
    """What `model.newness.newness` gives, within the rounding of float32, until the next call. Raises CompilerError."""

    def __init__(self, known: KnownSurroundings, cutoff: float):
        self.known, self._cutoff, self._library = known, cutoff, _load_newness()
        at, f = known.landscape, known.landscape.fingerprints
        tables = [f.channels, f.mixing, f.mean, f.axes, *_blocks(at.atoms), *_blocks(at.structures), at.fewest]
        tables.append(known.bonds.lengths() ** 2)
        self._kept = [x.detach().cpu().float().contiguous() for x in tables]
        self._kept.append(known.bonds.limits().contiguous())
        sizes = *f.channels.shape, self._kept[5].shape[1], self._kept[7].shape[1]
        self._tables = _Tables(*sizes, *(x.data_ptr() for x in self._kept))
        self._room: _Room | None = None

    def __call__(self, graph: Graph, kind: Tensor) -> Newness | None:
        """Of one structure; None where its pairs are not sorted by receiver."""
        n, room = len(kind), self._room
        if room is None or room.pairs is not graph.edge_src or room.n != n:
            room = self._room = _Room(n, len(self.known.landscape.fewest), graph, self._cutoff)
        positions, cell, kind = graph.positions.contiguous(), graph.cell.contiguous(), kind.contiguous()
        given = room.structure
        given.positions, given.cell, given.kind = positions.data_ptr(), cell.data_ptr(), kind.data_ptr()
        threads = min(torch.get_num_threads(), 1 + n // ATOMS_PER_THREAD)
        if self._library.newness(room.address, ctypes.byref(self._tables), threads, *room.outputs):
            return None
        return Newness(room.out[:n], room.out[2 * n :], room.bonds, *room.summary)


class _Room:
    """For structures with the same pairs, one after the other: their results lie in the same place."""

    def __init__(self, n: int, n_species: int, graph: Graph, cutoff: float):
        self.pairs, self.n = graph.edge_src, n
        self.first, self.bonds = np.empty(n + 1, np.int64), np.empty((n, n_species), np.int64)
        self.y, self.out = np.empty(n * COMPONENTS, np.float32), np.empty(2 * n + n_species, np.float32)
        self.summary = (ctypes.c_double * 5)()
        self._kept = [x.contiguous() for x in (graph.edge_shift, graph.edge_dst, graph.edge_src)]
        shifts, receivers, senders = (x.data_ptr() for x in self._kept)
        self.structure = _Structure(n, len(graph.edge_src), cutoff, None, None, shifts, receivers, senders, None)
        self.address = ctypes.byref(self.structure)
        arrays = self.first, self.y, self.out, self.bonds
        self.outputs = *(x.ctypes.data for x in arrays), ctypes.addressof(self.summary)


class PlainNewness:
    """The same in plain PyTorch."""

    def __init__(self, known: KnownSurroundings, cutoff: float):
        self.known, self._cutoff = known, cutoff

    def __call__(self, graph: Graph, kind: Tensor) -> Newness:
        return newness(self.known, graph, kind, self._cutoff)


def chosen_newness(
    make: Callable, known: KnownSurroundings, cutoff: float, graph: Graph, kind: Tensor
) -> "CompiledNewness | PlainNewness | None":
    """What `make` makes of the first two, if it gives on this structure what plain PyTorch gives; else that, with a
    warning. None where code cannot be compared, as the pairs are not sorted.
    """
    plain = PlainNewness(known, cutoff)
    try:
        compiled = make(known, cutoff)
        found = compiled(graph, kind)
        if found is None:
            return None
        problem = _problem(found, plain(graph, kind))
    except CompilerError as error:
        problem = str(error)
    if problem is None:
        return compiled
    warnings.warn(f"compiled newness of surroundings: not used, as {problem}", AccelerationWarning, stacklevel=4)
    return plain


def _problem(found: Newness, expected: Newness) -> str | None:
    for name, got, right in zip(Newness._fields, found, expected, strict=True):
        if not np.allclose(got, right, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            return f"{name} differs by up to {np.abs(np.subtract(got, right)).max():.2g}"
    return None


def _blocks(table: Landmarks) -> list[Tensor]:
    """Points (S, COMPONENTS, M) and 1 / width^2 (S, M), filled up to whole blocks."""
    m = table.widths.shape[1]
    index = torch.arange(-(-m // BLOCK) * BLOCK).clamp_max(m - 1)
    return [table.points[:, index].transpose(1, 2), table.widths[:, index] ** -2]


@cache
def _load_newness() -> ctypes.CDLL:
    sizes = {"RADIAL": RADIAL, "LMAX": LMAX, "HARMONICS": HARMONICS, "MIXED": MIXED, "COMPONENTS": COMPONENTS}
    sizes |= {"SPECTRUM": SPECTRUM, "BLOCK": BLOCK, "LANES": LANES}
    lines = [prelude(torch.float32), "#include <math.h>"]
    lines += [f"#define {name} {value}" for name, value in sizes.items()]
    lines += [
        f"#define {name} {value}f" for name, value in (("CLOSEST", CLOSEST), ("SPREAD", SPREAD), ("LEAST", LEAST))
    ]
    source = Path(__file__).with_name("newness.c").read_text(encoding="utf-8")
    library = load_library("\n".join([*lines, _harmonics_in_c(), source]))
    library.newness.restype = ctypes.c_int
    library.newness.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int, *[ctypes.c_void_p] * 5)
    return library


def _harmonics_in_c() -> str:
    """`model.irreps.spherical_harmonics` of the unit vector (a, b, c), as a macro: to y."""
    lines = ["y[0] = (V){0} + 1;", *(f"y[{1 + k}] = {3**0.5!r}f * ({axis});" for k, axis in enumerate("abc"))]
    for l in range(1, LMAX):
        table = raise_degree(l).table.view(2 * l + 1, 3, 2 * l + 3)
        for m in range(2 * l + 3):
            terms = [
                f"{float(table[i, k, m])!r}f * y[{l * l + i}] * ({'abc'[k]})"
                for i, k in table[:, :, m].abs().gt(1e-12).nonzero().tolist()
            ]
            lines.append(f"y[{(l + 1) ** 2 + m}] = {' + '.join(terms)};")
    return f"#define HARMONICS_OF(a, b, c) {' '.join(lines)}"
