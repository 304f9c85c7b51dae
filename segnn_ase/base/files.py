"""Files that are never torn, signals that are waited for, progress that does not fill a log."""

import glob
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from segnn_ase.base.errors import OutputError, expect
from segnn_ase.base.launch import are_several


def existing_file(path: "str | Path", argument: str) -> Path:
    """Return the path if it is a file. Raises FileNotFoundError naming the argument."""
    expect(isinstance(path, str | os.PathLike), argument, path, "a path")
    path = home_expanded(path, argument)
    if is_file(path):
        return path
    if os.path.isdir(path):
        raise FileNotFoundError(f"{argument} is {str(path)!r}, which is a folder; expected a file")
    if os.path.exists(path):
        raise FileNotFoundError(f"{argument} is {str(path)!r}, which is a device or a pipe; expected a file")
    where = f"(working folder {Path.cwd()})"
    raise FileNotFoundError(f"{argument} is {str(path)!r}, but there is no such file {where}")


def home_expanded(path: "str | Path", argument: str) -> Path:
    """The path with a ~ at its start replaced. Raises FileNotFoundError for the home of a user who has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise FileNotFoundError(f"{argument} is {str(path)!r}, but {user} has no home directory") from None


def is_file(path: Path) -> bool:
    """False also for what cannot be a file, as a name that is too long, or cannot be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def writing(path: "str | Path", consequence: str = "") -> Iterator[None]:
    """Turn the system's error into an OutputError that names the file and what it means."""
    try:
        yield
    except OutputError:  # has said it
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {str(path)!r}: {reason}{consequence and '; '}{consequence}") from error


def write_atomically(path: "str | Path", content: bytes, *, mode: int | None = None) -> None:
    """Write to a temporary name in the same folder, flush to disk, then rename: the file is old or new, never torn.

    mode: the rights of the file; None for those that new files have here. Raises OutputError when it cannot be written;
    then the old file is intact, and no other is left.
    """
    expect(isinstance(path, str | os.PathLike), "path", path, "a path")
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r}: it is no name of a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path, "what was there before is intact"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                if mode is not None:
                    temporary.chmod(mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append(path: "str | Path", content: bytes) -> None:
    """Append all of it or, where there is no space, nothing: then raises OutputError."""
    with writing(path), open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        rest = memoryview(content)
        try:
            while rest:  # a full disk takes a part without a word
                rest = rest[file.write(rest) :]
        except OSError:
            if os.path.isfile(path):
                file.truncate(size)
            raise


def clear_leftovers(paths: Iterable["str | Path"]) -> None:
    """Remove the temporary files that a killed process left beside its outputs; no other may be writing them."""
    for path in map(Path, paths):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
            left.unlink(missing_ok=True)


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is finished and saved; a second one acts at once.

    Not so in one of several processes, which get it from their launcher, too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        received.append(number)
        if not are_several():
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    except BaseException:
        if are_several():  # whose launcher ends all when one has ended: what went wrong is to be said first
            before.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(*, shown: bool, **options) -> tqdm:
    """A bar on standard error: live on a terminal, a line every ten seconds where it goes to a file."""
    disable = not shown or sys.stderr is None
    return tqdm(file=sys.stderr, disable=disable, mininterval=0.1 if somebody_looks() else 10.0, **options)


def somebody_looks() -> bool:
    """Whether stderr is a terminal or a notebook, not a file."""
    return sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
