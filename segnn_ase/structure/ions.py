"""What a uniform field does to the net charge of a structure as a whole.

E = -Q F . r with r the mean of the atoms' positions, and -dE/dF = Q r its dipole about the origin of the coordinates.
This is no part of a network, which is the same wherever a structure stands: labels are learned without it, and
`SEGNNCalculator` adds it. What a charge that sits elsewhere has besides is a dipole, which the network learns.
"""

from collections.abc import Collection

import numpy as np
from ase import Atoms
from torch import Tensor

from segnn_ase.base.errors import StructureError

OF_ORIGIN = ("dipole", "born_effective_charges")  # which depend on an origin, where there is a net charge


def net_charge(atoms: Atoms, names: Collection[str]) -> float:
    """By atoms.info, else the sum of what the atoms are said to have, where that is among the names of what a potential
    is told. Raises StructureError for what is no number."""
    told = atoms.info.get("charge", 0)
    if told is None or ("charge" not in atoms.info and "initial_charges" in names):
        told = round(float(np.sum(atoms.arrays.get("initial_charges", 0.0))), 6)
    try:
        return float(np.asarray(told, dtype=float).item())
    except (TypeError, ValueError):
        raise StructureError(f"atoms.info['charge'] is {told!r}; expected an integer") from None


def pull_on_charge(
    atoms: Atoms, names: Collection[str], field: Tensor | np.ndarray | None
) -> dict[str, float | np.ndarray]:
    """What the net charge of a molecule adds to results in a field (3,) or (1, 3) V/Å, by ASE's names: energies,
    forces, a dipole and Born charges, of all atoms alike. Nothing without a charge or a field, or where it is
    periodic.

    names: of what a potential is told.
    """
    charge = 0.0 if field is None or atoms.pbc.any() else net_charge(atoms, names)
    if not charge or field is None:
        return {}
    share, along = charge / len(atoms), np.asarray(field, dtype=float).reshape(3)
    energies = -share * (atoms.positions @ along)
    return {
        "energy": float(energies.sum()),
        "free_energy": float(energies.sum()),
        "energies": energies,
        "forces": np.tile(share * along, (len(atoms), 1)),
        "dipole": share * atoms.positions.sum(axis=0),
        "born_effective_charges": np.tile(share * np.eye(3), (len(atoms), 1, 1)),
    }


def with_net_charge(results: dict, atoms: Atoms, names: Collection[str], field: Tensor | None) -> dict:
    """The results of a network with what the net charge adds; without what is not defined where it is periodic."""
    if field is None:
        return results
    added = pull_on_charge(atoms, names, field.cpu())
    if atoms.pbc.any() and net_charge(atoms, names):
        return {name: value for name, value in results.items() if name not in OF_ORIGIN}
    return {name: value + added[name] if name in added else value for name, value in results.items()}
