"""`segnn export`: a folder with a library, its header, its sources and the file of numbers that belongs to it."""

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from segnn_ase.base.devices import usable_cores
from segnn_ase.base.errors import AccelerationError, ConfigError, expect
from segnn_ase.compiled.build import COMMON, OF_GCC, compiler
from segnn_ase.compiled.c_code import prelude, rows_in_c
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.compiled.network_steps import supported
from segnn_ase.compiled.runtime import declarations
from segnn_ase.export.evaluator import library_problem
from segnn_ase.export.lammps import SOURCE, Headers, compile_plugin
from segnn_ase.export.plan import Plan, in_quotes
from segnn_ase.model.potential import Potential
from segnn_ase.structure.cue_settings import FIELD

MAGIC = b"SEGNN\0\r\n"
LIBRARY, NUMBERS = "libsegnn.so", "model.segnn"
SHARED = ("-shared", "-Wl,-Bsymbolic")  # two libraries in one program call their own functions
HAND_WRITTEN = ("segnn.h", "segnn.c", "example.c", "example.f90", SOURCE, "Makefile")


class Exported(NamedTuple):
    """What `export` has written."""

    folder: Path
    library: Path
    numbers: Path


def export(
    potential: Potential, out: "str | Path", *, portable: bool = False, lammps: Headers | None = None
) -> Exported:
    """Write a potential as a C library: `segnn.h`, `libsegnn.so`, `model.segnn`, sources, a Makefile and examples.

    Args: potential, in the precision that the library shall have; out: the folder, new or empty; portable: for any
    processor of this family, not only the like of this one; lammps: `find_headers()` for a plugin of LAMMPS, too.
    Raises ConfigError for what a library does not carry yet, and for a folder that is not empty; AccelerationError
    where radial functions are too rough for tables, where the sources cannot be compiled here, and where the library
    does not give what plain PyTorch gives; OSError where nothing can be written.
    """
    expect(isinstance(potential, Potential), "potential", potential, "a Potential")
    expect(isinstance(out, str | os.PathLike), "out", out, "a path")
    refuse_what_is_missing(potential)
    folder = Path(out).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out is {str(out)!r}, which is there already; expected the name of a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        work.chmod(0o755)
        try:
            _fill(work, potential, portable=portable)
            if lammps is not None:
                compile_plugin(work, lammps)
        except (CompilerError, ValueError) as error:
            raise AccelerationError(f"no library is made: {error}") from error
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(folder, folder / LIBRARY, folder / NUMBERS)


def refuse_what_is_missing(potential: Potential) -> None:
    """Raise ConfigError naming what of a potential a library does not carry."""
    config = potential.config
    reasons = {
        f"message = {config.message!r}": not supported(potential) and not config.density_weighting,
        "density_weighting = true": config.density_weighting,
        f"electrostatics = {config.electrostatics!r}": config.electrostatics != "none",
        "the cue external_field": any(cue.name == FIELD for cue in config.cues),
    }
    missing = [name for name, wrong in reasons.items() if wrong]
    if missing:
        raise ConfigError(
            f"the potential has {' and '.join(missing)}, which a library does not carry; expected one without, or "
            "SEGNNCalculator, which has all"
        )


def _fill(folder: Path, potential: Potential, *, portable: bool) -> None:
    plan = Plan(potential)
    sources = _sources(potential, plan)
    key = hashlib.sha256("".join(sources.values()).encode()).digest()[:8]
    sources["plan.h"] += f"\n#define KEY {int.from_bytes(key, 'little')}u\n#define MAGIC {in_quotes(MAGIC)}\n"
    for file, text in sources.items():
        (folder / file).write_text(text, encoding="utf-8")
    numbers = plan.numbers()
    (folder / NUMBERS).write_bytes(MAGIC + key + struct.pack("<QIi", len(numbers), zlib.crc32(numbers), 0) + numbers)
    compile_library(folder, portable=portable)
    if problem := library_problem(folder / LIBRARY, folder / NUMBERS, potential):
        raise AccelerationError(f"{compiler()[0]} made a library that is wrong: {problem}")


def _sources(potential: Potential, plan: Plan) -> dict[str, str]:
    """The files of the library by name."""
    here, compiled = files("segnn_ase.export"), files("segnn_ase.compiled")
    sources = {file: (here / file).read_text(encoding="utf-8") for file in HAND_WRITTEN}
    sources["network.h"] = declarations(potential.dtype)
    sources["runtime.c"] = (compiled / "cpu_runtime.c").read_text(encoding="utf-8")
    sources["plan.h"] = plan.tables()
    for (operation, order), name in plan.kernels.items():
        code = rows_in_c(operation, order, name)
        sources[f"{name.removeprefix('segnn_')}.c"] = prelude(potential.dtype) + code
    return sources


def compile_library(folder: Path, *, portable: bool = False) -> None:
    """Compile the C files of a folder side by side into its library. Raises AccelerationError."""
    machine = [] if portable else ["-march=native"]
    sources = sorted(["segnn.c", *(path.name for path in folder.glob("rows_*.c"))])
    objects = [f"{file.removesuffix('.c')}.o" for file in sources]
    problem = ""
    for special, openmp in ((OF_GCC, ["-fopenmp"]), ([], ["-fopenmp"]), ([], [])):
        options = [*COMMON, *special, *machine, *openmp, "-fvisibility=hidden"]
        with ThreadPoolExecutor(usable_cores()) as pool:
            problems = list(pool.map(lambda file, o=options: _run(folder, [*o, "-c", file]), sources))
        problem = next(filter(None, problems), "") or _run(folder, [*SHARED, *openmp, *objects, "-o", LIBRARY, "-lm"])
        for file in objects:
            (folder / file).unlink(missing_ok=True)
        if not problem:
            return
    raise AccelerationError(f"{compiler()[0]} does not compile the library: {problem}")


def _run(folder: Path, options: list[str]) -> str:
    """What the compiler complains of."""
    done = subprocess.run([*compiler(), *options], cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    return (done.stderr[-500:] or "it gives no reason") if done.returncode else ""
