"""What a uniform field does to the net charge of a structure as a whole.

E = -Q F . r with r the mean of the atoms' positions, and -dE/dF = Q r its dipole about the origin of the coordinates.
This is no part of a network, which is the same wherever a structure stands: labels are learned without it, and
`SEGNNCalculator` adds it. What a charge that sits elsewhere has besides is a dipole, which the network learns.
"""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.structure.cue_settings import Cue

OF_ORIGIN = ("dipole", "born_effective_charges")  # which depend on an origin, where there is a net charge
NEUTRAL = 1e-6  # e, of sums of charges
DERIVATIVES = {"charge": "d_energy_d_charge", "initial_charges": "electronegativities"}  # by the cues of charges


def net_charge(atoms: Atoms, cues: Sequence[Cue]) -> float:
    """By atoms.info, or else by what a potential is told instead: the default of its cue `charge`, or the sum of
    `initial_charges`. Raises StructureError for what is no finite number."""
    told, cue = atoms.info.get("charge"), charged_by(cues)
    if told is None and cue is not None:
        usual = 0.0 if cue.default == "error" else cue.default
        told = usual if cue.name == "charge" else np.sum(atoms.arrays.get(cue.name, np.full(len(atoms), usual)))
    try:
        charge = float(np.asarray(0.0 if told is None else told, dtype=float).item())
    except (TypeError, ValueError):
        charge = np.nan
    if not np.isfinite(charge):
        raise StructureError(f"atoms.info['charge'] is {told!r}; expected an integer")
    return charge


def is_charged(atoms: Atoms, cues: Sequence[Cue]) -> bool:
    """Whether the net charge is more than rounding."""
    return abs(net_charge(atoms, cues)) > NEUTRAL


def charged_by(cues: Sequence[Cue]) -> Cue | None:
    """The cue that says what the net charge is, where atoms.info does not."""
    known = {cue.name: cue for cue in cues}
    return known.get("charge") or known.get("initial_charges")


def pull_on_charge(
    atoms: Atoms, cues: Sequence[Cue], field: Tensor | np.ndarray | None
) -> dict[str, float | np.ndarray]:
    """What a field (3,) or (1, 3) V/Å adds to the results of a molecule by its net charge, by their names: energies,
    forces, a dipole and Born charges, of all atoms alike, and to the derivative by the cue that says the charge.
    Nothing where it is periodic."""
    if field is None or atoms.pbc.any():
        return {}
    charge, cue, along = net_charge(atoms, cues), charged_by(cues), np.asarray(field, dtype=float).reshape(3)
    found: dict[str, float | np.ndarray] = {}
    if cue is not None and (cue.name == "charge" or atoms.info.get("charge") is None):
        found[DERIVATIVES[cue.name]] = -float(atoms.positions.mean(axis=0) @ along)
    if not charge:
        return found
    share = charge / len(atoms)
    energies = -share * (atoms.positions @ along)
    return found | {
        "energy": float(energies.sum()),
        "free_energy": float(energies.sum()),
        "energies": energies,
        "forces": np.tile(share * along, (len(atoms), 1)),
        "dipole": share * atoms.positions.sum(axis=0),
        "born_effective_charges": np.tile(share * np.eye(3), (len(atoms), 1, 1)),
    }


def with_net_charge(results: dict, atoms: Atoms, cues: Sequence[Cue], field: Tensor | None) -> dict:
    """The results of a network with what the net charge adds; without what is not defined where it is periodic."""
    if field is None:
        return results
    added = pull_on_charge(atoms, cues, field.cpu())
    if atoms.pbc.any() and is_charged(atoms, cues):
        return {name: value for name, value in results.items() if name not in OF_ORIGIN}
    return {name: value + added[name] if name in added else value for name, value in results.items()}
