"""One calculator in a process of its own, for `md_step.py`, or where the time of its step goes.

    python step.py segnn              # a line of JSON for each line that comes in, as {"system": ..., "seconds": ...}
    python step.py segnn --profile    # of one of ours: what is spent outside the compiled code

A step moves the atoms by 0.01 Å at random, then asks for energy, forces and, where periodic, stress. Needs the
calculator's own package, ASE and numpy, so that it runs in the environments of other packages too.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from calculators import PACKAGES, build, precision, tell
from systems import system

WARM_UP = 3  # steps
MOST = 200  # steps of a block
RATTLE = 0.01  # Å
VACUUM = 10.0  # Å


class Subject:
    """A structure with its calculator, whose atoms move."""

    def __init__(self, name: str, calculator):
        self.atoms, self._rng = system(name), np.random.default_rng(0)
        if not self.atoms.cell.rank:
            self.atoms.center(vacuum=VACUUM)  # some peers need a cell
        tell(self.atoms, calculator)
        self.atoms.calc, self._start = calculator, self.atoms.positions.copy()

    def move(self) -> None:
        self.atoms.positions = self._start + self._rng.normal(scale=RATTLE, size=self._start.shape)

    def step(self) -> tuple[float, float]:
        """CPU and wall time in ms."""
        self.move()
        t, c = time.perf_counter(), time.process_time()
        self.atoms.get_potential_energy()
        self.atoms.get_forces()
        if self.atoms.pbc.all():
            self.atoms.get_stress()
        return 1e3 * (time.process_time() - c), 1e3 * (time.perf_counter() - t)

    def block(self, seconds: float) -> list[tuple[float, float]]:
        """At least one step; the one before, which finds the caches filled by others, does not count."""
        self.step()
        end, times = time.perf_counter() + seconds, []
        while not times or (time.perf_counter() < end and len(times) < MOST):
            times.append(self.step())
        return times


def serve(name: str, dtype: str, device: str) -> None:
    """Answer on what was stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calculator, subjects = build(name, dtype, device), {}
    hello = {"dtype": precision(name, dtype), "device": _in_words(device), "versions": _versions()}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), calculator, subjects)
        except Exception as error:  # whatever a peer raises, it is told, and the other systems go on
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps({**answer, "peak_MB": _peak(device)}), file=answers, flush=True)


def _answer(request: dict, calculator, subjects: dict[str, Subject]) -> dict:
    """A block of steps; of a structure that is new, the first step."""
    name = request["system"]
    if name not in subjects:
        subject = Subject(name, calculator)
        _, first = subject.step()
        for _ in range(WARM_UP - 1):
            subject.step()
        subjects.clear()  # one structure at a time keeps its room
        subjects[name] = subject
        return {"atoms": len(subject.atoms), "first_ms": first}
    return {"times": subjects[name].block(request["seconds"])}


def _in_words(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


def _peak(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def profile(name: str, dtype: str, structure: str, steps: int = 2000) -> None:
    """Print the median time of forces alone: from atoms.get_forces() to the compiled code, in it, and back."""
    libraries = _libraries()
    subject = Subject(structure, build(name, dtype, "cpu"))
    subject.atoms.get_forces()  # what is compiled is there now
    inside, whole = _clocks(libraries), []
    for _ in range(steps):
        subject.move()
        inside.append(0.0)
        t = time.perf_counter()
        subject.atoms.get_forces()
        whole.append(time.perf_counter() - t)
    whole, inside = 1e6 * np.array(whole), 1e6 * np.array(inside)
    print(f"{name}, {dtype}, {structure}, {len(subject.atoms)} atoms: medians of {steps} steps")
    for label, times in (("a step", whole), ("in compiled code", inside), ("outside", whole - inside)):
        print(f"{label:>17} {np.median(times):8.0f} µs")


def _libraries() -> list:
    """Will have the libraries of compiled code that are loaded from now on."""
    from segnn_ase.compiled import newness, runtime

    found = []
    for module in (newness, runtime):
        module.load_library = _kept(module.load_library, found)
    return found


def _kept(load, found: list):
    def loaded(*arguments, **options):
        found.append(load(*arguments, **options))
        return found[-1]

    return loaded


def _clocks(libraries: list) -> list[float]:
    """Let the functions that have been called add the seconds that they take to the last number of this list."""
    seconds: list[float] = []
    for library in libraries:
        for name, function in list(vars(library).items()):
            if hasattr(function, "argtypes"):
                setattr(library, name, _timed(function, seconds))
    return seconds


def _timed(function, seconds: list[float]):
    def timed(*arguments):
        t = time.perf_counter()
        result = function(*arguments)
        seconds[-1] += time.perf_counter() - t
        return result

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calculator", help="see calculators.py")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--system", default="acetylacetone", help="of the profile")
    a = parser.parse_args()
    if a.profile:
        profile(a.calculator, a.dtype, a.system)
    else:
        serve(a.calculator, a.dtype, a.device)


if __name__ == "__main__":
    main()
