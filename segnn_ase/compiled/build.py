"""Code compiled for the machine it runs on, when it is first needed, and kept in a cache folder.

C (`c_code.py`, `runtime.py`) goes through the machine's own compiler, `triton_code.py` through Triton's; `cache.py` has
the folder. Every kernel in C is compared with its formula before use.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import usable_cores
from segnn_ase.base.files import somebody_looks
from segnn_ase.compiled.c_code import c_source
from segnn_ase.compiled.cache import CompilerError, cache_folder, find_library, keep_library, keep_source
from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.interpret import Tensors, kernel_problem

FEW = 3  # kernels, compiled within a second


def compiler() -> list[str]:
    """Command of the C compiler: $CC, cc, gcc or clang. Raises CompilerError when there is none."""
    chosen = os.environ.get("CC", "").strip()
    for candidate in [chosen] if chosen else ["cc", "gcc", "clang"]:
        if shutil.which(candidate.split()[0]):
            return candidate.split()
    if chosen:
        raise CompilerError(f"CC is {chosen!r}, which is no command")
    raise CompilerError("no C compiler found; install gcc or clang, or set CC")


@cache
def _processor() -> str:
    """Model and instruction set of this machine: compiled code runs only on the like of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *kept])


COMMON = ["-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-std=gnu11", "-w"]
# OpenMP is compiled in but not linked: it comes from the runtime that PyTorch has loaded, with its threads
# what these passes would keep does not fit into the registers; to combine more than two takes minutes
OF_GCC = ["-fno-gcse", "-fno-tree-pre", "--param=max-combine-insns=2"]
# for some processors sums of one row would be rounded otherwise than those of many: a lonely atom has exactly E0
if platform.machine() in ("x86_64", "AMD64"):
    OF_GCC.append("--param=avoid-fma-max-bits=0")
_ATTEMPTS = [[*OF_GCC, "-march=native", "-fopenmp"], ["-march=native", "-fopenmp"], ["-march=native"], []]


def _key_of(source: str) -> str:
    return hashlib.sha256(f"{source}{COMMON}{_ATTEMPTS}{_processor()}".encode()).hexdigest()[:32]


def load_library(source: str) -> ctypes.CDLL:
    """Compile C code, or find it compiled in the cache. Raises CompilerError when that cannot be done here."""
    digest = _key_of(source)
    try:
        folder = cache_folder()
        known = find_library(folder, digest)
        if known is not None:
            try:
                return ctypes.CDLL(str(known))
            except OSError:  # of another system that shares this folder: made again
                pass
        with tempfile.TemporaryDirectory(dir=folder) as work:
            library, content = _compile(source, Path(work))
        keep_library(folder, digest, content)
        return library
    except OSError as error:
        raise CompilerError(f"compiled code cannot be kept or loaded: {error}") from error


def load_libraries(wanted: Iterable[tuple[Operation, "int | str"]], dtype: torch.dtype) -> list[ctypes.CDLL]:
    """The libraries of operations and orders of derivative, compiled side by side where they are not in the cache.

    Only the compiler runs in threads: in a process that was forked, PyTorch fails when two new threads enter it at
    once, and the sources are derived with it.
    """
    wanted = list(wanted)
    sources = [c_source(operation, order, dtype) for operation, order in wanted]
    _announce(sources)
    with ThreadPoolExecutor(usable_cores()) as pool:
        libraries = list(pool.map(load_library, sources))
    for (operation, order), library in zip(wanted, libraries, strict=True):
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = None, arguments
        _check(operation, order, dtype, library)
    return libraries


def _announce(sources: list[str]) -> None:
    """Say to who waits at a terminal why it takes so long: not to files, nor where there is next to nothing to do."""
    if not somebody_looks():
        return
    folder = cache_folder()
    with suppress(OSError):  # which is told where they are compiled
        new = sum(find_library(folder, _key_of(source)) is None for source in set(sources))
        if new > FEW:
            print(f"segnn_ase: {new} kernels are compiled for this machine, once, into {folder}", file=sys.stderr)


FUNCTIONS = {  # of every kernel, and their arguments; `c_code` prints them
    "rows": (ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3),
    "run": (ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int64),
}
_checked: set[int] = set()  # addresses of functions that were found right


def _check(operation: Operation, order: "int | str", dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Raise CompilerError for a kernel that does not give what its formula gives."""
    address = ctypes.cast(library.rows, ctypes.c_void_p).value
    if address in _checked:
        return

    def addresses(arrays: list[np.ndarray | None]) -> ctypes.Array:
        return (ctypes.c_void_p * len(arrays))(*(None if x is None else x.ctypes.data for x in arrays))

    def run(links: list[np.ndarray], inputs: Tensors, outputs: Tensors) -> None:
        tensors = ([given.get(k) for k in range(1 + max(given))] for given in (inputs, outputs))
        library.rows(0, len(links[0]) - 1, *map(addresses, (links, *tensors)))

    problem = kernel_problem(operation, order, np.dtype(str(dtype).removeprefix("torch.")), run)
    if problem is not None:
        raise CompilerError(f"{compiler()[0]} made a kernel that is wrong: {problem}")
    _checked.add(address)


def _compile(source: str, folder: Path) -> tuple[ctypes.CDLL, bytes]:
    """The library, loaded, so that nobody can take its file away before, and what its file holds."""
    code, compiled, library = (folder / name for name in ("kernel.c", "kernel.o", "kernel.so"))
    code.write_text(source)
    messages = []
    for flags in _ATTEMPTS:
        steps = [["-c", str(code), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(library), "-lm"]]
        for options in ([*COMMON, *flags, *steps[0]], steps[1]):
            # a compiler speaks in the letters of the user's language, not always in those of Python
            done = subprocess.run([*compiler(), *options], capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                messages.append(done.stderr[-500:])
                break
        else:
            try:
                return ctypes.CDLL(str(library)), library.read_bytes()
            except OSError as error:
                messages.append(str(error))
    raise CompilerError(f"{compiler()[0]} does not compile the kernels: {messages[-1]}")


def pointers(tensors: "Sequence[Tensor | None]") -> ctypes.Array:
    """Addresses of contiguous tensors, which live as long as the array of their addresses."""
    kept = [t if t is None else t.contiguous() for t in tensors]  # a copy must not be freed before it is read
    array = (ctypes.c_void_p * len(kept))(*[t if t is None else t.data_ptr() for t in kept])
    array.kept = kept  # type: ignore[attr-defined]
    return array


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def runs_on_triton(device: torch.device) -> bool:
    return device.type == "cuda"


def load_triton(source: str) -> Any:
    """The one kernel in generated code; Triton reads it from a file, kept in the cache folder. Raises CompilerError."""
    if importlib.util.find_spec("triton") is None:
        raise CompilerError("Triton is not installed; it comes with the CUDA builds of PyTorch")
    name = f"segnn_ase_{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(keep_source(f"{name}.py", source))  # where Triton reads it
        exec(compile(source, module.__file__, "exec"), module.__dict__)  # and not what else may be in that folder
        sys.modules[name] = module
    return sys.modules[name].KERNEL
