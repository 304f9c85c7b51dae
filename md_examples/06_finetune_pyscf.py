"""Fine-tune the acetylacetone potential on a molecule it was not trained on, with fresh DFT labels.

Formaldehyde, H2CO, is sampled around its minimum, labelled by PySCF (PBE, another basis and code than
the training data, so other total energies), split into training and test frames, and `finetune` shifts the
reference energies and the weights. Needs PySCF: pip install ".[dft]" in the project's folder.
"""

import os

import ase.io
import numpy as np
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree
from pyscf import dft, gto

from segnn_ase.data import read_frames
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.report import error_table
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import finetune

count = int(os.environ.get("SEGNN_STEPS", 60))


def label(atoms):
    """PBE/def2-SVP energy (eV) and forces (eV/Å)."""
    mol = gto.M(atom=list(zip(atoms.symbols, atoms.positions.tolist(), strict=True)), basis="def2-svp", verbose=0)
    calculation = dft.RKS(mol, xc="pbe")
    energy = calculation.kernel() * Hartree
    forces = -calculation.nuc_grad_method().kernel() * Hartree / Bohr
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


frames = []
for n in range(count):
    atoms = molecule("H2CO")
    atoms.rattle(0.08, rng=np.random.default_rng(n))
    frames.append(label(atoms))
    print(f"\rlabelled {n + 1} of {count} frames", end="", flush=True)
held_out = max(count // 5, 1)
ase.io.write("h2co_test.xyz", frames[:held_out])
ase.io.write("h2co_train.xyz", frames[held_out:])

before = evaluate_files("acetylacetone-pbe", ["h2co_test.xyz"])
config = TrainConfig.parse(
    {
        "out": "h2co.pt",
        "data": {"train": "h2co_train.xyz", "test": "h2co_test.xyz", "valid_fraction": 0.15},
        "training": {"epochs": max(count // 2, 1)},
    }
)
after = finetune("acetylacetone-pbe", config)
print(f"\n{len(read_frames('h2co_test.xyz'))} test frames, before:\n{error_table(before)}")
print(f"after:\n{error_table({'h2co_test.xyz': after['h2co_test.xyz']})}")
