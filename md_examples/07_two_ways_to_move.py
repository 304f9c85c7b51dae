"""Two ways to move, learned from the same five charges: a network that jumps over a unit of time, and a potential.

The first (the SEGNN paper's experiment, section 5.1) is told where the bodies are one unit of time later, and is
applied ten times. The second is told their energies and forces, and ASE's VelocityVerlet integrates it; the two signs
of charge are its two elements. Both are compared with the exact motion: errors, energy, momentum, and what turning the
bodies does. k = 1 eV Å, masses 1 amu, so that ASE's unit of time is that of the data.

SEGNN_STEPS: epochs of the jumps (300); the potential gets the time that these took.
"""

import contextlib
import os
import time
import warnings

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import StructureError
from segnn_ase.dynamics import StepperTraining, load_stepper, simulate, train_stepper, write_motion
from segnn_ase.dynamics.systems import SYSTEMS, leapfrog
from segnn_ase.train import TrainConfig, train

warnings.filterwarnings("ignore", "All-NaN slice")
EPOCHS = int(os.environ.get("SEGNN_STEPS", 300))
TRAIN, VALID, FOLLOWED, HORIZONS = min(3000, 20 * EPOCHS), 200, 20, 10
ELEMENTS = {1.0: "H", -1.0: "F"}
SYSTEM, DT = SYSTEMS["charged"], 0.005
MOST_FORCE = 10.0  # of frames to learn from: the few in which two bodies nearly meet would decide everything
HORIZON = 1000  # steps of the exact motion, of 0.001


def atoms_of(x, q):
    return Atoms([ELEMENTS[c] for c in q], x, masses=np.ones(len(q)))


def labelled(x, q):
    atoms = atoms_of(x, q)
    energy, forces = SYSTEM.potential(x[None], q[None])[0], SYSTEM.accelerations(x[None], q[None])[0]
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def jumps(stepper, x, v, q):
    """Positions and velocities at each horizon, (HORIZONS, 5, 6)."""
    found = []
    for _ in range(HORIZONS):
        later = stepper.step(x, v, q)
        x, v = later[:, :3], later[:, 3:]
        found.append(later)
    return np.array(found)


def integrated(calculator, x, v, q):
    """The same by velocity Verlet; no numbers from where two bodies fall into each other."""
    atoms, found = atoms_of(x, q), np.full((HORIZONS, len(q), 6), np.nan)
    atoms.calc = calculator
    atoms.set_velocities(v)
    dynamics, start = VelocityVerlet(atoms, DT), atoms.get_total_energy()
    with contextlib.suppress(StructureError):
        for n in range(HORIZONS):
            dynamics.run(round(1.0 / DT))
            found[n] = np.hstack([atoms.positions, atoms.get_velocities()])
            own_drifts[n].append(abs(atoms.get_total_energy() - start) / (0.5 * np.square(v).sum()))
    return found


def exact(x, v, q):
    found, x, v = [], x[None], v[None]
    for _ in range(HORIZONS):
        x, v = leapfrog(SYSTEM, x, v, q[None], HORIZON)
        found.append(np.hstack([x[0], v[0]]))
    return np.array(found)


def energies(states, q):
    x, v = states[..., :3], states[..., 3:]
    return SYSTEM.potential(x, np.broadcast_to(q, x.shape[:2])) + 0.5 * np.square(v).sum(axis=(1, 2))


motion = simulate("charged", TRAIN + VALID + FOLLOWED, 43)
write_motion("charged.npz", motion)
training = {"epochs": EPOCHS, "batch_size": 100, "learning_rate": 0.01, "validate_every": 5}
sizes = {"train": TRAIN, "valid": VALID, "test": FOLLOWED}
start = time.monotonic()
settings = {"data": {"motion": "charged.npz", **sizes}, "model": {"preset": "segnn", "velocities": True}}
train_stepper(StepperTraining.parse({"out": "jumps.pt", "training": training, **settings}))
minutes = (time.monotonic() - start) / 60

frames = [labelled(x, q) for x, q in zip(motion.positions[:TRAIN], motion.charges[:TRAIN], strict=True)]
ase.io.write("charges.xyz", [atoms for atoms in frames if np.abs(atoms.get_forces()).max() < MOST_FORCE])
data = {"train": ["charges.xyz"], "reference_energies": dict.fromkeys(ELEMENTS.values(), 0.0), "refuse_flaws": False}
model = {"preset": "fast", "cutoff": 12.0, "n_radial": 16, "core_repulsion": False}
training = {"minutes": minutes, "batch_size": 50, "rollout_steps": 0, "teachers": 0}
train(TrainConfig.parse({"out": "charges.pt", "data": data, "model": model, "training": training}))

stepper, calculator = load_stepper("jumps.pt")[0], SEGNNCalculator("charges.pt", domain="ignore")
own_drifts = [[] for _ in range(HORIZONS)]  # of the energy that the potential itself has
errors, drifts, momenta, turned = ({"jumps": [], "potential": []} for _ in range(4))
matrix, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
for x, v, q in zip(*(part[-FOLLOWED:] for part in motion[:3]), strict=True):
    right = exact(x, v, q)
    kinetic = 0.5 * np.square(v).sum()
    for name, follow, by in (("jumps", jumps, stepper), ("potential", integrated, calculator)):
        states = follow(by, x, v, q)
        errors[name].append(np.square(states[:, :, :3] - right[:, :, :3]).mean(axis=(1, 2)))
        drifts[name].append(np.abs(energies(states, q) - energies(right[:1], q)) / kinetic)
        momenta[name].append(np.linalg.norm(states[:, :, 3:].sum(axis=1) - v.sum(axis=0), axis=1))
        other = follow(by, x @ matrix, v @ matrix, q)[0, :, :3]
        turned[name].append(np.abs(other - states[0, :, :3] @ matrix).max())

kept = np.isfinite(errors["potential"])  # where opposite charges meet the potential gives up: such count for neither


def medians(rows):
    """At each horizon, over the bodies that are kept there."""
    return np.nanmedian(np.where(kept, rows, np.nan), axis=0)


print("a table of medians over bodies that neither has seen (time: error, energy off / kinetic, momentum off)")
print(f"of {FOLLOWED} {(~kept[:, 0]).sum()} are lost by the potential until 1, {(~kept[:, -1]).sum()} until {HORIZONS}")
for name in errors:
    for n in (0, HORIZONS - 1):
        error, drift, momentum = (medians(found[name])[n] for found in (errors, drifts, momenta))
        told = f"{error:.5f} {drift:.4f} {momentum:.1e}, turned {np.nanmax(turned[name]):.1e}"
        print(f"{name:>10s} {n + 1:3d}: {told}")

print(f"what the potential takes for the energy is off by {np.median(own_drifts[0]):.1e} of the kinetic at time 1")

figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
titles = ("squared error of positions", "true energy off, of the kinetic", "momentum off")
for axis, title, found in zip(axes, titles, (errors, drifts, momenta), strict=True):
    for name, rows in found.items():
        axis.semilogy(np.arange(1, HORIZONS + 1), medians(rows), "o-", label=name)
    axis.set(xlabel="time", title=title)
axes[0].legend()
figure.savefig("two_ways_to_move.png", dpi=150)
