"""Who may write a file: one process at a time, also after another one was killed.

The lock of a file is an empty neighbour, ".name.lock", that its owner keeps locked by the system and removes in the
end. When a process dies, the system unlocks it, and what is left of it is taken over.
"""

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segnn_ase.base.errors import OutputError
from segnn_ase.base.files import writing

BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(1 << 20)  # far from what is written there, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def only_writer(paths: Iterable["str | Path"]) -> Iterator[None]:
    """Be the only one that writes these files, in this process and in others; makes their folders.

    Raises OutputError that names a file which another one is writing, and who that is.
    """
    with ExitStack() as stack:
        for place, path in sorted({_place(path): path for path in paths}.items()):  # one order for all
            stack.enter_context(_locked(place, path))
        yield


def _place(path: "str | Path") -> Path:
    """Where a file is in the end, whatever it is called and whichever links lead to it."""
    with writing(path):
        try:
            return Path(path).resolve()
        except ValueError as error:  # a zero among its letters
            raise OutputError(f"cannot write {str(path)!r}: {error}") from None


@contextmanager
def _locked(place: Path, path: "str | Path") -> Iterator[None]:
    lock = place.with_name(f".{place.name}.lock")
    with writing(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = _owned(lock, path)
    try:
        yield
    finally:
        if sys.platform != "win32":  # which removes nothing that is open
            lock.unlink(missing_ok=True)  # while it is locked: who has opened it finds that it is gone
        file.close()
        if sys.platform == "win32":
            with suppress(OSError):
                lock.unlink()


def _owned(lock: Path, path: "str | Path") -> BinaryIO:
    """The lock file, opened, locked and still in its place."""
    while True:
        file = open(lock, "a+b")
        try:
            _lock(file)
        except OSError as error:
            with file:
                _unlocked(file, path, error)
            return open(os.devnull, "rb")
        if _in_place(file, lock):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            return file
        file.close()


def _in_place(file: BinaryIO, lock: Path) -> bool:
    """Whether nobody removed the lock file between its opening and its locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _unlocked(file: BinaryIO, path: "str | Path", error: OSError) -> None:
    """Raise OutputError where another one has the lock; warn where this file system has no locks."""
    if error.errno in BUSY:
        file.seek(0)
        owner = file.read(200).decode(errors="replace") or "another process"
        raise OutputError(f"cannot write {str(path)!r}: {owner} is writing it; wait for it, or choose another name")
    reason = error.strerror or str(error)
    warnings.warn(f"{path}: no locks here ({reason}); see to it that no other process writes it", stacklevel=2)
