"""A process that labels structures: needs ASE and the calculator, nothing of this package, so any Python will do.

Reads a line of JSON for each structure on standard input, and answers with one on what was standard output, to which
the calculator itself can no longer write: what it prints goes to standard error. The first line says what to make.
"""

import contextlib
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    limit_memory(order.get("memory"))
    sys.path[0] = order["folder"]  # where the user's own modules are, in place of the folder of this file
    sys.path.append(order["package"])
    try:
        calculator = made(order["factory"], order["arguments"], order["strict"])
    except BaseException as error:
        answers.write(json.dumps({"error": in_a_line(error)}) + "\n")
        raise
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if order["remembers"]:
                told = {order["told"][name]: value for name, value in asked["info"].items() if name in order["told"]}
                calculator = made(order["factory"], {**order["arguments"], **told})
            answer = label(asked, calculator)
            with contextlib.suppress(OSError):  # it is heard, as a rule
                keep_answer(answer, asked["answer"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": in_a_line(error)}
        answers.write(json.dumps(answer) + "\n")


def end_with(parent: int) -> None:
    """A calculation whose asker was killed would go on, perhaps for hours."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # with what the calculator has begun
    os._exit(1)


def limit_memory(gigabytes) -> None:
    if gigabytes is not None:
        import resource

        limit = int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def made(factory: str, arguments: dict, strict: bool = False):
    """strict: raise TypeError for arguments that are none of its default parameters."""
    module, _, name = factory.partition(":")
    make = getattr(importlib.import_module(module), name)
    if strict:
        known = make.default_parameters
        named = set(inspect.signature(make).parameters) | set(known)
        for argument in set(arguments) - named:
            raise TypeError(f"{name} has no argument {argument!r}; it has {', '.join(sorted(known))}")
    return make(**arguments)


def label(asked: dict, calculator) -> dict:
    import numpy as np
    from ase import Atoms
    from ase.calculators.calculator import PropertyNotImplementedError

    atoms = Atoms(asked["numbers"], asked["positions"], cell=asked["cell"], pbc=asked["pbc"], info=asked["info"])
    for name, values in asked["arrays"].items():
        atoms.set_array(name, np.array(values))
    atoms.calc = calculator
    begin = time.perf_counter()
    forces = atoms.get_forces()
    answer = {"energy": energy_of(atoms), "forces": forces.tolist()}
    if atoms.pbc.all():
        with contextlib.suppress(PropertyNotImplementedError, NotImplementedError):
            answer["stress"] = atoms.get_stress(voigt=True).tolist()
    answer["seconds"] = time.perf_counter() - begin
    return answer


def keep_answer(answer: dict, path: str) -> None:
    """Where it is found if the asker is killed before it has it."""
    with open(f"{path}.part", "w") as file:
        file.write(json.dumps(answer))
    os.replace(f"{path}.part", path)


def energy_of(atoms) -> float:
    """That whose derivative the forces are: with smeared electrons the free energy, where the calculator has it."""
    atoms.get_potential_energy()
    return float(atoms.calc.results.get("free_energy", atoms.calc.results["energy"]))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    main()
