"""Constraints of ASE that hold something; others, as `FixAtoms([])`, are as none."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from ase import Atoms
from ase.constraints import FixCartesian, FixInternals, FixScaled

PLACES = ("index", "pairs", "triples")  # attributes that say which atoms are held


def acts(constraint) -> bool:
    """Whether it holds any atom in any direction; of a kind that is not known here it does."""
    if any(np.size(getattr(constraint, name)) == 0 for name in PLACES if hasattr(constraint, name)):
        return False
    if isinstance(constraint, FixCartesian | FixScaled):
        return bool(constraint.mask.any())
    return not (isinstance(constraint, FixInternals) and constraint.n == 0)


@contextmanager
def without_idle_constraints(atoms: Atoms) -> Iterator[None]:
    """For a while, the structure has those constraints only that hold something."""
    before = atoms.constraints
    atoms.constraints = [constraint for constraint in before if acts(constraint)]
    try:
        yield
    finally:
        atoms.constraints = before
