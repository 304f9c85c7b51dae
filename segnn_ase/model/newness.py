"""How new the surroundings of atoms are: their fingerprints (`fingerprints.py`) against landmarks of the training.

Newness is the distance to the nearest landmark in units of its width, which says how far the surroundings in other
frames are from it: small in a crystal, large in a melt (a local outlier factor, Breunig, Kriegel, Ng, Sander, SIGMOD
2000). The same is done for the mean fingerprint of each element in a structure, which tells crystals apart whose atoms
look like those of a melt. `trust.novelty` measures the landmarks; `compiled.newness` is the fast way.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.model.fingerprints import Fingerprints
from segnn_ase.structure.graph import Graph


class Landmarks(NamedTuple):
    """Of each element, padded by repetition."""

    points: Tensor  # (S, M, COMPONENTS)
    widths: Tensor  # (S, M)


class Novelty(NamedTuple):
    """What the surroundings were in training, and how new they may be."""

    fingerprints: Fingerprints
    atoms: Landmarks
    structures: Landmarks  # mean fingerprints
    fewest: Tensor  # (S,) atoms of an element in a structure that has it: means of fewer scatter more
    limits: tuple[float, float, float]  # of the newness of any atom, of its mean, of the structure


class Newness(NamedTuple):
    """Of one structure."""

    atoms: np.ndarray  # (N,)
    structure: np.ndarray  # (S,), zero for elements that are not there

    def used(self, of: Novelty) -> np.ndarray:
        """How much of each limit is used, (3,)."""
        return np.array([self.atoms.max(), self.atoms.mean(), self.structure.max()]) / np.array(of.limits)


def newness(of: Novelty, graph: Graph, kind: Tensor, cutoff: float) -> Newness:
    """Of one structure, in plain PyTorch; kind (N,): its elements."""
    return newness_of(of, of.fingerprints.of(graph, kind, cutoff), kind)


def newness_of(of: Novelty, y: Tensor, kind: Tensor) -> Newness:
    """From the fingerprints y (N, COMPONENTS)."""
    atoms, structure = y.new_zeros(len(kind)), y.new_zeros(len(of.fewest))
    for k in kind.unique().tolist():
        own = kind == k
        atoms[own] = _nearest(of.atoms, k, y[own])
        scatter = max(1.0, float(of.fewest[k]) / int(own.sum())) ** 0.5
        structure[k] = _nearest(of.structures, k, y[own].mean(0, keepdim=True))[0] / scatter
    return Newness(atoms.cpu().numpy(), structure.cpu().numpy())


def _nearest(of: Landmarks, k: int, y: Tensor) -> Tensor:
    return (torch.cdist(y, of.points[k].to(y)) / of.widths[k].to(y)).amin(1)
