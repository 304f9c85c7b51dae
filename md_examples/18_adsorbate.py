"""An adsorbate on a metal: carbon monoxide on copper(111), from SevenNet-0, a universal potential.

36 atoms of copper in four layers, of which the lowest is fixed, and one molecule, at 300 and 500 K. The first part is
what this command does (pip install sevenn, its weights are in the wheel):

    segnn learn ontop.traj bridge.traj hcp.traj fcc.traj --reference sevennet-0 --temperature 300,500 --minutes 60 \\
        --preset fast --out slab.pt

The second asks both for the energies of the molecule on the four sites, relaxed by either, and for the time that a step
takes.
"""

import os
import time

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from ase.optimize import LBFGS
from sevenn.calculator import SevenNetCalculator

from segnn_ase import SEGNNCalculator
from segnn_ase.learn import LearnConfig, learn

steps = int(os.environ.get("SEGNN_STEPS", 5000))
short = steps < 1000


def slab(site: str) -> Atoms:
    atoms = fcc111("Cu", size=(3, 3, 4 if not short else 2), a=3.63, vacuum=8.0)
    add_adsorbate(atoms, Atoms("CO", [[0, 0, 0], [0, 0, 1.15]]), 1.9 if site == "ontop" else 1.5, site)
    lowest = atoms.positions[:, 2].min() + 0.5
    atoms.set_constraint(FixAtoms(mask=atoms.positions[:, 2] < lowest))
    return atoms


sites = ("ontop", "bridge", "hcp", "fcc")
for site in sites:
    slab(site).write(f"{site}.traj")
found = learn(
    LearnConfig.parse(
        {
            "out": "slab.pt",
            "structures": [f"{site}.traj" for site in sites],
            "reference": "sevennet-0",
            "conditions": {"temperature": "300,500", **({"picoseconds": 0.01, "starts": 1} if short else {})},
            "budget": {"minutes": 2, "rounds": 1} if short else {"minutes": 60},
            "model": {"preset": "fast"},
        }
    )
)
print(f"\n{found.labels} labels in {found.minutes:.0f} minutes; {found.why or 'the aim is reached'}")

both = {"reference": SevenNetCalculator("7net-0"), "potential": SEGNNCalculator("slab.pt", domain="ignore")}
energies = {name: [] for name in both}
for name, calculator in both.items():
    for site in sites:
        atoms = slab(site)
        atoms.calc = calculator
        LBFGS(atoms, logfile=None).run(fmax=0.03, steps=2 if short else 200)
        energies[name].append(atoms.get_potential_energy())
        metal, molecule = atoms.positions[:-2], atoms.positions[-2]
        near = np.sum(np.linalg.norm(metal - molecule, axis=1) < 2.4)  # one on top, two of a bridge, three of a hollow
        outside = "; outside of what it knows" if calculator.results.get("outside_domain") else ""
        print(f"{site} by the {name}: carbon has {near} neighbours{outside}")
print("table: energies of sites in meV, by the reference and the potential, from the first one")
for n, site in enumerate(sites):
    print(f"{site:8s}", *(f"{1e3 * (values[n] - values[0]):10.1f}" for values in energies.values()))

for name, calculator in both.items():
    atoms, taken = slab("ontop"), []
    atoms.calc = calculator
    for n in range(8 if short else 25):
        atoms.positions += np.random.default_rng(n).normal(scale=0.01, size=atoms.positions.shape)  # as in a step
        begin = time.perf_counter()
        atoms.get_forces()
        taken.append(time.perf_counter() - begin)
    print(f"a step of {len(atoms)} atoms by the {name}: {1e3 * np.median(taken[3:]):.2f} ms")
