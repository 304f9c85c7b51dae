"""A calculator of ASE that several threads may share."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from ase.calculators.calculator import Calculator

from segnn_ase.base.changes import changes

F = TypeVar("F", bound=Callable)


def one_at_a_time(method: F) -> F:
    """Let one thread after another into a method of a `SharedCalculator`."""

    @wraps(method)
    def locked(self, *arguments, **keywords):
        with self.lock:
            return method(self, *arguments, **keywords)

    return locked  # type: ignore[return-value]


class SharedCalculator(Calculator):
    """Each thread has atoms and results of its own; what calculates them is for all, one thread at a time.

    ASE keeps the last structure and its results as attributes: without this, a thread gets those of another one.
    """

    def __init__(self):
        self._share()
        super().__init__()
        self.use_cache = False  # ASE would copy the structure before `calculate` does

    def _share(self) -> None:
        self.lock = threading.RLock()
        self._of_thread = threading.local()

    # attributes of ASE's class

    @property
    def atoms(self) -> Any:
        return getattr(self._of_thread, "atoms", None)

    @atoms.setter
    def atoms(self, atoms) -> None:
        self._of_thread.atoms = atoms
        if atoms is not None:
            self._of_thread.before = atoms

    @property
    def before(self) -> Any:
        """The structure that was calculated last, which ASE forgets when another one comes."""
        return getattr(self._of_thread, "before", None)

    @property
    def results(self) -> Any:
        if not hasattr(self._of_thread, "results"):
            self._of_thread.results = {}
        return self._of_thread.results

    @results.setter
    def results(self, results: dict) -> None:
        self._of_thread.results = results

    def check_state(self, atoms, tol=1e-15):
        return changes(self.atoms, atoms) if tol <= 1e-15 else super().check_state(atoms, tol)

    @one_at_a_time
    def get_property(self, name, atoms=None, allow_calculation=True):
        return super().get_property(name, atoms, allow_calculation)

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in ("lock", "_of_thread")}
        return {**state, "atoms": self.atoms, "results": self.results}

    def __setstate__(self, state: dict) -> None:
        self._share()
        for name, value in state.items():
            setattr(self, name, value)
