"""The networks of the field as settings of one: errors, cost and jumps at equal time of training.

python benchmarks/special_cases.py DATA --sets acac mlearn-Si --minutes 10 --seeds 3     # DATA as that of accuracy.py

SchNet, EGNN and tensor field networks, the last also as in PointConv, whose neighbours send less where they are dense
(equivariant here, as its weights are functions of the distance times harmonics), the SEGNN of this package and the one
as published, all with their presets' channels (64 scalars without directions, 32 of each kind with them), the same
optimiser, time and frames. jump: the largest, and missing:
the sum of all jumps of the energy while all atoms of the first test structure move by 0.3 Å in a thousand steps, beside
the work of the forces; meV. Every run is one of accuracy.py, with a folder of its own below OUT, and goes on likewise.
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
import torch
from accuracy import SETS, Choice, Task, at, columns_of, published, trained
from report import plot_lines, print_table, save

from segnn_ase import SEGNNCalculator

CASES = {
    "SchNet": "schnet",
    "SchNet, by density": "schnet,density_weighting=true",
    "EGNN": "egnn",
    "TFN": "tfn",
    "TFN, by density (PointConv)": "tfn,density_weighting=true",
    "SEGNN": "segnn",
    "SEGNN as published": "segnn2022",
}
STEPS, DISTANCE = 1000, 0.3  # Å, rms of a component


def jumps(folder: Path, task: Task, data: Path) -> dict[str, float]:
    """Of the energy in float64, against the work of the forces by the trapezoidal rule, meV."""
    atoms = ase.io.read(at(data, next(iter(task.tests.values()))), 0)
    calculator = SEGNNCalculator(
        folder / "model.pt", device="cpu", dtype="float64", domain="ignore", tables=False, allow_nonsmooth=True
    )
    start, move = atoms.positions.copy(), np.random.default_rng(0).normal(scale=DISTANCE, size=(len(atoms), 3))
    energies, forces = [], []
    for step in range(STEPS + 1):
        atoms.positions = start + step / STEPS * move
        atoms.calc = calculator
        forces.append(atoms.get_forces())
        energies.append(atoms.get_potential_energy())
    work = [-0.5 * np.sum((a + b) * move) / STEPS for a, b in zip(forces[1:], forces[:-1], strict=True)]
    missed = np.diff(energies) - np.array(work)
    return {"jump": 1e3 * float(np.abs(missed).max()), "missing": 1e3 * float(np.abs(missed.sum()))}


def measured_case(case: str, name: str, a: argparse.Namespace) -> dict:
    task, runs = SETS[name], []
    for seed in range(a.seeds):
        choice = Choice(CASES[case], False, "minutes", a.minutes, seed)
        folder = Path(a.out) / name / f"{choice.label}-{a.minutes:g}-{seed}"
        found = trained(task, a.data, folder, choice)
        costs = {"cpu_s": found["cpu_s"], "ms": found["ms"]}
        runs.append({**costs, **columns_of(task, found["errors"], a.data), **jumps(folder, task, a.data)})
    means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    spread = {f"±{key}": float(np.ptp([run[key] for run in runs]) / 2) for key in runs[0]}
    return {"potential": case, "seeds": a.seeds, **means, **spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["acac", "mlearn-Si"], choices=SETS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="special_cases")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    everything = []
    for name in a.sets:
        task = SETS[name]
        mine = [measured_case(case, name, a) for case in a.cases]
        names = [f"{kind}{end}" for end in task.tests for kind in "EF"]
        columns = {"potential": "", "seeds": "d", "cpu_s": ".0f", "ms": ".2f"}
        for key in names:
            columns |= {key: ".2f", f"±{key}": ".2f"}
        print(f"\n{name}: {task.error.upper()}, E meV{'' if task.molecule else '/atom'}, F meV/Å; jump and missing meV")
        print_table([*mine, *published(task)], {**columns, "jump": ".1e", "missing": ".1e"})
        labels = ("ms a step of dynamics", "error of forces [meV/Å]")
        plot_lines(f"{a.out}-{name}", mine, group="potential", x="ms", y=names[1], labels=labels)
        everything += [{"set": name, **row} for row in mine]
    save(a.out, everything, {k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
