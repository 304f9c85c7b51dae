"""Potentials with the domain of a few structures that need no labels."""

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

from helpers.systems import CUTOFF, rattled
from segnn_ase.data.batches import make_item, smallest_distances
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.train.characterize import characterize

BOX = 1.05 * 3.6  # Å


def copper(seed: int, scale: float = 1.0, stdev: float = 0.08) -> Atoms:
    return rattled(bulk("Cu", a=BOX * scale, cubic=True), seed, stdev)


def training_set() -> list[Atoms]:
    return [copper(n, scale) for n, scale in enumerate(np.linspace(0.98, 1.02, 12))] + [
        rattled(molecule("CO"), n, 0.03) for n in range(6)
    ]


def characterized(potential, frames: list[Atoms], *, lone_atoms: bool = True):
    """Give a potential the domain of these frames, labelled by zeros."""
    items = []
    for atoms in frames:
        frame = frame_from_atoms(atoms)._replace(energy=0.0, forces=np.zeros((len(atoms), 3)))
        items.append(make_item(frame, CUTOFF))
    closest = smallest_distances(items)
    potential.set_core(closest)
    characterize(potential, items, items[::3], closest, lone_atoms=lone_atoms)
    return potential


def contact() -> Atoms:
    atoms = copper(0, stdev=0.0)
    atoms.positions[1] = atoms.positions[0] + [1.2, 0.2, 0]
    return atoms
