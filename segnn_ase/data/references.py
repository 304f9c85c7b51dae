"""Reference energies E0 of the elements, eV, and the scale of what a network has to add to them."""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import ALONE, Frame, is_isolated_atom, nearest_image, species_of, told_inputs

SAME = 1e-6  # eV, between calculations of one isolated atom
ALIKE = 1e-8  # compositions that differ by less, relatively, are the same
LEAST = 1e-4  # eV/atom, spread of energies that is no rounding
AS_TYPED = 1e-3  # eV, between such a calculation and a table


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
    names: Collection[str] = (),
) -> ReferenceEnergies:
    """E0 from a table, else from isolated atoms, else by least squares on the total energies.

    isolated: frames read for this purpose only; those among the frames are used, too. names: of what the potential is
    told, in which isolated atoms may differ.
    Raises DataError when the table or `isolated` lacks an element, or where two of them contradict one another.
    """
    lonely = energies_of_isolated_atoms([*frames, *(isolated or ())], table, names)
    known, method = (lonely, "isolated atoms") if table is None else (table, "a table")
    missing = ", ".join(chemical_symbols[z] for z in species if z not in known)
    if not missing:
        return ReferenceEnergies({z: float(known[z]) for z in species}, method, None, None, True)
    if table is not None:
        raise DataError(f"reference energies lack {missing}; give one for every element or none at all")
    if isolated is not None:
        raise DataError(f"isolated atoms lack an energy of {missing}; add one frame of one atom for each")
    known = [f for f in frames if f.energy is not None and not is_lone_ion(f, names)]
    return fitted_energies([f for f in known if not is_isolated_atom(f)] or known, species)


def without_some_atoms(frames: list[Frame], names: Collection[str]) -> list[Frame]:
    """Without isolated atoms, but ions, where there are none of some element: E0 are fitted then, and these could never
    be learned. All where there is nothing else."""
    if energies_of_isolated_atoms(frames, names=names).keys() >= {*species_of(frames)}:
        return frames
    kept = [f for f in frames if f.energy is None or not is_isolated_atom(f) or is_lone_ion(f, names)]
    return kept if any(f.energy is not None for f in kept) else frames


def energies_of_isolated_atoms(
    frames: list[Frame], table: dict[int, float] | None = None, names: Collection[str] | None = ()
) -> dict[int, float]:
    """Energies, eV, of a table and of isolated atoms. Raises DataError where two of one element differ.

    The potential gives an isolated atom of which it is told nothing exactly E0, so that frames with another energy
    could never be learned. names: of what it is told, None for all that is said. Of atoms that differ in that, E0 is
    the energy of the one of which nothing is told, or else the lowest; the others are learned, as are ions always.
    """
    found = {(z, ()): (energy, "reference_energies", AS_TYPED) for z, energy in (table or {}).items()}
    for frame in frames:
        if is_isolated_atom(frame) and frame.energy is not None:
            which = int(frame.atoms.numbers[0]), told_of_atom(frame, names)
            energy, source, tolerance = found.setdefault(which, (frame.energy, frame.source, SAME))
            if abs(frame.energy - energy) > tolerance:
                raise DataError(
                    f"an isolated atom of {frame.atoms.symbols} has different energies: {energy} eV ({source}) and "
                    f"{frame.energy} eV ({frame.source}); keep the one that is to be E0{_or_crystals(frame)}"
                )
    lowest: dict[int, float] = {}
    _refuse_ions(frames, table, names)
    neutral = {key: one for key, one in found.items() if not _is_charged(key[1])}
    for (z, _), (energy, *_) in sorted(neutral.items(), key=lambda one: (bool(one[0][1]), one[1][0])):
        lowest.setdefault(z, energy)
    return lowest


def _refuse_ions(frames: list[Frame], table: dict[int, float] | None, names: Collection[str] | None) -> None:
    """Raise DataError where the only isolated atoms of an element have a charge that the potential is not told: their
    energy is no E0."""
    lone = [f for f in frames if is_isolated_atom(f) and f.energy is not None]
    ions = [f for f in lone if is_lone_ion(f, None) and not is_lone_ion(f, names)]
    neutral = {int(f.atoms.numbers[0]) for f in lone if not is_lone_ion(f, None)} | {*(table or {})}
    for frame in ions:
        if int(frame.atoms.numbers[0]) not in neutral:
            raise DataError(
                f"{frame.source}: the isolated atom of {frame.atoms.symbols} has a charge, which the potential is not "
                "told (--cues charge): its energy is no E0; leave it out, or add a neutral one"
            )


def _or_crystals(frame: Frame) -> str:
    """What else may be meant, where images are as near as in crystals of the elements."""
    apart = nearest_image(frame.atoms)
    return f", or raise the cutoff above {apart:.1f} Å, if these are crystals" if apart <= ALONE else ""


def is_lone_ion(frame: Frame, names: Collection[str] | None) -> bool:
    """Whether a potential is told a charge of an isolated atom, whose energy is not E0 then."""
    return is_isolated_atom(frame) and _is_charged(told_of_atom(frame, names))


def _is_charged(told: tuple) -> bool:
    return any(name in ("charge", "initial_charges") for name, *_ in told)


def told_of_atom(frame: Frame, names: Collection[str] | None) -> tuple:
    """What is said of an atom under some names: nothing where that is zero, or a multiplicity of one."""
    said = {name: value for (_, name), value in told_inputs(frame).items() if names is None or name in names}
    found = []
    for name in sorted(said):
        try:
            numbers = np.ravel(np.asarray(said[name], dtype=float)) - (name == "spin")
        except (TypeError, ValueError):  # refused where a potential is told it
            found.append((name, str(said[name])))
            continue
        found += [(name, *numbers.tolist())] if numbers.any() else []
    return tuple(found)


def fitted_energies(frames: list[Frame], species: list[int]) -> ReferenceEnergies:
    """E0 by least squares on frames with energies, shrunk towards one value where their compositions say nothing."""
    if not frames:
        return ReferenceEnergies(dict.fromkeys(species, 0.0), "zero: no frame has an energy", None, None)
    sizes = np.array([len(f.atoms) for f in frames], dtype=float)
    counts = np.array([[np.sum(f.atoms.numbers == z) for z in species] for f in frames]) / sizes[:, None]
    energies = np.array([f.energy for f in frames]) / sizes
    centre = energies.mean()  # the least surprising of all values
    shift = np.linalg.lstsq(counts, energies - centre, rcond=ALIKE)[0]
    residual = math.sqrt(np.mean((counts @ (shift + centre) - energies) ** 2))
    values = {z: float(centre + s) for z, s in zip(species, shift, strict=True)}
    return ReferenceEnergies(values, "least squares", int(np.linalg.matrix_rank(counts, tol=1e-6)), residual)


def energy_scale(frames: list[Frame], references: dict[int, float]) -> float:
    """Root mean square force component, eV/Å, the natural scale of atomic energies; from energies if need be."""
    squares = [np.nanmean(f.forces**2) for f in frames if f.forces is not None and len(f.atoms) > 1]
    if squares and np.mean(squares) > 0:
        return float(np.sqrt(np.mean(squares)))
    per_atom = [
        (f.energy - sum(references[z] for z in f.atoms.numbers.tolist())) / len(f.atoms)
        for f in frames
        if f.energy is not None
    ]
    spread = float(np.std(per_atom)) if per_atom else 0.0
    return spread if spread > LEAST else 1.0
