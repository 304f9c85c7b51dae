"""The C runtime (`cpu_runtime.c`) seen from Python: its structures, operation codes, functions, and a check that both
sides mean the same."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from segnn_ase.compiled.build import load_library
from segnn_ase.compiled.c_code import prelude
from segnn_ase.compiled.cache import CompilerError

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
    SUMMED = 4  # the same, `size` apart, added up by who has asked for it


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
    "edges": (c_int64, (*[c_int64] * 4, *[c_void_p] * 5)),
    "finish": (None, (c_int64, c_int64, *[c_void_p] * 4)),
    "watch": (c_int, (c_int64, c_int64, *[c_void_p] * 8)),
}


@cache
def load_runtime(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled runtime for one precision. Raises CompilerError."""
    library = load_library(runtime_source(dtype))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = (c_int64 * 6)()
    library.layout(found)
    expected = (dtype.itemsize, found[1], CHUNK, ctypes.sizeof(Slot), ctypes.sizeof(CStep))
    if tuple(found) != (*expected, CStep.slots.offset):
        raise CompilerError(f"the compiled runtime has the layout {tuple(found)}; expected {expected}")
    library.width = found[1]  # numbers of a vector
    return library


def runtime_source(dtype: torch.dtype) -> str:
    lines = [f"#define {name} {value}" for name, value in {"CHUNK": CHUNK, "SLOTS": SLOTS}.items()]
    lines += [f"enum {{ {', '.join(f'{x.name} = {x.value}' for x in codes)} }};" for codes in (Op, Memory)]
    lines += [_structure("Slot", Slot), _structure("Step", CStep)]
    runtime = Path(__file__).with_name("cpu_runtime.c").read_text(encoding="utf-8")
    return "\n".join([prelude(dtype), *lines, runtime])


def _structure(name: str, structure: type[ctypes.Structure]) -> str:
    fields = []
    for field, kind in structure._fields_:
        if kind is c_void_p:
            fields.append(f"void *{field};")
        else:
            fields.append(f"int64_t {field};" if kind is c_int64 else f"Slot {field}[SLOTS];")
    return f"typedef struct {{ {' '.join(fields)} }} {name};"
