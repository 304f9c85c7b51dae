"""Phonons of rock salt with their LO-TO splitting: Born charges and dielectric constant from the potential, by phonopy.

Rigid ions (Coulomb and Born-Mayer, lattice constant 5.64 Å) with a polarizable background label thirty rattled cells:
energies, forces, Born charges, polarizability. The potential sees 5 Å and knows fields. phonopy takes its forces on a
few displaced atoms, its Born charges and its dielectric constant, 1 + alpha / (eps_0 V), and adds what the macroscopic
field of a longitudinal wave does near the zone centre, omega_LO^2 - omega_TO^2 = Z^2 / (eps_0 eps mu V), which no
cutoff could. The same for the ions themselves is drawn beside it. Needs phonopy (pip install phonopy).

SEGNN_STEPS: epochs (40).
"""

import os

import ase.io
import matplotlib
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from segnn_ase import SEGNNCalculator
from segnn_ase.model.coulomb import COULOMB, of_charges
from segnn_ase.train import TrainConfig, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EPOCHS = int(os.environ.get("SEGNN_STEPS", "40"))
LATTICE, RANGE, REACH, SMALL = 5.64, 0.317, 8.0, 0.5  # Å: constant, of the repulsion, its cutoff, width of charges
MADELUNG, ALPHA = 1.7475646, 0.15  # of ions at half the constant; e Å^2/V for an ion
CHARGES = {"Na": 1.0, "Cl": -1.0}  # e
VACUUM = 1 / (4 * np.pi * COULOMB)  # eps_0, e/(V Å)
NEAREST = LATTICE / 2
STRENGTH = MADELUNG * COULOMB * RANGE / (6 * NEAREST**2) * np.exp(NEAREST / RANGE)  # eV: no pressure at this constant


class Ions(Calculator):
    """Point charges (narrow Gaussians) and exp(-r / RANGE) between unlike ions."""

    implemented_properties = ["energy", "forces", "born_effective_charges", "polarizability"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        charges = np.array([CHARGES[symbol] for symbol in atoms.symbols])
        q, x, h = map(torch.tensor, (charges, atoms.positions, atoms.cell.array))
        found = of_charges(q, x, h, SMALL)
        i, j, d, D = neighbor_list("ijdD", atoms, REACH)
        v = np.where(charges[i] * charges[j] < 0, STRENGTH * np.exp(-d / RANGE), 0.0)
        push = np.zeros((len(atoms), 3))
        np.add.at(push, i, -(v / RANGE / d)[:, None] * D)
        self.results = {
            "energy": 0.5 * float(q @ found.potential) + 0.5 * v.sum(),
            "forces": found.forces.numpy() + push,
            "born_effective_charges": charges[:, None, None] * np.eye(3),
            "polarizability": ALPHA * len(atoms) * np.eye(3),
        }


def phonons_of(calculator: Calculator) -> Phonopy:
    cell = bulk("NaCl", "rocksalt", LATTICE)
    unit = PhonopyAtoms(symbols=list(cell.symbols), cell=cell.cell.array, scaled_positions=cell.get_scaled_positions())
    phonons = Phonopy(unit, supercell_matrix=2 * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]))
    phonons.generate_displacements(distance=0.01)
    forces = []
    for moved in phonons.supercells_with_displacements:
        atoms = Atoms(moved.symbols, cell=moved.cell, scaled_positions=moved.scaled_positions, pbc=True)
        forces.append(calculator.get_property("forces", atoms))
    phonons.forces = forces
    phonons.produce_force_constants()
    born, alpha = (calculator.get_property(name, cell) for name in ("born_effective_charges", "polarizability"))
    dielectric = np.eye(3) + alpha / (VACUUM * cell.get_volume())
    phonons.nac_params = {"born": born, "dielectric": dielectric, "factor": COULOMB}
    return phonons


def at_centre(phonons: Phonopy) -> np.ndarray:
    """TO and LO in THz."""
    phonons.run_qpoints([[0, 0, 0]], nac_q_direction=[0, 0, 1])
    return phonons.qpoints.frequencies[0][[3, 5]]


rng, ions, frames = np.random.default_rng(0), Ions(), []
for n in range(30):
    atoms = bulk("NaCl", "rocksalt", LATTICE * rng.uniform(0.98, 1.03), cubic=True).repeat((2, 2, 1 + n % 2))
    atoms.rattle(rng.uniform(0.02, 0.15), rng=rng)
    labels = {name: ions.get_property(name, atoms) for name in ions.implemented_properties}
    atoms.info.update(energy=labels["energy"], polarizability=labels["polarizability"])
    atoms.arrays |= {
        "forces": labels["forces"],
        "born_effective_charges": labels["born_effective_charges"].reshape(-1, 9),
    }
    frames.append(atoms)
ase.io.write("salt.xyz", frames)

model = {"preset": "fast", "cutoff": 5.0, "hidden_irreps": "16x0e+16x1o+8x2e", "cues": ["external_field"]}
training = {"epochs": EPOCHS, "rollout_steps": 0, "learning_rate": 0.02}
data = {"train": ["salt.xyz"]}
train(TrainConfig.parse({"out": "salt.pt", "data": data, "model": model, "training": training}))

both = {"ions": phonons_of(ions), "learned": phonons_of(SEGNNCalculator("salt.pt", domain="ignore", dtype="float64"))}
print("a table: at the zone centre, THz, and what they come from")
for name, phonons in both.items():
    transverse, longitudinal = at_centre(phonons)
    born, dielectric = phonons.nac_params["born"], phonons.nac_params["dielectric"]
    print(
        f"{name:8s} TO {transverse:6.3f}, LO {longitudinal:6.3f}; "
        f"Born charge {born[0][0, 0]:6.3f} e, dielectric constant {dielectric[0, 0]:6.3f}"
    )

ends = {"X": (0.5, 0, 0.5), "L": (0.5, 0.5, 0.5)}
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.8), layout="constrained")
for name, phonons in both.items():
    phonons.run_band_structure([np.linspace((0, 0, 0), end, 41) for end in ends.values()])
    style = {"color": "0.6", "lw": 3} if name == "ions" else {"color": "#0072B2", "lw": 1.2}
    for axis, end, frequencies in zip(axes, ends, phonons.band_structure.frequencies, strict=True):
        axis.plot(np.linspace(0, 1, 41), frequencies, **style)[0].set_label(name)
        axis.set(xlim=(0, 1), xticks=[0, 1], xticklabels=["Γ", end])
axes[0].set_ylabel("frequency, THz")
axes[0].legend()
figure.savefig("lo_to.png", dpi=150)
