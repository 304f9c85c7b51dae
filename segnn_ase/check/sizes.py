"""Units judged by size: lengths of bonds, which a factor common to all positions changes."""

import numpy as np
from ase.data import covalent_radii
from ase.units import Bohr, nm

from segnn_ase.check.findings import Finding, Sets
from segnn_ase.check.pairs import CUTOFF

NOBLE = (2, 10, 18, 36, 54, 86)  # their radii are of bonds that they do not form
BONDED = (0.5, 1.35)  # shortest distance over the sum of the covalent radii, of half of the frames
UNITS_OF_LENGTH = {"Bohr": Bohr, "nm": nm, "pm": 0.01}  # Å


def find_unit_of_length(sets: Sets) -> list[Finding]:
    """Bonds of half of the frames are far longer or shorter than any: positions are in another unit than Å."""
    known = [
        min(around.shortest, CUTOFF / (2 * covalent_radii[frame.atoms.numbers].max()))  # as far as was looked
        for frame, around in zip(sets.all, sets.around, strict=True)
        if len(frame.atoms) > 1 and not np.isin(frame.atoms.numbers, NOBLE).any()
    ]
    if len(known) < 3:
        return []
    middle = float(np.median(known))
    if BONDED[0] <= middle <= BONDED[1]:
        return []
    limit = "at least" if middle > 1 else "at most"
    text = f"the shortest distances of half of the frames are {limit} {middle:.2g} times the sum of the covalent radii"
    likely = [name for name, size in UNITS_OF_LENGTH.items() if 0.6 < middle * size < BONDED[1]]
    text += f": positions in {likely[0]}, not in Å?" if likely else ""
    advice = f"State distance_unit={likely[0] if likely else 'Bohr'} in the file, or convert positions and cell to Å"
    return [Finding("unit of length", "warning", text, (), advice)]


OF_SIZES = (find_unit_of_length,)
