"""Labelled frames in; splits, statistics and reference energies out. eV, eV/Å, eV/Å^3, ASE's signs."""

import math
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import Frame, is_isolated_atom


class ReferenceEnergies(NamedTuple):
    """E0 of each species, eV, and how they were obtained."""

    values: dict[int, float]
    method: str
    rank: int | None  # of the composition matrix, for a fit
    residual: float | None  # rms, eV/atom, for a fit
    of_atoms: bool = False  # whether they are energies of lone atoms

    def report(self) -> str:
        text = f"E0 from {self.method}: " + ", ".join(f"{chemical_symbols[z]} {e:.4f}" for z, e in self.values.items())
        if self.rank is None:
            return text + " eV"
        text += f" eV; rank {self.rank} of {len(self.values)}, residual {1e3 * self.residual:.1f} meV/atom"
        if self.rank < len(self.values):
            text += "\n  the compositions do not determine every E0: energies of other compositions are not reliable"
        return text


def reference_energies(
    frames: list[Frame],
    species: list[int],
    *,
    table: dict[int, float] | None = None,
    isolated: "list[Frame] | None" = None,
    ridge: float = 1e-8,
) -> ReferenceEnergies:
    """E0 from a table, else from isolated atoms, else by ridge least squares on the total energies.

    isolated: frames read for this purpose only; without them those among the frames are used.
    Raises DataError when the table or `isolated` lacks an element.
    """
    if table is not None:
        missing = [chemical_symbols[z] for z in species if z not in table]
        if missing:
            raise DataError(f"reference energies lack {', '.join(missing)}; give one for every element or none at all")
        return ReferenceEnergies({z: float(table[z]) for z in species}, "a table", None, None, True)
    atoms = [f for f in (*frames, *(isolated or ())) if is_isolated_atom(f) and f.energy is not None]
    lonely = {int(f.atoms.numbers[0]): f.energy for f in atoms}
    missing = [chemical_symbols[z] for z in species if z not in lonely]
    if not missing:
        return ReferenceEnergies({z: lonely[z] for z in species}, "isolated atoms", None, None, True)
    if isolated is not None:
        raise DataError(f"isolated atoms lack an energy of {', '.join(missing)}; add one frame of one atom for each")
    labelled = [f for f in frames if f.energy is not None]
    if not labelled:
        return ReferenceEnergies(dict.fromkeys(species, 0.0), "zero: no frame has an energy", None, None)
    sizes = np.array([len(f.atoms) for f in labelled], dtype=float)
    counts = np.array([[np.sum(f.atoms.numbers == z) for z in species] for f in labelled]) / sizes[:, None]
    energies = np.array([f.energy for f in labelled]) / sizes
    # shrink towards one common value: the least surprising choice where the data say nothing
    centre = energies.mean()
    gram = counts.T @ counts
    shift = np.linalg.solve(gram + ridge * np.trace(gram) * np.eye(len(species)), counts.T @ (energies - centre))
    residual = counts @ (shift + centre) - energies
    values = {z: float(centre + s) for z, s in zip(species, shift, strict=True)}
    return ReferenceEnergies(
        values, "least squares", int(np.linalg.matrix_rank(counts, tol=1e-6)), math.sqrt(np.mean(residual**2))
    )


def energy_scale(frames: list[Frame], references: dict[int, float]) -> float:
    """Root mean square force component, eV/Å, the natural scale of atomic energies; from energies if need be."""
    squares = [np.mean(f.forces**2) for f in frames if f.forces is not None and len(f.atoms) > 1]
    if squares and np.mean(squares) > 0:
        return float(np.sqrt(np.mean(squares)))
    per_atom = [
        (f.energy - sum(references[z] for z in f.atoms.numbers.tolist())) / len(f.atoms)
        for f in frames
        if f.energy is not None
    ]
    return float(np.std(per_atom)) or 1.0 if per_atom else 1.0
