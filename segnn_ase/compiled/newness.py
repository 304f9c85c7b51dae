"""Newness of the surroundings of atoms (`model.newness`) in compiled code, in float32: a glance at every step."""

import ctypes
import warnings
from collections.abc import Callable
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationWarning, level_of_caller
from segnn_ase.compiled.build import load_library
from segnn_ase.compiled.c_code import prelude
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.model.edges import CLOSEST
from segnn_ase.model.fingerprints import COMPONENTS, HARMONICS, LMAX, MIXED, RADIAL, Fingerprints
from segnn_ase.model.irreps import raise_degree
from segnn_ase.model.newness import LEAST, SPREAD, KnownSurroundings, Landmarks, Newness, newness
from segnn_ase.structure.graph import Graph, edge_vectors, within

TOLERANCE = 1e-3  # relative: float32, and large numbers where something is far from all
ROUNDED = 1e-2  # limits are some 1; whitening enlarges the rounding of surroundings that are all alike in training
BLOCK = 64  # landmarks at a time
LANES = 16  # pairs at a time
GROUP = 4  # atoms of one element at a time
ATOMS_PER_THREAD = 64
FIRST, SECOND = torch.triu_indices(MIXED, MIXED)
FOLDED = MIXED + (LMAX + 1) * len(FIRST)  # of a spectrum, without what is in it twice


class _Tables(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("species", "channels", "points", "structures")),
        *((f"table{n}", c_void_p) for n in range(14)),
    )


class _Structure(ctypes.Structure):
    _fields_ = (
        ("n", c_int64),
        ("wide", c_int64),  # whether vectors are in float64
        ("cutoff", c_double),
        *((name, c_void_p) for name in ("vectors", "first", "senders", "kind", "order", "bonds", "known", "y", "out")),
        ("summary", c_void_p),
    )


class SortedPairs(NamedTuple):
    """Of one structure, sorted by receivers and within the cutoff; all but kind may have more rows than are used."""

    kind: Tensor  # (N,) species of the atoms
    vectors: Tensor  # (E, 3) Å
    first: Tensor  # (N + 1,) first pairs of the atoms
    senders: Tensor  # (E,)


class CompiledNewness:
    """What `model.newness.newness` gives, within the rounding of float32. Raises CompilerError."""

    def __init__(self, known: KnownSurroundings, cutoff: float):
        self.known, self.cutoff, self.function = known, cutoff, _load_newness().newness
        at, f = known.landscape, known.landscape.fingerprints
        tables = [f.channels, f.mixing, *_folded(f), *_blocks(at.atoms), *_blocks(at.structures), at.fewest]
        tables.append(known.bonds.lengths() ** 2)
        self._kept = [x.detach().cpu().float().contiguous() for x in tables]
        self._kept.append(known.bonds.limits().contiguous())
        self._kept += [_filled(marks).points.float().contiguous() for marks in (at.atoms, at.structures)]
        self._kept.append(torch.tensor(at.limits, dtype=torch.float64))
        sizes = *f.channels.shape, self._kept[5].shape[1], self._kept[7].shape[1]
        self.tables = _Tables(*sizes, *(x.data_ptr() for x in self._kept))

    def __call__(self, graph: Graph, kind: Tensor) -> Newness | None:
        """Of one structure; None where its pairs are not sorted by receiver."""
        graph = within(graph, self.cutoff)
        if bool((graph.edge_dst.diff() < 0).any()):
            return None
        first = torch.searchsorted(graph.edge_dst.contiguous(), torch.arange(len(kind) + 1))
        look = self.look(SortedPairs(kind, edge_vectors(graph), first, graph.edge_src))
        self.function(*look.given[1:], min(torch.get_num_threads(), 1 + len(kind) // ATOMS_PER_THREAD))
        return look.found()

    def look(self, pairs: SortedPairs) -> "Look":
        return Look(self, pairs)


class Look:
    """At structures with the same pairs, one after the other: their results lie in the same place.

    Of the first one all is exact. Afterwards an atom is known by the landmark that it was nearest to: its newness is no
    more than the distance from that one, and the nearest is looked for again only where this leaves a limit.
    """

    def __init__(self, at: CompiledNewness, pairs: SortedPairs):
        n, species = len(pairs.kind), at.tables.species
        out, bonds = np.empty(2 * n + species, np.float32), np.empty((n, species), np.int64)
        order, y = np.empty(n + GROUP * species, np.int64), np.empty(n * COMPONENTS, np.float32)
        known = np.full(n + species, -1)
        self.pairs, self._arrays, self.summary = pairs, (out[:n], out[2 * n :], bonds), (c_double * 5)()
        tensors = [x.contiguous() for x in (pairs.vectors, pairs.first, pairs.senders, pairs.kind)]
        self._kept = tensors, order, known, y, out
        addresses = *(x.data_ptr() for x in tensors), *(x.ctypes.data for x in (order, bonds, known, y, out))
        wide = pairs.vectors.dtype is torch.float64
        structure = _Structure(n, wide, at.cutoff, *addresses, ctypes.addressof(self.summary))
        # the function and its arguments, all but the number of threads
        self.given = ctypes.cast(at.function, c_void_p), ctypes.byref(structure), ctypes.byref(at.tables)

    def found(self) -> Newness:
        """Until the next call."""
        return Newness(*self._arrays, *self.summary)


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
    warnings.warn(
        f"compiled newness of surroundings: not used, as {problem}", AccelerationWarning, stacklevel=level_of_caller()
    )
    return plain


def _problem(found: Newness, expected: Newness) -> str | None:
    for name, got, right in zip(Newness._fields, found, expected, strict=True):
        if not np.allclose(got, right, rtol=TOLERANCE, atol=ROUNDED, equal_nan=True):
            return f"{name} differs by up to {np.abs(np.subtract(got, right)).max():.2g}"
    return None


def _folded(f: Fingerprints) -> list[Tensor]:
    """Mean (S, FOLDED) and axes (S, FOLDED, COMPONENTS) where p_lkk' and p_lk'k are one."""
    square = MIXED + MIXED * (MIXED * torch.arange(LMAX + 1)[:, None] + FIRST) + SECOND
    other = MIXED + MIXED * (MIXED * torch.arange(LMAX + 1)[:, None] + SECOND) + FIRST
    both = f.axes[:, square] + f.axes[:, other] * (FIRST != SECOND)[:, None]
    axes = torch.cat([f.axes[:, :MIXED], both.flatten(1, 2)], 1)
    return [torch.cat([f.mean[:, :MIXED], f.mean[:, square].flatten(1)], 1), axes]


def _filled(table: Landmarks) -> Landmarks:
    """Up to whole blocks."""
    m = table.widths.shape[1]
    index = torch.arange(-(-m // BLOCK) * BLOCK).clamp_max(m - 1)
    return Landmarks(table.points[:, index], table.widths[:, index])


def _blocks(table: Landmarks) -> list[Tensor]:
    """Points (S, M / BLOCK, COMPONENTS, BLOCK) and 1 / width^2 (S, M), filled up to whole blocks."""
    points, widths = _filled(table)
    return [points.unflatten(1, (-1, BLOCK)).transpose(2, 3), widths**-2]


@cache
def _load_newness() -> ctypes.CDLL:
    library = load_library(_newness_source())
    library.newness.restype, library.newness.argtypes = None, (c_void_p, c_void_p, c_int)
    library.layout.restype, library.layout.argtypes = None, (c_void_p,)
    found, expected = (c_int64 * 3)(), (*map(ctypes.sizeof, (_Tables, _Structure)), _Structure.summary.offset)
    library.layout(found)
    if tuple(found) != expected:
        raise CompilerError(f"the compiled newness has the layout {tuple(found)}; expected {expected}")
    return library


def _newness_source() -> str:
    sizes = {"RADIAL": RADIAL, "LMAX": LMAX, "HARMONICS": HARMONICS, "MIXED": MIXED, "COMPONENTS": COMPONENTS}
    sizes |= {"FOLDED": FOLDED, "BLOCK": BLOCK, "LANES": LANES, "GROUP": GROUP}
    degrees = ", ".join(str(l) for l in range(LMAX + 1) for _ in range(2 * l + 1))
    lines = [prelude(torch.float32), "#include <math.h>", f"#define DEGREES {{{degrees}}}"]
    lines += [f"#define {name} {value}" for name, value in sizes.items()]
    lines += [
        f"#define {name} {value}f" for name, value in (("CLOSEST", CLOSEST), ("SPREAD", SPREAD), ("LEAST", LEAST))
    ]
    return "\n".join([*lines, _harmonics_in_c(), Path(__file__).with_name("newness.c").read_text(encoding="utf-8")])


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
