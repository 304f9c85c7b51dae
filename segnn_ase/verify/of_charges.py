"""What is to be expected of latent charges."""

import numpy as np
import torch
from ase.neighborlist import neighbor_list

from segnn_ase.model.coulomb import coulomb_energies
from segnn_ase.structure.neighbors import Neighbors
from segnn_ase.verify.states import Subject


def attraction(s: Subject, shift: np.ndarray) -> float:
    """Coulomb energy, eV, between the charges of a molecule or slab and of its copy; mean of the members."""
    cell = torch.as_tensor(s.atoms.cell.array[s.atoms.pbc]) if s.atoms.pbc.any() else None
    pairs = Neighbors(*neighbor_list("ijS", s.atoms, s.parts.cutoff))
    predictions, found = s.parts.predict(s.atoms, pairs), []
    for potential, p in zip(s.parts.potentials, predictions, strict=True):
        q, x = p.charges.cpu(), torch.as_tensor(s.atoms.positions)
        alone, both = (torch.cat([q] * n) for n in (1, 2))
        there = torch.cat([x, x + torch.as_tensor(shift)])
        width = potential.config.smearing
        two = coulomb_energies(both, there, cell, width).sum() - 2 * coulomb_energies(alone, x, cell, width).sum()
        found.append(float(two))
    return float(np.mean(found))
