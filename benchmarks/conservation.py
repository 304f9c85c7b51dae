"""How the shipped potentials conserve energy over long runs: the figures on their cards.

python benchmarks/conservation.py                       # hours on one thread; goes on where it was stopped
python benchmarks/conservation.py --runs silicon-npt    # some 4 minutes

Runs are of the potentials that are shipped; each starts after 7 ps of Langevin dynamics. In the NPT run the steps of
the conserved energy at which the list of neighbours was made again are compared with the others.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.optimize import FIRE
from report import plot_lines, print_table, save

from segnn_ase import SEGNNCalculator
from segnn_ase.md.run import MDResult, run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.shipped import find_model, shipped_potentials

sys.path.insert(0, str(Path(__file__).parent.parent / "potentials"))
import starts  # from the checkout, as the potentials


def reference(potential: str) -> Atoms:
    """The first structure that comes with a potential."""
    atoms = ase.io.read(find_model(potential).parent / "reference.xyz", "0")
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


class Case(NamedTuple):
    potential: str
    start: Callable[[], Atoms]
    dtype: str
    timestep: float  # fs
    temperature: float  # K
    ensemble: str
    picoseconds: float


SILICON = partial(starts.crystal, "Si", 5.47, 2)
MOLYBDENUM = partial(starts.crystal, "Mo", 3.17, 3)
LITHIUM = partial(starts.crystal, "Li", 3.43, 3)
RUNS = {
    "acetylacetone": Case("acetylacetone-pbe", starts.acetylacetone, "float64", 0.5, 300, "nve", 100),
    "silicon": Case("silicon-pbe", SILICON, "float64", 1.0, 300, "nve", 100),
    "water": Case("water-pbe0", partial(starts.water_box, 3), "float32", 0.5, 330, "nve", 100),
    "silicon-npt": Case("silicon-pbe", SILICON, "float32", 2.0, 500, "npt", 50),
    "molybdenum": Case("molybdenum-pbe", MOLYBDENUM, "float64", 2.0, 300, "nve", 100),
    "lithium": Case("lithium-pbe", LITHIUM, "float64", 1.0, 300, "nve", 100),
    "ecemc": Case("ecemc-pbe", partial(reference, "ecemc-pbe"), "float32", 0.5, 500, "nve", 50),
}


class Counted(SEGNNCalculator):
    """Remembers how many lists of neighbours had been made at each evaluation."""

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        made = self._graphs[self.potentials[0].cutoff].neighbors.rebuilds
        self.__dict__.setdefault("made", []).append(made)


def run(name: str, out: str, scale: float) -> tuple[MDResult, dict]:
    case = RUNS[name]
    atoms = case.start()
    atoms.calc = Counted(case.potential, dtype=case.dtype)
    FIRE(atoms, logfile=None).run(fmax=0.5, steps=200)  # of water: the molecules are only turned at random
    common = {"timestep": case.timestep, "temperature": case.temperature}
    steps = round(7000 * scale / case.timestep)
    prefix = f"{out}_{name}"
    run_md(atoms, MDConfig(ensemble="langevin", steps=steps, restart=f"{prefix}_start.npz", **common), progress=False)
    every = 1 if case.ensemble == "npt" else 10
    files = {"log": f"{prefix}.csv", "restart": f"{prefix}.npz"}
    steps = round(1000 * scale * case.picoseconds / case.timestep)
    atoms.calc.made = []
    settings = MDConfig(
        ensemble=case.ensemble,
        velocities="keep",
        steps=steps,
        log_every=every,
        checkpoint_every=2000,
        **common,
        **files,
    )
    result = run_md(atoms, settings)
    row = {
        "run": name,
        "potential": case.potential,
        "atoms": len(atoms),
        "dtype": case.dtype,
        "timestep_fs": case.timestep,
        "ps": steps * case.timestep / 1000,
        "slope": result.energy_slope,
        "temperature": result.mean_temperature,
        "pressure": float(np.nanmean(result.log["pressure"])) if case.ensemble == "npt" else None,
        **jumps(result, atoms.calc.made, case.ensemble),
    }
    return result, row


def jumps(result: MDResult, made: list[int], ensemble: str) -> dict:
    """Root mean square steps of the conserved energy, meV, with a new list of neighbours and without."""
    changes = 1e3 * np.diff(result.log["conserved"])
    if ensemble != "npt" or len(made) < len(changes):  # a run that was gone on with counted a part only
        return {"with_list_meV": None, "others_meV": None}
    new = np.diff(np.array(made[-len(changes) - 1 :]), prepend=made[0])[-len(changes) :] > 0
    means = [float(np.sqrt(np.mean(changes[which] ** 2))) if which.any() else None for which in (new, ~new)]
    return dict(zip(("with_list_meV", "others_meV"), means, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = [name for name, case in RUNS.items() if case.potential in shipped_potentials()]
    parser.add_argument("--runs", nargs="+", default=shipped, choices=list(RUNS))
    parser.add_argument("--scale", type=float, default=1.0, help="of all durations")
    parser.add_argument("--out", default="conservation")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows, lines = [], []
    for name in a.runs:
        result, row = run(name, a.out, a.scale)
        rows.append(row)
        energy = result.log["conserved"] / row["atoms"]
        some = slice(None, None, max(len(energy) // 500, 1))
        points = zip(result.log["time_fs"][some] / 1000, np.abs(energy[some] - energy[0]), strict=True)
        lines += [{"run": name, "ps": t, "change": e} for t, e in points if t > 0 and e > 0]
    columns = {
        "run": "",
        "atoms": "d",
        "dtype": "",
        "timestep_fs": "g",
        "ps": "g",
        "slope": ".2g",
        "temperature": ".0f",
    }
    print_table(rows, columns | {"pressure": ".4f", "with_list_meV": ".3f", "others_meV": ".3f"})
    plot_lines(a.out, lines, group="run", x="ps", y="change", labels=("time [ps]", "change of energy [eV/atom]"))
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
