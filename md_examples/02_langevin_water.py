"""Liquid water: Langevin dynamics at 330 K, then constant energy; radial distributions beside those of DFT.

This is what `make md` runs. The first stage brings 64 molecules to 330 K; the second shows that the
potential conserves energy and gives the structure: O-O, O-H and H-H radial distribution functions,
compared with those of the PBE0 training frames, which are stored with the potential.
SEGNN_STEPS sets the steps of each stage; a stage that was stopped goes on where it was.
"""

import json
import os
from pathlib import Path

import ase.io
import numpy as np
import torch

from segnn_ase import SEGNNCalculator
from segnn_ase.base.figures import plot_energy_drift, plot_rdf
from segnn_ase.md.analysis import radial_distribution
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.shipped import find_model

out = Path("md_water")
steps = int(os.environ.get("SEGNN_STEPS", 1200))
torch.manual_seed(0)
shipped = find_model("water-pbe0").parent
atoms = ase.io.read(shipped / "reference.xyz", "0")  # 64 molecules in a periodic cell of 12.44 Å
atoms.calc = SEGNNCalculator("water-pbe0")


def settings(stage: str, **ensemble) -> MDConfig:
    return MDConfig(
        steps=steps,
        timestep=0.5,
        log_every=1,
        save_every=max(steps // 60, 1),
        trajectory=out / f"{stage}.xyz",
        log=out / f"{stage}.csv",
        restart=out / f"{stage}.npz",
        checkpoint_every=100,
        **ensemble,
    )


print(f"Langevin, 330 K, {steps} steps of 0.5 fs, {len(atoms)} atoms")
warm = run_md(atoms, settings("langevin", ensemble="langevin", temperature=330, friction=0.02))
print(f"NVE, {steps} steps")
nve = run_md(atoms, settings("nve", ensemble="nve", velocities="keep"))

log = nve.log
plot_energy_drift(out / "energy.png", log["time_fs"], log["total"] / len(atoms), log["temperature"], nve.energy_slope)
frames = ase.io.read(out / "langevin.xyz", ":")[10:] + ase.io.read(out / "nve.xyz", ":")
curves = radial_distribution(frames or [atoms], ["O-O", "O-H", "H-H"], r_max=6.0, bins=120)
stored = json.loads((shipped / "rdf_dft.json").read_text())
plot_rdf(out / "rdf.png", curves, {pair: (np.array(stored["r"]), np.array(g)) for pair, g in stored["g"].items()})

r, g = curves["O-O"]
if np.isfinite(nve.ms_per_step):
    print(f"{nve.ms_per_step:.0f} ms/step, {nve.ns_per_day:.3f} ns/day")
else:
    print(f"both stages were finished before: remove {out}/ to run them again")
print(f"mean temperature: Langevin {warm.mean_temperature:.0f} K, NVE {nve.mean_temperature:.0f} K")
print(f"NVE energy slope {1e3 * nve.energy_slope:.3g} meV/atom/ps")
print(f"first O-O peak {g[r < 3.3].max():.2f} at {r[g[r < 3.3].argmax()]:.2f} Å")
print(f"trajectories, logs, energy.png and rdf.png are in {out}/")
