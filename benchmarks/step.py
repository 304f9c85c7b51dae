"""Cost of one MD step of one calculator, in a process of its own: prints a line of JSON for each system.

A step moves the atoms by 0.01 Å at random, then asks for energy, forces and, where periodic, stress. Needs the
calculator's own package, ASE and numpy, so that it runs in the environments of other packages too.
"""

import argparse
import json
import resource
import time

import numpy as np
from calculators import build
from systems import system

START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calculator")
    parser.add_argument("systems", nargs="+", help="smallest first")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0, help="stop after so long")
    a = parser.parse_args()
    calculator = build(a.calculator, a.dtype, a.device)
    loaded = time.perf_counter() - START
    for name in a.systems:
        atoms = system(name)
        atoms.calc = calculator
        start, rng, times, cpu = atoms.positions.copy(), np.random.default_rng(0), [], []
        begin = time.perf_counter()
        while len(times) < 3 + a.steps and (len(times) < 5 or time.perf_counter() - begin < a.seconds):
            atoms.positions = start + rng.normal(scale=0.01, size=start.shape)
            t, c = time.perf_counter(), time.process_time()
            atoms.get_potential_energy()
            atoms.get_forces()
            if atoms.pbc.all():
                atoms.get_stress()
            times.append(1e3 * (time.perf_counter() - t))
            cpu.append(1e3 * (time.process_time() - c))
        line = {
            "calculator": a.calculator,
            "system": name,
            "atoms": len(atoms),
            "dtype": a.dtype,
            "cpu_ms": float(np.median(cpu[3:])),
            "wall_ms": float(np.median(times[3:])),
            "first_ms": times[0],
            "start_s": loaded + times[0] / 1e3,
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "device": a.device,
        }
        if a.device != "cpu":
            import torch

            line |= {"device": torch.cuda.get_device_name(), "peak_MB": torch.cuda.max_memory_allocated() / 2**20}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
