"""Cost of the comparison with the domain and of the uncertainty, as a part of an MD step of the shipped potentials.

python benchmarks/trust.py

Calculators with neither, with the comparison alone, and with both take turns, in an order that changes, on structures
that are inside: frames of a potential's reference.xyz, repeated and displaced by 0.01 Å. What is outside costs more, as
the reasons are put in words.
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


def times(name: str, seconds: float) -> dict[str, float]:
    """Median CPU time of a step with neither, ms, and what the comparison alone and both add, in percent of it:
    medians of the differences within one round."""
    rng, spent = np.random.default_rng(0), {part: [] for part in PARTS}
    systems = {part: structure(name) for part in PARTS}
    start, outside = systems["step"].positions.copy(), 0
    for part, atoms in systems.items():
        atoms.calc = calculator(name, part)
        atoms.get_forces()  # compiles
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent["step"]) < 5:
        positions = start + rng.normal(scale=0.01, size=start.shape)
        for part in rng.permutation(PARTS):
            atoms = systems[part]
            atoms.positions = positions
            begin = time.process_time()  # what else the machine does is not counted
            atoms.get_forces()
            spent[part].append(1e3 * (time.process_time() - begin))
            outside += bool(atoms.calc.results.get("outside_domain"))
    step, rounds = float(np.median(spent["step"])), len(spent["step"])
    more = {part: float(np.median(np.subtract(spent[part], spent["step"]))) for part in PARTS[1:]}
    percent = {f"{part}_percent": 100 * ms / step for part, ms in more.items()}
    return {"atoms": len(start), "rounds": rounds, "outside": outside, "step_ms": step, **percent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=15.0, help="for each system, about")
    parser.add_argument("--out", default="trust")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"system": name, **times(name, a.seconds)} for name in a.systems]
    columns = {"system": "", "atoms": "d", "rounds": "d", "outside": "d", "step_ms": ".3f"}
    print_table(rows, columns | {"domain_percent": ".2f", "both_percent": ".2f"})
    lines = [{**row, "part": part, "percent": row[f"{part}_percent"]} for row in rows for part in PARTS[1:]]
    plot_lines(a.out, lines, group="part", x="atoms", y="percent", labels=("atoms", "of a step [%]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
