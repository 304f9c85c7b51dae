"""Constant-energy dynamics of acetylacetone, and how well it conserves.

The total energy of velocity Verlet fluctuates with the square of the time step and must not drift: the
forces are the exact derivative of a smooth energy. Run in float64, the slope is the integrator's alone.
"""

import os

import ase.io

from segnn_ase import SEGNNCalculator
from segnn_ase.base.figures import plot_energy_drift
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.shipped import find_model

steps = int(os.environ.get("SEGNN_STEPS", 4000))
atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
atoms.calc = SEGNNCalculator("acetylacetone-pbe", dtype="float64")

result = run_md(
    atoms,
    MDConfig(
        ensemble="nve", temperature=300, timestep=0.5, steps=steps, log_every=1, trajectory="acac.xyz", log="acac.csv"
    ),
    overwrite=True,
)
log = result.log
plot_energy_drift("acac_energy.png", log["time_fs"], log["total"] / len(atoms), log["temperature"], result.energy_slope)
print(f"{result.ms_per_step:.1f} ms/step, mean temperature {result.mean_temperature:.0f} K")
print(f"slope of the total energy {1e3 * result.energy_slope:.2g} meV/atom/ps; see acac_energy.png")
