"""Cost of the uncertainty and of the comparison with the domain, as a part of an MD step of the shipped potentials.

python benchmarks/trust.py

Steps with neither, with the comparison alone, and with both take turns.
"""

import argparse
import time

import numpy as np
import torch
from report import plot_lines, print_table, save
from systems import system

from segnn_ase import SEGNNCalculator, load_potential
from segnn_ase.trust.monitor import Monitor

POTENTIALS = {"acetylacetone": "acetylacetone-pbe", "water": "water-pbe0", "silicon": "silicon-pbe"}


def potential_for(name: str) -> str:
    return next(model for prefix, model in POTENTIALS.items() if name.startswith(prefix))


def times(name: str, steps: int) -> dict[str, float]:
    """Median time of a step with neither, ms, and what the comparison alone and both add, in percent of it."""
    calc, atoms, rng = SEGNNCalculator(potential_for(name), domain="ignore"), system(name), np.random.default_rng(0)
    atoms.calc, start = calc, atoms.positions.copy()
    atoms.get_forces()  # compiles
    bare = load_potential(potential_for(name))
    bare.uncertainty, bare.domain = None, calc._monitor.check.potential.domain  # one: code is chosen for each
    watches = {"step": lambda *given: {}, "domain": Monitor(bare), "both": calc._monitor}
    spent: dict[str, list[float]] = {key: [] for key in watches}
    for _ in range(steps):
        for key, watch in watches.items():
            calc._monitor = watch
            atoms.positions = start + rng.normal(scale=0.01, size=start.shape)
            begin = time.perf_counter()
            atoms.get_forces()
            spent[key].append(1e3 * (time.perf_counter() - begin))
    step = float(np.median(spent["step"]))
    more = {key: float(np.median(np.subtract(spent[key], spent["step"]))) for key in ("domain", "both")}
    return {"step_ms": step, **{f"{key}_percent": 100 * ms / step for key, ms in more.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["acetylacetone", "silicon64", "water192", "water1536"])
    parser.add_argument("--seconds", type=float, default=15.0, help="for each system, about")
    parser.add_argument("--out", default="trust")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in a.systems:
        step = times(name, 5)["step_ms"]
        rounds = max(5, int(1e3 * a.seconds / (3 * step)))
        rows.append({"system": name, "atoms": len(system(name)), **times(name, rounds)})
    columns = {"system": "", "atoms": "d", "step_ms": ".3f", "domain_percent": ".2f", "both_percent": ".2f"}
    print_table(rows, columns)
    lines = [{**row, "part": part, "percent": row[f"{part}_percent"]} for row in rows for part in ("domain", "both")]
    plot_lines(a.out, lines, group="part", x="atoms", y="percent", labels=("atoms", "of a step [%]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
