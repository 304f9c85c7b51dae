"""A chain of spins on a lattice: exchange that depends on the distance, from energies, forces and magnetic forces.

E = -sum_i J(d_i,i+1) m_i . m_i+1 + springs, J(d) = 60 meV exp((2.5 Å - d) / 0.6 Å), |m| = 1 μB. The potential is told
the moments as ASE has them, without spin-orbit coupling, and learns from chains of eight atoms in random directions. It
is then asked for spirals: the energy of every wave vector, ferromagnet to antiferromagnet, and how the chain shrinks by
exchange striction; both are known exactly. A minute on one core.

SEGNN_STEPS: epochs (40).
"""

import os

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from segnn_ase import SEGNNCalculator
from segnn_ase.train import TrainConfig, train

EPOCHS = int(os.environ.get("SEGNN_STEPS", "40"))
J, RANGE, SPRING, LENGTH, ATOMS = 0.06, 0.6, 2.0, 2.5, 8  # eV, Å, eV/Å^2, Å


def chain(spacing: float, moments: np.ndarray) -> Atoms:
    n = len(moments)
    atoms = Atoms(f"Fe{n}", np.outer(np.arange(n), [spacing, 0, 0]), cell=[n * spacing, 0, 0], pbc=(True, False, False))
    atoms.set_initial_magnetic_moments(moments)
    return atoms


def labelled(atoms: Atoms) -> Atoms:
    """Energy, forces and magnetic forces -dE/dm of the model."""
    m, n = atoms.get_initial_magnetic_moments(), len(atoms)
    forces, turning, energy = np.zeros((n, 3)), np.zeros((n, 3)), 0.0
    for i in range(n):
        k = (i + 1) % n
        d = atoms.get_distance(i, k, mic=True, vector=True)
        r = np.linalg.norm(d)
        exchange = J * np.exp((LENGTH - r) / RANGE)
        energy += -exchange * m[i] @ m[k] + 0.5 * SPRING * (r - LENGTH) ** 2
        slope = exchange / RANGE * (m[i] @ m[k]) + SPRING * (r - LENGTH)  # dE/dr
        forces[i] += slope * d / r
        forces[k] -= slope * d / r
        turning[i] += exchange * m[k]
        turning[k] += exchange * m[i]
    atoms.arrays["magnetic_forces"] = turning
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def spiral(q: float, spacing: float = LENGTH) -> Atoms:
    """Moments that turn by q from atom to atom."""
    angles = q * np.arange(ATOMS)
    return chain(spacing, np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1))


rng, frames = np.random.default_rng(0), []
for _ in range(150):
    directions = rng.normal(size=(ATOMS, 3))
    atoms = chain(rng.uniform(2.4, 2.6), directions / np.linalg.norm(directions, axis=1)[:, None])
    atoms.positions += rng.normal(scale=0.05, size=(ATOMS, 3))
    frames.append(labelled(atoms))
ase.io.write("chains.xyz", frames)

model = {"preset": "segnn", "cutoff": 4.0, "core_repulsion": False, "cues": ["initial_magmoms"]}
training = {"epochs": EPOCHS, "rollout_steps": 0, "learning_rate": 0.01}
data = {"train": ["chains.xyz"], "reference_energies": {"Fe": 0.0}}
train(TrainConfig.parse({"out": "chain.pt", "data": data, "model": model, "training": training}))

calculator = SEGNNCalculator("chain.pt", domain="ignore")
waves = 2 * np.pi * np.arange(ATOMS // 2 + 1) / ATOMS  # that fit into the chain
learned = np.array([calculator.get_potential_energy(spiral(q)) for q in waves]) / ATOMS
exact = np.array([labelled(spiral(q)).get_potential_energy() for q in waves]) / ATOMS
spacings = np.linspace(2.42, 2.58, 17)
print("a table: wave vector / pi, energy of an atom learned and exact, meV")
for q, a, b in zip(waves, learned, exact, strict=True):
    print(f"{q / np.pi:6.3f} {1e3 * a:9.3f} {1e3 * b:9.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
fine = np.linspace(0, np.pi, 200)
axes[0].plot(fine / np.pi, -1e3 * J * np.cos(fine), color="0.6", label="exact")
axes[0].plot(waves / np.pi, 1e3 * learned, "o", label="learned")
axes[0].set(xlabel="wave vector / π", ylabel="energy of an atom, meV")
axes[0].legend()
for name, q in (("ferromagnet", 0.0), ("antiferromagnet", np.pi)):
    chains = [spiral(q, spacing) for spacing in spacings]
    found = 1e3 / ATOMS * np.array([calculator.get_potential_energy(atoms) for atoms in chains])
    right = 1e3 / ATOMS * np.array([labelled(atoms).get_potential_energy() for atoms in chains])
    axes[1].plot(spacings, right, color="0.6")
    axes[1].plot(spacings, found, "o", markersize=3, label=name)
    print(f"{name}: shortest at {spacings[found.argmin()]:.2f} Å learned, {spacings[right.argmin()]:.2f} Å exact")
axes[1].set(xlabel="spacing, Å", ylabel="energy of an atom, meV")
axes[1].legend()
figure.savefig("spin_chain.png", dpi=150)
