"""Cost of D3 dispersion beside the shipped potentials, in an MD step: energy, forces, and stress where periodic.

python benchmarks/dispersion.py

CPU times of one thread; steps with and without take turns.
"""

import argparse
import time

import numpy as np
import torch
from report import plot_lines, print_table, save
from systems import system

from segnn_ase import SEGNNCalculator
from segnn_ase.structure.dispersion import dispersion_of

POTENTIALS = {"acetylacetone": "acetylacetone-pbe", "water": "water-pbe0", "silicon": "silicon-pbe"}


def step_of(name: str, dispersion: str | None):
    """A step of the potential that belongs to a system."""
    model = next(model for prefix, model in POTENTIALS.items() if name.startswith(prefix))
    atoms, rng = system(name), np.random.default_rng(0)
    atoms.calc, start = SEGNNCalculator(model, domain="ignore", dispersion=dispersion), atoms.positions.copy()
    wanted = ["forces", "stress"] if atoms.pbc.all() else ["forces"]

    def step() -> None:
        atoms.positions = start + rng.normal(scale=0.01, size=start.shape)
        atoms.get_properties(wanted)

    step()  # compiles
    return step


def times(name: str, dispersion: str, rounds: int) -> dict[str, float]:
    """Median CPU times in ms."""
    atoms = system(name)
    works = {
        "network_ms": step_of(name, None),
        "dispersion_ms": lambda: dispersion_of(dispersion, atoms),
        "both_ms": step_of(name, dispersion),
    }
    spent: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            begin = time.process_time()
            work()
            spent[key].append(1e3 * (time.process_time() - begin))
    return {key: float(np.median(ms)) for key, ms in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["acetylacetone", "silicon64", "water192", "water1536"])
    parser.add_argument("--dispersion", default="d3bj:pbe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="dispersion")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"system": s, "atoms": len(system(s)), **times(s, a.dispersion, a.rounds)} for s in a.systems]
    parts = ["network", "dispersion", "both"]
    print_table(rows, {"system": "", "atoms": "d", **{f"{part}_ms": ".3f" for part in parts}})
    lines = [{**row, "part": part, "ms": row[f"{part}_ms"]} for row in rows for part in parts]
    plot_lines(a.out, lines, group="part", x="atoms", y="ms", labels=("atoms", "CPU time of a step [ms]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
