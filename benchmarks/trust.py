"""Cost of the uncertainty and of the comparison with the domain, as a part of an MD step of the shipped potentials.

python benchmarks/trust.py

Timed inside the step, as the difference of two whole steps is smaller than their noise.
"""

import argparse
import time

import numpy as np
import torch
from report import plot_lines, print_table, save
from systems import system

from segnn_ase import SEGNNCalculator

POTENTIALS = {"acetylacetone": "acetylacetone-pbe", "water": "water-pbe0", "silicon": "silicon-pbe"}


def potential_for(name: str) -> str:
    return next(model for prefix, model in POTENTIALS.items() if name.startswith(prefix))


def times(calc: SEGNNCalculator, name: str, steps: int) -> dict:
    """Median CPU times of a step, ms: in all, the domain's part, and that of both."""
    atoms, rng = system(name), np.random.default_rng(0)
    atoms.calc, start = calc, atoms.positions.copy()
    spent: dict[str, list[float]] = {"step_ms": [], "domain_ms": [], "both_ms": []}

    def timed(key: str, call):
        def run(*arguments, **options):
            begin = time.perf_counter()
            result = call(*arguments, **options)
            spent[key].append(1e3 * (time.perf_counter() - begin))
            return result

        return run

    calc._judge, calc._check = timed("both_ms", calc._judge), timed("domain_ms", calc._check)
    for _ in range(steps + 3):
        atoms.positions = start + rng.normal(scale=0.01, size=start.shape)
        begin = time.perf_counter()
        atoms.get_forces()
        spent["step_ms"].append(1e3 * (time.perf_counter() - begin))
    del calc._judge
    return {key: float(np.median(values[3:])) for key, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["acetylacetone", "silicon64", "water192", "water1536"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="trust")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in a.systems:
        calc = SEGNNCalculator(potential_for(name), domain="ignore")
        row = {"system": name, "atoms": len(system(name)), **times(calc, name, a.steps)}
        rows.append({**row, "percent": 100 * row["both_ms"] / row["step_ms"]})
    columns = {"system": "", "atoms": "d", "step_ms": ".2f", "domain_ms": ".4f", "both_ms": ".4f", "percent": ".2f"}
    print_table(rows, columns)
    lines = [{**row, "part": part, "ms": row[f"{part}_ms"]} for row in rows for part in ("step", "domain", "both")]
    plot_lines(a.out, lines, group="part", x="atoms", y="ms", labels=("atoms", "time [ms]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
