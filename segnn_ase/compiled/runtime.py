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


class CSegment(ctypes.Structure):
    """Steps that follow each other on the rows of one kind."""

    _fields_ = (
        ("where", c_int64),  # of KINDS
        ("summed", c_int64),
        ("n_steps", c_int64),
        ("steps", c_void_p),
    )


class CGraph(ctypes.Structure):
    """A graph, what the passes have for it in the memory, and where the results go."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "n_pairs", "n_graphs", "n_species", "width", "last_knot")),
        *((name, c_double) for name in ("cutoff", "knot_distance")),
        *((name, c_int64) for name in ("edges_per_thread", "most_threads", "room", "room_for_threads", "repels")),
        # given
        *((name, c_void_p) for name in ("positions", "cell", "batch", "receivers", "senders", "shifts", "kind")),
        *((name, c_void_p) for name in ("core", "scale", "reference", "isolated", "added")),  # core: radii squared
        # in the memory: the links (see `kernels.Topology`), and rows
        *((name, c_void_p) for name in ("first", "src", "knot")),
        *((name, c_void_p) for name in ("vectors", "weight", "gradient", "epsilon", "features")),
        # results
        *((name, c_void_p) for name in ("energy", "energies", "descriptors")),
        *((name, c_void_p) for name in ("forces", "gradients", "virial")),
        *((name, c_int64) for name in ("n_edges", "close", "threads")),
    )


class CLimits(ctypes.Structure):
    """`model.watch.Watched` of certain atoms."""

    _fields_ = (
        ("n", c_int64),
        ("width", c_int64),  # features of an atom
        ("neighbors", c_void_p),
        ("forms", c_void_p),  # both, packed; none without an uncertainty
        *((name, c_double) for name in ("lowest_energy", "highest_energy", "volume", "lowest_virial")),
        *((name, c_double) for name in ("highest_virial", "force", "leverage", "alpha", "beta", "gamma")),
        *((name, c_double) for name in ("largest", "mean", "most", "crowding")),  # of newness, see `Newness`
    )


FUNCTIONS = {  # result and arguments
    "layout": (None, (c_void_p,)),
    "pack": (None, (c_int64, c_int64, c_void_p, c_int64, c_int64, c_double, c_void_p)),
    "run_nodes": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "run_edges": (None, (c_void_p, c_int, c_void_p, c_void_p, c_void_p)),
    "run_pass": (None, (c_void_p, c_int64, c_int, *[c_void_p] * 5)),
    "find_edges": (c_int, (c_void_p,)),
    "run_found": (None, (c_void_p, c_void_p, c_int64)),
    "finish": (None, (c_void_p,)),
    "evaluate": (c_int, (c_void_p, c_void_p, c_int64)),
    "watch": (c_int, (*[c_void_p] * 6, c_double, *[c_void_p] * 5, c_int, c_void_p)),
}


STRUCTURES = {"Slot": Slot, "Step": CStep, "Segment": CSegment, "Graph": CGraph, "Limits": CLimits}


@cache
def load_runtime(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled runtime for one precision. Raises CompilerError."""
    library = load_library(runtime_source(dtype))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = (c_int64 * 9)()
    library.layout(found)
    sizes = *map(ctypes.sizeof, (Slot, CStep)), CStep.slots.offset, *map(ctypes.sizeof, (CSegment, CGraph, CLimits))
    expected = (dtype.itemsize, found[1], CHUNK, *sizes)
    if tuple(found) != expected:
        raise CompilerError(f"the compiled runtime has the layout {tuple(found)}; expected {expected}")
    library.width = found[1]  # numbers of a vector
    return library


def runtime_source(dtype: torch.dtype) -> str:
    return "\n".join([declarations(dtype), Path(__file__).with_name("cpu_runtime.c").read_text(encoding="utf-8")])


def declarations(dtype: torch.dtype) -> str:
    """What stands before `cpu_runtime.c`."""
    constants = {"CHUNK": CHUNK, "SLOTS": SLOTS, "EDGE": KINDS.index("edge")}
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    lines += [f"enum {{ {', '.join(f'{x.name} = {x.value}' for x in codes)} }};" for codes in (Op, Memory)]
    lines += [_structure(*one) for one in STRUCTURES.items()]
    return "\n".join([prelude(dtype), *lines])


NAMES = {c_void_p: "void *", c_int64: "int64_t ", c_double: "double ", Slot * SLOTS: "Slot "}


def _structure(name: str, structure: type[ctypes.Structure]) -> str:
    fields = (f"{NAMES[kind]}{field}{'[SLOTS]' if kind is Slot * SLOTS else ''};" for field, kind in structure._fields_)
    return f"typedef struct {{ {' '.join(fields)} }} {name};"
