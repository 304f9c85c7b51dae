"""Labels from processes of their own: one that fails, hangs or dies loses a label and nothing else."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError, LabelError, ReferenceStartError
from segnn_ase.learn import worker
from segnn_ase.learn.references import Reference, resolve_reference
from segnn_ase.learn.settings import ReferenceConfig

KEPT = ("initial_charges", "initial_magmoms")  # arrays that calculators look at
ENDING = 5.0  # s that a process may take to end when it has closed its output
START_MINUTES = 10.0  # that imports and weights may take at least


class ReferenceLabel(NamedTuple):
    """What a reference says of a structure."""

    energy: float  # eV
    forces: np.ndarray  # (N, 3) eV/Å
    stress: np.ndarray | None  # (6,) eV/Å^3, ASE's order
    seconds: float  # that it took


class LabelPool:
    """So many processes that label, until it is closed; `submit` from any thread."""

    def __init__(self, settings: ReferenceConfig, folder: Path):
        """folder: for logs, and for the files that calculators write."""
        self.settings, self.folder = settings, folder
        self._own, self._workers = threading.local(), []  # type: tuple[threading.local, list[Worker]]
        self._lock, self.closed = threading.Lock(), False
        self._threads = ThreadPoolExecutor(settings.workers, "label")

    def __enter__(self) -> "LabelPool":
        return self

    def __exit__(self, *_) -> None:
        self.closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in self._workers:
            each.end()
        self._threads.shutdown(wait=True)
        for each in self._workers:
            each.close()

    def submit(
        self, atoms: Atoms, answer: Path, then: "Callable[[ReferenceLabel | LabelError], None]"
    ) -> "Future[None]":
        """Label a structure, and call `then` with what came of it, in a thread of the pool.

        answer: a file with the label, from when there is one until `then` has returned: what is there is not asked for
        again. What `then` raises is raised by the future's result, and so is what is wrong with the settings.
        """
        return self._threads.submit(self._label_and_tell, atoms.copy(), answer, then)

    def _label_and_tell(
        self, atoms: Atoms, answer: Path, then: "Callable[[ReferenceLabel | LabelError], None]"
    ) -> None:
        found: ReferenceLabel | LabelError
        try:
            known = unheard(answer)
            found = self._label(atoms, answer) if known is None else checked_answer(known, len(atoms))
        except LabelError as error:
            found = error
        if not self.closed:  # a worker that was ended has failed in nothing
            then(found)
            answer.unlink(missing_ok=True)

    def _label(self, atoms: Atoms, answer: Path) -> ReferenceLabel:
        mine = getattr(self._own, "worker", None)
        if mine is None:
            with self._lock:
                mine = self._own.worker = Worker(self, len(self._workers))
                self._workers.append(mine)
        return mine.label(atoms, answer)


class Worker:
    """One process, begun when it is first needed and anew after it has died."""

    def __init__(self, pool: LabelPool, number: int):
        self.pool, self.settings = pool, pool.settings
        self.folder = pool.folder / f"worker-{number}"
        self._process: subprocess.Popen | None = None
        self._late = False

    def label(self, atoms: Atoms, answer: Path) -> ReferenceLabel:
        """Raises LabelError that says what went wrong."""
        process = self._process
        if self.pool.closed:
            raise LabelError("the labels are no longer asked for")
        if process is None or process.poll() is not None:
            process = self._begun()
        answer.parent.mkdir(parents=True, exist_ok=True)
        question = {**asked(atoms), "answer": str(answer.absolute())}
        return checked_answer(self._answer(process, question, self.settings.label_minutes, "label_minutes"), len(atoms))

    def end(self) -> None:
        if self._process is not None:
            kill(self._process)

    def close(self) -> None:
        """What is left of a process that has ended."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    cast(IO[bytes], pipe).close()
            self._process.wait()

    def _begun(self) -> subprocess.Popen:
        self.close()
        reference = resolve_reference(self.settings.calculator, self.settings.arguments)
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [absolute(self.settings.python) or sys.executable, "-u", str(Path(worker.__file__).resolve())]
        with open(self.folder / "log.txt", "ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=self.folder,
                    env=environment(self.settings),
                    start_new_session=True,  # an interrupt is for the one who asks; its own children end with it
                )
            except OSError as error:
                raise ConfigError(f"setting 'reference.python' is {command[0]!r}: {error}") from error
        self._process = process
        if self.pool.closed:  # meanwhile
            kill(process)
        order = {
            "factory": reference.factory,
            "arguments": dict(reference.arguments),
            "folder": os.getcwd(),
            "package": str(Path(__file__).parents[2]),  # of references that are modules of this one
            "remembers": reference.remembers,
            "told": dict(reference.told),
            "strict": reference.strict,
            "memory": self.settings.memory,
        }
        minutes = max(self.settings.label_minutes, START_MINUTES)
        try:
            self._answer(process, order, minutes, "label_minutes")
        except LabelError as error:
            told = f"{self.settings.calculator} does not start: {error}{how_to_get(reference, error)}"
            raise ReferenceStartError(told) from None
        return process

    def _answer(self, process: subprocess.Popen, question: dict, minutes: float, limit: str) -> dict:
        pipes, self._late = (cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)), False
        timer = threading.Timer(60 * minutes, self._give_up)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            pipes[0].write(json.dumps(question).encode() + b"\n")
            pipes[0].flush()
            line = pipes[1].readline()
        except (OSError, ValueError):  # it is gone
            pass
        finally:
            timer.cancel()
        if self._late:
            kill(process)  # which waits until it is gone
            raise LabelError(f"no answer within {limit} = {minutes:g}")
        try:
            answer = json.loads(line)
        except ValueError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
            kill(process)
            with contextlib.suppress(OSError, AttributeError):  # what it has begun may live on
                os.killpg(process.pid, signal.SIGKILL)
            told = f"its process ended with status {process.returncode}; see {self.folder / 'log.txt'}"
            raise LabelError(told) from None
        if "error" in answer:
            raise LabelError(answer["error"])
        return answer

    def _give_up(self) -> None:
        self._late = True
        self.end()


def absolute(python: str | None) -> str | None:
    """A path from here; a worker is in a folder of its own."""
    return python if python is None or not Path(python).is_file() else str(Path(python).absolute())


def unheard(path: Path) -> dict | None:
    """The answer to somebody who was killed before it was kept; None where there is none, or a part of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def threads_of(settings: ReferenceConfig) -> int:
    """Of each worker: as the settings or OMP_NUM_THREADS say, else its share of the cores that this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.threads or (int(told) if told.isdecimal() else 0) or max(cores // settings.workers, 1)


def environment(settings: ReferenceConfig) -> dict[str, str]:
    """Of a worker: its share of the cores."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads_of(settings)))}


def kill(process: subprocess.Popen) -> None:
    """With whatever it has begun itself, unless it has ended."""
    with contextlib.suppress(OSError):
        if process.poll() is not None:
            return
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def asked(atoms: Atoms) -> dict[str, Any]:
    """A structure as the worker reads it; of `info` what JSON holds."""
    values = {name: x.item() if isinstance(x, np.generic) else x for name, x in atoms.info.items()}
    plain = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.tolist(),
        "pbc": atoms.pbc.tolist(),
        "info": plain,
        "arrays": {name: atoms.arrays[name].tolist() for name in KEPT if name in atoms.arrays},
    }


def checked_answer(answer: dict, n: int) -> ReferenceLabel:
    """Raises LabelError for numbers that are none."""
    forces = np.array(answer["forces"], dtype=float)
    stress = None if answer.get("stress") is None else np.array(answer["stress"], dtype=float)
    if forces.shape != (n, 3):
        raise LabelError(f"forces have the shape {forces.shape}; expected {(n, 3)}")
    values: Iterable[tuple[str, Any]] = (("energy", answer["energy"]), ("forces", forces), ("stress", stress))
    for name, value in values:
        if value is not None and not np.isfinite(value).all():
            raise LabelError(f"{name} is not finite")
    return ReferenceLabel(float(answer["energy"]), forces, stress, float(answer["seconds"]))


def how_to_get(reference: Reference, error: Exception) -> str:
    """What to install, where that is what is missing."""
    missing = "ModuleNotFoundError" in str(error) and reference.package
    return f"; pip install {reference.package}, or name a Python that has it (reference.python)" if missing else ""
