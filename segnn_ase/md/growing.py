"""Log and trajectory while a run writes them: what others do to them is noticed before anything is lost."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from segnn_ase.base.errors import OutputError

TAIL = 4096  # bytes at the end that must be as they were written


class Footprint(NamedTuple):
    """What a file looks like."""

    inode: int
    size: int  # bytes
    tail: int  # checksum


class Growing:
    """A file that only this run may touch, from now on; without a path one that nothing is written to."""

    def __init__(self, path: str | None):
        self.path = path
        self._last = footprint(path)

    def check(self) -> None:
        """Raise OutputError where the file is not as this run left it."""
        found = footprint(self.path)
        if found != self._last:
            raise OutputError(f"cannot write {self.path!r}: {_what_happened(self._last, found)}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Check before, and take note after."""
        self.check()
        yield
        self._last = footprint(self.path)


FOLDER = Footprint(-1, -1, 0)


def footprint(path: str | None) -> Footprint | None:
    """None where there is no file."""
    if path is None or not os.path.exists(path):
        return None
    if os.path.isdir(path):
        return FOLDER
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
        file.seek(max(state.st_size - TAIL, 0))
        return Footprint(state.st_ino, state.st_size, zlib.crc32(file.read(TAIL)))


def _what_happened(last: Footprint | None, found: Footprint | None) -> str:
    if last is None:
        return f"another file of {found and found.size} bytes is there since; move it away"
    remedy = f"restore the file with its first {last.size} bytes as they were"
    if found is None:
        return f"it was moved away or removed while the run was writing it; {remedy}"
    if found == FOLDER:
        return f"it is a folder now; {remedy}"
    if found.size < last.size:
        return f"it was cut from {last.size} to {found.size} bytes while the run was writing it; {remedy}"
    if found.inode != last.inode:
        return f"another file of {found.size} bytes is in its place; {remedy}"
    return f"it was edited while the run was writing it (now {found.size} bytes); {remedy}"
