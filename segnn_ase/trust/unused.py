"""What a structure says besides its atoms and its cell, and a potential of those alone does not know."""

from collections.abc import Collection

import numpy as np
from ase import Atoms

NOTHING = {  # names in `atoms.info`, in any case, and the value that says nothing
    **dict.fromkeys(("charge", "total_charge", "net_charge", "system_charge", "tot_charge"), 0),
    **dict.fromkeys(("spin", "total_spin", "net_spin", "tot_magnetization", "total_magnetization", "magmom"), 0),
    **dict.fromkeys(("multiplicity", "spin_multiplicity", "mult"), 1),  # and "spin" of 1, as ours
    **dict.fromkeys(("field", "electric_field", "external_field", "efield", "e_field", "magnetic_field"), 0),
}
ARRAYS = {  # of atoms, those of ASE and those that others use
    "initial_charges": "charges",
    "initial_magmoms": "magnetic moments",
    **dict.fromkeys(("charges", "atomic_charges", "partial_charges", "spins", "magmoms"), ""),
}


def unused_input(atoms: Atoms, used: Collection[str] = ()) -> list[str]:
    """Charges, moments, total charge, spin and fields of a structure that are not nothing, in words."""
    told = [name for name in ARRAYS if name in atoms.arrays and name not in used]
    found = [ARRAYS[name] or name for name in told if np.any(atoms.arrays[name])]
    for name, value in atoms.info.items():
        if name in used:
            continue
        neutral = NOTHING.get(name.lower()) if isinstance(name, str) else None
        singlet = name == "spin" and _is(value, 1)
        if neutral is not None and value is not None and not (_is(value, neutral) or singlet):
            found.append(f"{name} = {value}")
    return found


def _is(value: object, neutral: int) -> bool:
    try:
        return bool(np.all(np.asarray(value, dtype=float) == neutral))
    except (TypeError, ValueError):  # a word: it says something
        return False
