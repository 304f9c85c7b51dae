"""Cost of the comparison with the domain and of the uncertainty, as a part of an MD step of the shipped potentials.

python benchmarks/trust.py

Calculators with neither, with the comparison alone, and with both take turns, in an order that changes, on structures
that are inside: frames of a potential's reference.xyz, repeated and displaced by 0.01 Å. What is outside costs more, as
the reasons are put in words. Printed is the time within the comparison, and what a step takes longer with it, which
has the noise of a whole step: medians, of differences within one round.
"""

import argparse
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from report import plot_lines, print_table, save

from segnn_ase import SEGNNCalculator, load_potential

POTENTIALS = Path(__file__).parent.parent / "potentials"
SYSTEMS = {  # name: potential, times its first reference frame in each direction
    "acetylacetone": ("acetylacetone-pbe", 1),
    "silicon64": ("silicon-pbe", 1),
    "silicon512": ("silicon-pbe", 2),
    "water192": ("water-pbe0", 1),
    "water1536": ("water-pbe0", 2),
}
PARTS = ("step", "domain", "both")


def structure(name: str) -> Atoms:
    potential, times = SYSTEMS[name]
    atoms = ase.io.read(POTENTIALS / potential / "reference.xyz", "0")
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc).repeat(times)


def calculator(name: str, part: str) -> SEGNNCalculator:
    potential = load_potential(SYSTEMS[name][0])
    if part != "both":
        potential.uncertainty = None
    if part == "step":
        potential.domain = None
    return SEGNNCalculator(potential, domain="ignore")


class Timed:
    """What a calculator calls to have a structure judged, with its CPU times in ms: the machine's other work counts
    for nothing."""

    def __init__(self, judge):
        self.judge, self.spent = judge, []

    def __call__(self, *given):
        begin = time.process_time()
        found = self.judge(*given)
        self.spent.append(1e3 * (time.process_time() - begin))
        return found


def times(name: str, seconds: float) -> dict[str, float]:
    """Median CPU time of a step with neither, ms, and what the comparison alone and both add, in percent of it."""
    rng, spent = np.random.default_rng(0), {part: [] for part in PARTS}
    systems = {part: structure(name) for part in PARTS}
    start, outside = systems["step"].positions.copy(), 0
    for part, atoms in systems.items():
        atoms.calc = calculator(name, part)
        atoms.get_forces()  # compiles
        atoms.calc._monitor = Timed(atoms.calc._monitor)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent["step"]) < 5:
        positions = start + rng.normal(scale=0.01, size=start.shape)
        for part in rng.permutation(PARTS):
            atoms = systems[part]
            atoms.positions = positions
            begin = time.process_time()
            atoms.get_forces()
            spent[part].append(1e3 * (time.process_time() - begin))
            outside += bool(atoms.calc.results.get("outside_domain"))
    step, found = float(np.median(spent["step"])), {"atoms": len(start), "rounds": len(spent["step"])}
    found |= {"outside": outside, "step_ms": step}
    for part in PARTS[1:]:
        longer = np.median(np.subtract(spent[part], spent["step"]))
        found[f"{part}_percent"] = 100 * float(np.median(systems[part].calc._monitor.spent)) / step
        found[f"{part}_longer"] = 100 * float(longer) / step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=15.0, help="for each system, about")
    parser.add_argument("--out", default="trust")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"system": name, **times(name, a.seconds)} for name in a.systems]
    columns = {"system": "", "atoms": "d", "rounds": "d", "outside": "d", "step_ms": ".3f"}
    print_table(rows, columns | {f"{part}_{kind}": ".2f" for part in PARTS[1:] for kind in ("percent", "longer")})
    lines = [{**row, "part": part, "percent": row[f"{part}_percent"]} for row in rows for part in PARTS[1:]]
    plot_lines(a.out, lines, group="part", x="atoms", y="percent", labels=("atoms", "of a step [%]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
