"""The C runtime (`cpu_runtime.c`) seen from Python: its structures, operation codes, functions, and a check that both
sides mean the same."""

import ctypes
import math
from ctypes import c_double, c_int, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from importlib.resources import files

import torch

from segnn_ase.compiled.build import CompilerError, load_library
from segnn_ase.compiled.c_code import prelude
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.model.irreps import raise_degree

CHUNK = 32  # atoms
SLOTS = 48  # tensors of one step


class Op(IntEnum):
    """What a step does."""

    ROWS = 0
    PRODUCT = 1
    WEIGHT_GRADIENT = 2
    BIAS_GRADIENT = 3


class Memory(IntEnum):
    """How threads and chunks share a tensor."""

    WHOLE = 0
    SCRATCH = 1  # as long as a chunk, one for each thread
    RECEIVERS = 2  # the rows of a thread's own receivers
    PRIVATE = 3  # a copy for each thread, added up at the end


KINDS = ("node", "pair", "edge")  # indices of `Slot.where`


class Slot(ctypes.Structure):
    _fields_ = (
        ("base", c_void_p),
        ("size", c_int64),  # numbers a row; 0 for what has no rows
        ("memory", c_int64),
        ("where", c_int64),
        ("clear", c_int64),  # nothing was there before
    )


class CStep(ctypes.Structure):
    _fields_ = (
        ("op", c_int64),
        ("function", c_void_p),
        ("n_in", c_int64),
        ("n_out", c_int64),
        ("rows", c_int64),  # of an item
        ("inner", c_int64),
        ("outer", c_int64),
        ("a_stride", c_int64),
        ("d_stride", c_int64),
        ("c_stride", c_int64),
        ("add", c_int64),
        ("slots", Slot * SLOTS),
    )


FUNCTIONS = {  # result and arguments
    "layout": (None, (c_void_p,)),
    "pack": (None, (c_int64, c_int64, c_void_p, c_int64, c_int64, c_double, c_void_p)),
    "run_nodes": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "run_edges": (None, (c_void_p, c_int, c_void_p, c_void_p, c_void_p)),
    "edges": (c_int64, (c_int64, c_int64, c_int64, c_double, c_void_p, c_void_p, c_void_p, c_void_p)),
    "gather": (None, (c_int64, c_void_p, c_void_p, c_void_p)),
    "watch": (c_int, (c_int64, c_int64, *[c_void_p] * 8)),
    "geometry": (None, (c_int, *[c_void_p] * 5)),
    "geometry_tangent": (None, (c_int64, *[c_void_p] * 5)),
    "geometry_gradient": (None, (c_int, *[c_void_p] * 6)),
}


@cache
def load_runtime(dtype: torch.dtype, lmax: int) -> ctypes.CDLL:
    """The compiled runtime for one precision and degree of the attributes. Raises CompilerError."""
    library = load_library(runtime_source(dtype, lmax))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = (c_int64 * 7)()
    library.layout(found)
    expected = (dtype.itemsize, found[1], (lmax + 1) ** 2, CHUNK, ctypes.sizeof(Slot), ctypes.sizeof(CStep))
    if tuple(found) != (*expected, CStep.slots.offset):
        raise CompilerError(f"the compiled runtime has the layout {tuple(found)}; expected {expected}")
    library.width = found[1]  # numbers of a vector
    return library


def runtime_source(dtype: torch.dtype, lmax: int) -> str:
    constants = {"DIM": (lmax + 1) ** 2, "CHUNK": CHUNK, "SLOTS": SLOTS, **_harmonics(lmax)}
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    lines += [f"enum {{ {', '.join(f'{x.name} = {x.value}' for x in codes)} }};" for codes in (Op, Memory)]
    lines += [_structure("Slot", Slot), _structure("Step", CStep)]
    runtime = files("segnn_ase.compiled").joinpath("cpu_runtime.c").read_text(encoding="utf-8")
    return "\n".join([prelude(dtype), *lines, runtime])


def _structure(name: str, structure: type[ctypes.Structure]) -> str:
    fields = []
    for field, kind in structure._fields_:
        if kind is c_void_p:
            fields.append(f"void *{field};")
        else:
            fields.append(f"int64_t {field};" if kind is c_int64 else f"Slot {field}[SLOTS];")
    return f"typedef struct {{ {' '.join(fields)} }} {name};"


def harmonics_formula(lmax: int) -> tuple[Formula, list[Expr], list[Expr | None], list[Expr | None]]:
    """Y^1 ... Y^lmax of a unit vector u, the gradient of their sum with weights g, and their derivatives along w."""
    f = Formula()
    unit = [f.input("u", k, "V") for k in range(3)]
    level = [f.mul(f.const(math.sqrt(3.0)), x) for x in unit]
    values = []
    for l in range(1, lmax + 1):
        values += level
        table = raise_degree(l).table
        outer = [f.mul(y, x) for y in level for x in unit]
        level = [
            f.add(*(f.mul(f.const(c), o) for c, o in zip(column, outer, strict=True) if abs(c) > 1e-12))
            for column in table.T.tolist()
        ]
    seeds = [f.input("g", r, "V") for r in range(len(values))]
    gradient = f.gradients(list(zip(values, seeds, strict=True)), unit) if values else [None] * 3
    along: dict[int, Expr | None] = {x.index: f.input("w", k, "V") for k, x in enumerate(unit)}
    return f, values, gradient, f.tangents(values, along)


def _harmonics(lmax: int) -> dict[str, str]:
    """C code by the name of its macro."""
    f, values, gradient, tangents = harmonics_formula(lmax)

    def code(wanted: list[Expr | None], to: str, first: int) -> str:
        lines = (f"{to}[{k}] = " + ("(V){0};" if e is None else f"v{e.index};") for k, e in enumerate(wanted, first))
        return " ".join([*_printed(f, wanted), *lines])

    return {
        "HARMONICS_VALUES": code(values, "y", 1),
        "HARMONICS_GRADIENT": code(gradient, "gu", 0),
        "HARMONICS_TANGENT": code(tangents, "dy", 1),
    }


def _printed(f: Formula, wanted: list[Expr | None]) -> list[str]:
    def name(e: Expr) -> str:
        return f"((T){e.args[0]!r})" if e.op == "const" else f"v{e.index}"

    lines = []
    for e in f.needed([w for w in wanted if w is not None]):
        if e.op == "in":
            lines.append(f"const V v{e.index} = {e.args[0]}[{e.args[1]}];")
        elif e.op != "const":
            lines.append(f"const V v{e.index} = {(' + ' if e.op == 'add' else ' * ').join(map(name, e.args))};")
    return lines
