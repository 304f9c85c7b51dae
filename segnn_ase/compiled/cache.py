"""The folder where compiled code is kept between processes, and what of it may be run.

Code that lies in a file is run with the rights of who loads it, and a library that was cut short kills the process. So
the folder is private, files of other users or that others may write are not touched, and the name of a library ends
in the checksum of its content.
"""

import getpass
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from segnn_ase.base.files import write_atomically

DIGITS = 32  # of checksums in names
ROOT = 0
DAY = 86400.0  # s
UNUSED = 60 * DAY
KEPT_FOR = {  # names of files and folders, and for how many seconds they are kept without being used
    r"[0-9a-f]{16,64}(-[0-9a-f]{32})?\.so": UNUSED,  # earlier versions had no checksum in the name
    r"segnn_ase_[0-9a-f]{32}\.py": UNUSED,
    r"\..+\.[0-9a-f]{8}": DAY,  # of `write_atomically`
    r"tmp[a-z0-9_]{8}": DAY,  # where a compiler works
}


class CompilerError(RuntimeError):
    """There is no working C compiler here, or no folder to keep compiled code in."""


def cache_folder() -> Path:
    """$SEGNN_ASE_CACHE, else $XDG_CACHE_HOME/segnn_ase or ~/.cache/segnn_ase, made private.

    Without a home directory that can be written, a folder of this user's among the temporary files. Raises
    CompilerError where a folder that was asked for cannot be made or belongs to somebody else.
    """
    if asked := os.environ.get("SEGNN_ASE_CACHE"):
        return _private(Path(asked))
    try:
        return _private(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segnn_ase")
    except (CompilerError, RuntimeError):  # the latter is what `Path.home` says of a user without one
        return _private(_temporary())


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"segnn_ase-{user}"
    if folder.is_symlink():  # by somebody else: everybody may make one there
        raise CompilerError(f"{folder} is a link; expected a folder. Set SEGNN_ASE_CACHE to a folder of your own")
    return folder


def _private(folder: Path) -> Path:
    """The folder, made where it is missing, closed to others where it is ours."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if _is_ours(state) and not _only_owner_writes(state):
            folder.chmod(0o700)
            state = folder.stat()
    except OSError as error:
        raise CompilerError(f"compiled code cannot be kept in {folder}: {error.strerror or error}") from error
    if not _trusted(state):
        raise CompilerError(
            f"compiled code is not kept in {folder}, which others may write (owner {state.st_uid}, mode "
            f"{stat.S_IMODE(state.st_mode):o}); set SEGNN_ASE_CACHE to a folder of your own"
        )
    return folder


def _is_ours(state: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or state.st_uid == os.getuid()


def _only_owner_writes(state: os.stat_result) -> bool:
    return os.name != "posix" or not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _trusted(state: os.stat_result) -> bool:
    """Whether nobody but this user and the system's administrator can have written it."""
    return (_is_ours(state) or state.st_uid == ROOT) and _only_owner_writes(state)


def find_library(folder: Path, key: str) -> Path | None:
    """A library that `keep_library` kept, if it is whole and nobody else can have written it; noted as used."""
    names = _libraries(folder, folder.stat().st_mtime_ns).get(key, ())
    found = next((folder / name for name in names if _is_good(folder / name)), None)
    if found is not None:
        note_use(found)
    return found


@lru_cache(maxsize=1)
def _libraries(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names of libraries by key, read again when the folder has changed: a network has dozens, the folder thousands."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".so"))
    return {key: list(found) for key, found in groupby(names, lambda name: name.partition("-")[0])}


def note_use(path: Path) -> None:
    """Set the time of a file, once a day: what has not been used for long is removed (`clear_unused`)."""
    with suppress(OSError):  # gone, or on a disk that cannot be written
        if _age(path) > DAY:
            os.utime(path)


def clear_unused(folder: Path) -> None:
    """Remove compiled code that no process has loaded for `UNUSED`, and what killed ones left.

    Processes that have it loaded keep it: the system removes a file from the disk when the last of them ends. Who has
    found it and not yet loaded it makes it again.
    """
    for path in folder.iterdir():
        limit = next((limit for name, limit in KEPT_FOR.items() if re.fullmatch(name, path.name)), None)
        with suppress(OSError):  # another process removes it, too
            if limit is not None and _age(path) > limit and _is_ours(path.lstat()):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


_clear_once = cache(clear_unused)  # in a process: the folder may hold thousands


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _is_good(path: Path) -> bool:
    try:
        state = path.lstat()
        whole = stat.S_ISREG(state.st_mode) and path.stem.endswith(f"-{_sum_of(path.read_bytes())}")
    except OSError:  # gone meanwhile, or not to be read
        return False
    return whole and _trusted(state)


def keep_library(folder: Path, key: str, content: bytes) -> Path:
    """Keep a library by its key, on the disk before it has its name; removes what goes by that key and is no good."""
    path = folder / f"{key}-{_sum_of(content)}.so"
    for other in folder.glob(f"{key}-*.so"):
        if other != path and not _is_good(other):  # what is good may be another process's, which made it meanwhile
            other.unlink(missing_ok=True)
    write_atomically(path, content, mode=0o600)
    _clear_once(folder)
    return path


def _sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def keep_source(name: str, source: str) -> Path:
    """A file of this name with this text."""
    path = cache_folder() / name
    try:
        if not (path.is_file() and _trusted(path.lstat()) and path.read_text() == source):
            write_atomically(path, source.encode(), mode=0o600)
        note_use(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CompilerError(f"compiled code cannot be kept: {error}") from error
    return path
