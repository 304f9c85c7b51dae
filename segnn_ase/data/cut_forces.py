"""Forces that are no derivative of the energy, as a constraint has cut them: unknown (NaN), and why."""

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled

from segnn_ase.base.errors import DataError

LOCAL = (FixAtoms, FixCartesian, FixScaled, FixedLine, FixedPlane)  # they cut the forces of their atoms alone
USUAL_MASKS = {f"{start}{middle}mask" for start in ("force", "forces") for middle in ("", "_")}
UNBALANCED = 1e-3  # net force an atom, of the rms: forces of exactly zero are then cut ones


def without_cut_forces(atoms: Atoms, forces: np.ndarray, key: str | None, where: str) -> tuple[np.ndarray, str]:
    """Forces (N, 3) eV/Å with NaN for components that are masked or cut; why some are, or "".

    key: of the array (N,) or (N, 3) that is true where a force counts; None searches `forces_mask`.
    """
    name, mask = mask_of(atoms, key, where)
    reasons = {
        name: ~mask,
        "constraints": constrained(atoms, forces),
        "zeros": zeroed(forces) & mask,
    }
    cut = np.logical_or.reduce(list(reasons.values()))
    return np.where(cut, np.nan, forces), ", ".join(reason for reason, part in reasons.items() if part.any())


def mask_of(atoms: Atoms, key: str | None, where: str) -> tuple[str, np.ndarray]:
    """Name and values, (N, 3), of the array that says which forces count; all, where there is none."""
    store = {**atoms.info, **atoms.arrays}
    name = key if key is not None else next((n for n in store if str(n).lower() in USUAL_MASKS), None)
    if name is None or store.get(name) is None:
        return "", np.ones((len(atoms), 3), bool)
    mask = np.asarray(store[name])
    mask = mask[:, None] if mask.shape == (len(atoms),) else mask
    if (
        mask.shape not in ((len(atoms), 1), (len(atoms), 3))
        or mask.dtype.kind not in "bif"
        or not np.isin(mask, (0, 1)).all()
    ):
        raise DataError(
            f"forces mask of {where} (from {name}) has shape {np.shape(store[name])}; expected ({len(atoms)},) or "
            f"({len(atoms)}, 3) of true or 1 where a force counts, false or 0 where not"
        )
    return name, np.broadcast_to(mask.astype(bool), (len(atoms), 3))


def constrained(atoms: Atoms, forces: np.ndarray) -> np.ndarray:
    """Components, (N, 3), that a constraint changes, where it has already been applied to these forces."""
    found = np.zeros(forces.shape, bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, LOCAL):
            any_forces = np.random.default_rng(0).normal(size=forces.shape)
            changed, again = any_forces.copy(), forces.copy()
            constraint.adjust_forces(atoms, changed)
            constraint.adjust_forces(atoms, again)
            touched = changed != any_forces
            applied = np.isclose(again, forces, rtol=0, atol=1e-7).all(axis=1, keepdims=True)  # text files round
            found |= touched & applied
    return found


def zeroed(forces: np.ndarray) -> np.ndarray:
    """Rows of exactly zero, (N, 3), among forces that do not sum to zero: they were set to it."""
    zero = ~forces.any(axis=1, keepdims=True)
    net, rms = np.linalg.norm(forces.sum(0)) / len(forces), np.sqrt(np.mean(forces**2))
    return np.broadcast_to(zero & (len(forces) > 1) & (net > UNBALANCED * rms), forces.shape)
