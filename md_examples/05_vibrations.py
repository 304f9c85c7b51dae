"""Vibrations of acetylacetone from the analytic Hessian: no finite differences, one call."""

import os

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase.optimize import BFGS
from ase.vibrations import VibrationsData

from segnn_ase import SEGNNCalculator
from segnn_ase.store.shipped import find_model

atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
atoms.calc = SEGNNCalculator("acetylacetone-pbe", dtype="float64")
BFGS(atoms, logfile=None).run(fmax=1e-3, steps=int(os.environ.get("SEGNN_STEPS", 500)))
hessian = atoms.calc.get_hessian(atoms)
vibrations = VibrationsData.from_2d(atoms, hessian)
frequencies = vibrations.get_frequencies()
print(f"asymmetry of the Hessian {np.abs(hessian - hessian.T).max():.1e} eV/Å^2")
print("a table of wavenumbers / cm^-1 (i: imaginary)")
print(vibrations.tabulate())

grid = np.linspace(0, 3800, 2000)
real = np.real(frequencies[6:])
density = np.exp(-(((grid[:, None] - real) / 10) ** 2)).sum(axis=1)
figure, axes = plt.subplots()
axes.plot(grid, density)
axes.set(xlabel="wavenumber / cm$^{-1}$", ylabel="density of modes")
figure.savefig("acac_modes.png", dpi=150)
