r"""A potential of one's own: a peptide of 42 atoms, learned from GFN2-xTB in an hour, and what it is worth.

Ac-Ala3-NHMe (`peptide.xyz`) at 300 and 600 K. The first part is what this command does:

    segnn learn md_examples/peptide.xyz --reference gfn2-xtb --temperature 300,600 --preset fast --aim 25 \
        --out peptide.pt

The second measures it on independent dynamics of the reference, on conformers that these lead to, at constant energy,
and against the cost of the reference (OMP_NUM_THREADS=1: on one core). Needs tblite: pip install tblite.
"""

import os
import time
from pathlib import Path

import ase.io
import numpy as np
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.optimize import LBFGS
from tblite.ase import TBLite

from segnn_ase import SEGNNCalculator
from segnn_ase.base.figures import plot_parity
from segnn_ase.learn import LearnConfig, learn
from segnn_ase.md.velocities import set_velocities

steps = int(os.environ.get("SEGNN_STEPS", 5000))  # of 1 fs, of the dynamics at each temperature
peptide = Path(__file__).with_name("peptide.xyz")
budget = {} if steps >= 1000 else {"minutes": 0.5, "rounds": 1, "first_labels": 8, "round_labels": 6}

found = learn(
    LearnConfig.parse(
        {
            "out": "peptide.pt",
            "structures": str(peptide),
            "reference": {"calculator": "gfn2-xtb"},
            "conditions": {"temperature": "300,600", **({} if steps >= 1000 else {"picoseconds": 0.01})},
            "model": {"preset": "fast"},
            "budget": budget,
            "aim": {"forces": 25},
        }
    )
)
print(f"\n{found.labels} labels in {found.minutes:.0f} minutes; {found.why or 'the aim is reached'}")


def xtb():
    return TBLite(method="GFN2-xTB", verbosity=0)


potential = SEGNNCalculator("peptide.pt", domain="ignore")
hottest = []
for temperature in (300, 600):
    atoms = ase.io.read(peptide)
    atoms.calc = xtb()
    LBFGS(atoms, logfile=None).run(fmax=0.1, steps=steps)
    rng = np.random.default_rng(temperature)
    set_velocities(atoms, temperature, rng)
    heat = {"temperature_K": temperature, "friction": 0.01 / units.fs, "fixcm": False, "rng": rng}
    dynamics, frames = Langevin(atoms, 1.0 * units.fs, **heat), []
    for _ in range(max(steps // 50, 2)):
        dynamics.run(min(50, steps))
        frames.append((atoms.copy(), atoms.get_potential_energy(), atoms.get_forces()))
    said = potential.evaluate([frame for frame, _, _ in frames])
    truth = np.array([forces for _, _, forces in frames])
    forces = np.array([one["forces"] for one in said])
    off = np.array([one["energy"] - energy for one, (_, energy, _) in zip(said, frames, strict=True)])
    outside = sum(bool(one["outside_domain"]) for one in said)
    print(
        f"{temperature} K, {len(frames)} frames of independent dynamics: forces off by "
        f"{1e3 * np.sqrt(np.mean((forces - truth) ** 2)):.1f} meV/Å (rms), energies by "
        f"{1e3 * np.sqrt(np.mean(off**2)) / len(atoms):.2f} meV/atom; {outside} outside of what it knows"
    )
    plot_parity(f"peptide_{temperature}K.png", truth, forces, label="forces", unit="eV/Å")
    hottest = [frame for frame, _, _ in frames]
    for frame, energy, label in frames:
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=label)
    ase.io.write(f"peptide_{temperature}K.xyz", hottest)

energies = []
for frame in hottest[:: max(len(hottest) // 6, 1)][:6]:  # conformers of the reference, from there relaxed by both
    pair, relaxed = [], frame.copy()
    for calculator in (xtb(), potential):
        relaxed.calc = calculator
        if not LBFGS(relaxed, logfile=None).run(fmax=0.001, steps=steps):  # 0.01 is found on slopes, too: it is so flat
            print(f"not at a minimum after {steps} steps")
        pair.append(relaxed.get_potential_energy())
    energies.append(pair)
relative = np.array(energies) - np.mean(energies, axis=0)
print("table: relative energies of conformers in meV, GFN2-xTB and the potential")
for reference, own in 1e3 * relative:
    print(f"{reference:10.1f} {own:10.1f}")
print(f"off by {1e3 * np.sqrt(np.mean((relative[:, 0] - relative[:, 1]) ** 2)):.1f} meV (rms)")

atoms = hottest[0].copy()
atoms.calc = potential
set_velocities(atoms, 300, np.random.default_rng(1))
dynamics, total = VelocityVerlet(atoms, 0.5 * units.fs), []
for _ in range(max(steps // 10, 2)):
    dynamics.run(10)
    total.append(atoms.get_total_energy())
slope = np.polyfit(0.005 * np.arange(len(total)), total, 1)[0] / len(atoms)
print(f"constant energy, {0.005 * len(total):.2f} ps: slope {1e3 * slope:.3f} meV/atom/ps")

for name, calculator in (("GFN2-xTB", xtb()), ("the potential", potential)):
    atoms = hottest[-1].copy()
    atoms.calc, taken = calculator, []
    for n in range(min(steps, 30) + 5):
        atoms.positions += np.random.default_rng(n).normal(scale=0.01, size=atoms.positions.shape)  # as in a step
        begin = time.perf_counter()
        atoms.get_forces()
        taken.append(time.perf_counter() - begin)
    print(f"a step of {len(atoms)} atoms by {name}: {1e3 * np.median(taken[5:]):.2f} ms")
