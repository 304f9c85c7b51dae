"""Silicon at constant pressure: lattice parameter and thermal expansion.

Martyna-Tobias-Klein dynamics at zero pressure and two temperatures; the linear expansion coefficient is
the slope of the mean lattice parameter. Experiment has 2.6e-6 /K at 300 K and 4.2e-6 /K near 1000 K
(Okada and Tokumaru 1984); classical nuclei have no quantum effects at low temperature.
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk

from segnn_ase import SEGNNCalculator
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig

steps = int(os.environ.get("SEGNN_STEPS", 1500))
calculator = SEGNNCalculator("silicon-pbe")
temperatures, lattice, errors = [300.0, 900.0], [], []
figure, axes = plt.subplots()
for temperature in temperatures:
    atoms = bulk("Si", cubic=True, a=5.47).repeat(2)  # 64 atoms
    atoms.calc = calculator
    config = MDConfig(
        ensemble="npt",
        temperature=temperature,
        timestep=2.0,
        tdamp=100,
        pdamp=500,
        steps=steps,
        log_every=1,
        log=f"si_{temperature:.0f}K.csv",
    )
    log = run_md(atoms, config, overwrite=True).log
    a = np.cbrt(log["volume"]) / 2
    settled = a[len(a) // 3 :]
    blocks = [block.mean() for block in np.array_split(settled, 5) if len(block)]
    lattice.append(settled.mean())
    errors.append(np.std(blocks) / np.sqrt(len(blocks)))
    axes.plot(log["time_fs"] / 1000, a, lw=0.8, label=f"{temperature:.0f} K")
    print(f"{temperature:5.0f} K: a = {lattice[-1]:.4f} +- {errors[-1]:.4f} Å")
expansion = (lattice[1] - lattice[0]) / (temperatures[1] - temperatures[0]) / lattice[0]
error = np.hypot(*errors) / (temperatures[1] - temperatures[0]) / lattice[0]
print(f"linear thermal expansion {1e6 * expansion:.1f} +- {1e6 * error:.1f} e-6 /K")
axes.set(xlabel="time / ps", ylabel="lattice parameter / Å")
axes.legend()
figure.savefig("si_lattice.png", dpi=150)
