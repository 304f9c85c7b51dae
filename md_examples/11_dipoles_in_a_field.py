"""Water molecules in an electric field: from labels of a molecule to how a gas of them is polarized.

A bent molecule with springs, charges and a polarizability (E = springs - F . mu - alpha F^2 / 2, all known exactly)
labels eighty distorted structures in random fields: energies, forces, dipoles. The potential is told the field, and its
dipole, polarizability and Born charges are derivatives of its energy. Twelve molecules out of sight of each other then
turn at 300 K, in fields of 0 to 0.3 V/Å, by Langevin dynamics: <cos> of dipole and field follows Langevin's function
coth x - 1 / x, x = mu F / kT, which is drawn beside it. A minute on one core.

SEGNN_STEPS: epochs (60), and a hundredth of the steps of dynamics.
"""

import os

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin

from segnn_ase import SEGNNCalculator
from segnn_ase.train import TrainConfig, train

EPOCHS = int(os.environ.get("SEGNN_STEPS", "60"))
STEPS, KELVIN, MOLECULES, APART = 100 * EPOCHS, 300.0, 12, 12.0  # steps of 0.5 fs, K, Å
CHARGES = np.array([-0.66, 0.33, 0.33])  # e
ALPHA, STRETCH, BEND, BOND, ANGLE = 0.1, 25.0, 3.0, 0.96, np.radians(104.5)  # e Å^2/V, eV/Å^2, eV, Å
FIELDS = (0.0, 0.05, 0.1, 0.2, 0.3)  # V/Å
SHAPE = BOND * np.array([[0, 0, 0], *([s * np.sin(ANGLE / 2), 0, np.cos(ANGLE / 2)] for s in (1, -1))])


def labelled(positions: np.ndarray, field: np.ndarray) -> Atoms:
    """Energy, forces and dipole of the model in a field."""
    atoms, forces = Atoms("OH2", positions), CHARGES[:, None] * field
    bonds = positions[1:] - positions[0]
    lengths = np.linalg.norm(bonds, axis=1)
    u = bonds / lengths[:, None]
    cosine = u[0] @ u[1]
    bent = cosine - np.cos(ANGLE)
    energy = 0.5 * STRETCH * np.sum((lengths - BOND) ** 2) + 0.5 * BEND * bent**2
    energy -= CHARGES @ positions @ field + 0.5 * ALPHA * field @ field
    for k in range(2):
        push = STRETCH * (lengths[k] - BOND) * u[k] + BEND * bent * (u[1 - k] - cosine * u[k]) / lengths[k]
        forces[1 + k] -= push
        forces[0] += push
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    atoms.info.update(external_field=field, dipole=CHARGES @ positions + ALPHA * field)
    return atoms


def some_direction(rng: np.random.Generator) -> np.ndarray:
    u = rng.normal(size=3)
    return u / np.linalg.norm(u)


rng, frames = np.random.default_rng(0), []
for _ in range(80):
    atoms = Atoms("OH2", SHAPE + rng.normal(scale=0.06, size=(3, 3)))
    atoms.rotate(rng.uniform(0, 360), some_direction(rng))
    frames.append(labelled(atoms.positions, rng.uniform(0, 0.4) * some_direction(rng)))
ase.io.write("bent_molecules.xyz", frames)

model = {"hidden_irreps": "16x0e+16x1o+8x2e", "lmax_attr": 2, "cutoff": 4.0, "cues": ["external_field"]}
training = {"epochs": EPOCHS, "rollout_steps": 0, "learning_rate": 0.02}
data = {"train": ["bent_molecules.xyz"]}
train(TrainConfig.parse({"out": "molecule.pt", "data": data, "model": model, "training": training}))

calculator = SEGNNCalculator("molecule.pt", domain="ignore")
one = labelled(SHAPE, np.array([0.0, 0.0, 0.1]))
responses = {
    name: calculator.get_property(name, one) for name in ("dipole", "polarizability", "born_effective_charges")
}
print("a table: learned and exact")
print(f"dipole along z    {responses['dipole'][2]:8.4f} {one.info['dipole'][2]:8.4f} e Å")
print(f"polarizability    {np.trace(responses['polarizability']) / 3:8.4f} {ALPHA:8.4f} e Å²/V")
for symbol, tensor, charge in zip("OHH", responses["born_effective_charges"], CHARGES, strict=True):
    print(f"Born charge of {symbol}  {np.trace(tensor) / 3:8.4f} {charge:8.4f} e")

molecules = Atoms()
for k in range(MOLECULES):
    atoms = Atoms("OH2", SHAPE)
    atoms.rotate(rng.uniform(0, 360), some_direction(rng))
    atoms.positions += [APART * k, 0, 0]
    molecules += atoms
kept, aligned = APART * np.arange(MOLECULES), []
for strength in FIELDS:
    gas = molecules.copy()
    gas.info["external_field"] = np.array([0.0, 0.0, strength])
    gas.calc = calculator
    gas.set_velocities(rng.normal(size=(len(gas), 3)) * np.sqrt(units.kB * KELVIN / gas.get_masses())[:, None])
    dynamics = Langevin(gas, 0.5 * units.fs, temperature_K=KELVIN, friction=0.02 / units.fs, fixcm=False, rng=rng)
    cosines = []
    for step in range(STEPS // 10):
        dynamics.run(10)
        parts = gas.positions.reshape(MOLECULES, 3, 3)
        if step > STEPS // 50:
            mu = np.einsum("a,kai->ki", CHARGES, parts)
            cosines.append(np.mean(mu[:, 2] / np.linalg.norm(mu, axis=1)))
        shift = np.zeros((MOLECULES, 1, 3))
        shift[:, 0, 0] = kept - parts[:, 0, 0]  # back to their places, as nobody holds them
        shift[:, 0, 1:] = -parts[:, 0, 1:]
        gas.positions = (parts + shift).reshape(-1, 3)
    aligned.append(np.mean(cosines))
    print(f"{strength:5.2f} V/Å: <cos> {aligned[-1]:6.3f}")

fine = np.linspace(1e-3, max(FIELDS), 100)
x = np.linalg.norm(CHARGES @ SHAPE) * fine / (units.kB * KELVIN)
figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
axes.plot(fine, 1 / np.tanh(x) - 1 / x, color="0.6", label="coth x - 1 / x")
axes.plot(FIELDS, aligned, "o", label="dynamics, learned")
axes.set(xlabel="field, V/Å", ylabel="⟨cos⟩ of dipole and field")
axes.legend()
figure.savefig("aligned.png", dpi=150)
