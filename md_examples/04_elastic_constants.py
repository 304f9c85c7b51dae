"""Silicon: relax cell and atoms, equation of state, then the cubic elastic constants from the stress.

PBE has a = 5.469 Å, C11 = 153, C12 = 57, C44 = 75 GPa (Materials Project, mp-149).
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import units
from ase.build import bulk
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from matscipy.elasticity import fit_elastic_constants

from segnn_ase import SEGNNCalculator

atoms = bulk("Si", cubic=True, a=5.6)
atoms.rattle(0.05, seed=0)
atoms.calc = SEGNNCalculator("silicon-pbe", dtype="float64")
BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=int(os.environ.get("SEGNN_STEPS", 200)))
pressure = -atoms.get_stress()[:3].mean() / units.GPa
print(f"relaxed lattice parameter {np.cbrt(atoms.get_volume()):.4f} Å, pressure {pressure:.3f} GPa")

scales = np.linspace(0.97, 1.03, 7)
volumes, energies = [], []
for scale in scales:
    strained = atoms.copy()
    strained.set_cell(scale * atoms.cell.array, scale_atoms=True)
    strained.calc = atoms.calc
    volumes.append(strained.get_volume())
    energies.append(strained.get_potential_energy())
volume, energy, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
print(f"bulk modulus {modulus / units.GPa:.1f} GPa at {np.cbrt(volume):.4f} Å")

C, _ = fit_elastic_constants(atoms, symmetry="cubic", N_steps=5, delta=1e-2, optimizer=BFGS, fmax=1e-3, verbose=False)
C11, C12, C44 = (C[k] / units.GPa for k in ((0, 0), (0, 1), (3, 3)))
print(f"C11 {C11:.0f}, C12 {C12:.0f}, C44 {C44:.0f} GPa")

figure, axes = plt.subplots()
axes.plot(np.array(volumes) / 8, np.array(energies) / 8, "o-")
axes.set(xlabel="volume / Å³ per atom", ylabel="energy / eV per atom")
figure.savefig("si_eos.png", dpi=150)
