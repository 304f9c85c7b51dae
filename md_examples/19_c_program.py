"""Dynamics in a program of C that has never heard of Python, beside the same in ASE.

What the script does by itself (dynamics.c lies beside it; any C compiler):

    segnn export acetylacetone-pbe --dtype float64 --out acetylacetone-library
    cc -std=c99 -O2 -Iacetylacetone-library dynamics.c -o dynamics -Lacetylacetone-library -lsegnn
    LD_LIBRARY_PATH=acetylacetone-library ./dynamics acetylacetone-library/model.segnn molecule.txt 4000 0.5

Both begin with the same velocities and take the same steps: what they differ by in the end is rounding, which grows
with time as in all dynamics.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import units
from ase.md.verlet import VelocityVerlet

from segnn_ase import SEGNNCalculator
from segnn_ase.compiled.build import compiler
from segnn_ase.export.library import export
from segnn_ase.md.velocities import set_velocities
from segnn_ase.store.model_file import load_potential
from segnn_ase.store.shipped import find_model

steps, timestep = int(os.environ.get("SEGNN_STEPS", 4000)), 0.5  # fs
atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
set_velocities(atoms, 300, np.random.default_rng(1))

folder = Path("acetylacetone-library").absolute()
shutil.rmtree(folder, ignore_errors=True)
written = export(load_potential("acetylacetone-pbe").double(), folder)
source = Path(__file__).with_name("dynamics.c")
flags = ["-std=c99", "-O2", "-Wall", "-Wextra", f"-I{folder}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
subprocess.run([*compiler(), *flags, source, "-o", "dynamics", "-lsegnn"], check=True)
rows = np.column_stack([atoms.get_masses(), atoms.positions, atoms.get_velocities() * units.fs])
lines = [f"{symbol} {' '.join(f'{x:.17g}' for x in row)}" for symbol, row in zip(atoms.symbols, rows, strict=True)]
Path("molecule.txt").write_text("\n".join([str(len(atoms)), *lines, ""]))

begin = time.perf_counter()
command = ["./dynamics", str(written.numbers), "molecule.txt", str(steps), str(timestep)]
said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
seconds = {"C": time.perf_counter() - begin}
in_c = np.array([line.split() for line in said[:steps]], float)
positions = np.array([line.split() for line in said[steps:]], float)

atoms.calc = SEGNNCalculator("acetylacetone-pbe", dtype="float64")
atoms.get_forces()  # the first evaluation compiles and checks
dynamics, in_ase = VelocityVerlet(atoms, timestep * units.fs), []
begin = time.perf_counter()
for _ in dynamics.irun(steps):
    in_ase.append(atoms.get_total_energy())
seconds["ASE"] = time.perf_counter() - begin

off = np.abs(in_c[:, 1] - in_ase[1:])
print(
    f"total energies differ by {1e3 * off[:100].max():.1g} meV in the first steps, positions at the end by "
    f"{np.abs(positions - atoms.positions).max():.1g} Å"
)
print(", ".join(f"{name}: {1e3 * taken / steps:.3g} ms a step" for name, taken in seconds.items()))
time_ps = 1e-3 * timestep * np.arange(1, steps + 1)
plt.figure(figsize=(6, 4), layout="constrained")
plt.plot(time_ps, 1e3 * (in_c[:, 1] - in_c[0, 1]) / len(atoms), label="C")
plt.plot(time_ps, 1e3 * (np.array(in_ase[1:]) - in_c[0, 1]) / len(atoms), "--", label="ASE")
plt.xlabel("time / ps")
plt.ylabel("total energy / meV/atom")
plt.legend()
plt.savefig("c_program.png", dpi=150)
