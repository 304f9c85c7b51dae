"""Pairs of neighbouring atoms: searched once a frame, and looked at by every check that needs them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.structure.neighbors import neighbor_list

CUTOFF = 5.0  # Å


class Pairs(NamedTuple):
    """Directed pairs within the cutoff of one structure or of several, atoms numbered through."""

    i: np.ndarray  # (E,), ascending
    j: np.ndarray  # (E,)
    vectors: np.ndarray  # (E, 3) Å, from i to j
    numbers: np.ndarray  # (N,)
    frame: np.ndarray  # (N,) structure of each atom


NO_PAIRS = Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int))


def pairs_of(atoms: Atoms) -> Pairs:
    """All pairs of one structure."""
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    vectors = atoms.positions[j] + S @ atoms.cell.array - atoms.positions[i]
    return Pairs(i, j, vectors, atoms.numbers, np.zeros(len(atoms), int))


def merge_pairs(parts: Iterable[Pairs]) -> Pairs:
    """Those of several structures, one behind the other."""
    shifted, atoms = [NO_PAIRS], 0
    for n, (i, j, vectors, numbers, frame) in enumerate(parts):
        shifted.append(Pairs(i + atoms, j + atoms, vectors, numbers, frame + n))
        atoms += len(numbers)
    return Pairs(*map(np.concatenate, zip(*shifted, strict=True)))
