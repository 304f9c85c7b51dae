"""Labelled frames: found in files, checked, split into training and validation. eV, eV/Å, eV/Å^3, ASE's signs."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.geometry import minkowski_reduce

from segnn_ase.base.errors import DataError, StructureError, expect
from segnn_ase.base.label_names import PREFIXES
from segnn_ase.data.images import read_images
from segnn_ase.data.labels import Found, LabelKeys, Reading, find_labels
from segnn_ase.data.labels_of_cues import labels_of_cues
from segnn_ase.structure.cue_settings import FIELD, INPUTS, LABELS_OF_CUES, Cue
from segnn_ase.structure.cues import refuse_sums
from segnn_ase.structure.neighbors import check_geometry
from segnn_ase.structure.told import Told, told_in, with_told

SAME_PLACE = 1e-4  # of a cell
ALONE = 6.0  # Å to the next image of an isolated atom; neighbours in crystals of the elements are nearer


class Frame(NamedTuple):
    """One structure with whatever labels it has."""

    atoms: Atoms  # without calculator, info or labels
    energy: float | None  # eV
    forces: np.ndarray | None  # (N, 3) eV/Å, NaN where a constraint has cut them
    stress: np.ndarray | None  # (3, 3) eV/Å^3
    source: str  # file and index, for messages
    origins: tuple[str | None, str | None, str | None]  # where each label was found
    reading: Reading = Reading()
    told: Told | None = None  # what may be an input, or the label of one


def told_inputs(frame: Frame) -> Told:
    """What stands beside a structure and is no label."""
    return {key: value for key, value in (frame.told or {}).items() if key[1] not in LABELS_OF_CUES}


def told_alone(frames: Iterable[Frame], names: Sequence[str]) -> list[Frame]:
    """The frames with their labels and what has these names beside their structures alone; in fields also with what
    decides about the pull on charges."""
    found = []
    for frame in frames:
        in_field = ("info", FIELD) in (frame.told or {})
        kept = {*names, *LABELS_OF_CUES, *((FIELD, "charge", "initial_charges") if in_field else ())}
        told = {key: value for key, value in (frame.told or {}).items() if key[1] in kept}
        found.append(frame._replace(told=told or None))
    return found


class Sourced(Protocol):
    """A structure and where it was read, whatever is known of it."""

    @property
    def atoms(self) -> Atoms: ...
    @property
    def source(self) -> str: ...


def read_frames(paths: "str | Path | list", keys: LabelKeys | None = None) -> list[Frame]:
    """Read every frame of one or more files that ASE reads, databases included, and find the labels.

    A path may carry ASE's index, "run.xyz@:100". Raises FileNotFoundError, and DataError for unreadable
    files, labels of the wrong shape, NaN labels and keys given by the user that no frame has.
    """
    keys = LabelKeys() if keys is None else keys
    expect(isinstance(keys, LabelKeys), "keys", keys, "LabelKeys")
    return frames_from_images([image for path in as_paths(paths) for image in read_images(path)], keys)


def frames_from_images(images: list[tuple[str, Atoms]], keys: LabelKeys) -> list[Frame]:
    """Find the labels of structures, each after its source. Raises DataError as `read_frames` does."""
    frames = [frame_from_atoms(atoms, keys, source=source) for source, atoms in images]
    for name, wanted in keys_not_found(keys, frames, [atoms for _, atoms in images]).items():
        raise DataError(f"key for {name} is {wanted!r}, but no frame has it; frames have {_names(images)}")
    return frames


def keys_not_found(keys: LabelKeys, frames: list[Frame], images: list[Atoms]) -> dict[str, str]:
    """Keys given by the user that no structure has, by label; a stress counts where it has a meaning."""
    results = {name for atoms in images if atoms.calc is not None for name in atoms.calc.results}
    there = results | {name for atoms in images for name in (*atoms.info, *atoms.arrays)}
    lost = () if any(frame.stress is not None for frame in frames) else ("stress", "virial")
    given = ((name, key) for name, key in keys if name != "inputs" and key is not None)
    return {name: key for name, key in given if key not in there or name in lost}


def as_paths(paths: "str | Path | Sequence") -> list[str]:
    """One path or several as a list. Raises ConfigError for what is none."""
    many = list(paths) if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]
    expect(all(isinstance(path, str | os.PathLike) for path in many), "paths", paths, "a path or several")
    return [str(path) for path in many]


def frame_from_atoms(atoms: Atoms, keys: LabelKeys | None = None, *, source: str = "frame") -> Frame:
    """Take the labels off an `Atoms` object, as `find_labels` finds them.

    Raises DataError for what is no structure, and for labels that cannot be used.
    """
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    check_atoms(atoms, source)
    found = find_labels(atoms, keys or LabelKeys(), source)
    placeholder = found.stress is not None and not found.stress.any() and _any_force(found)
    stress, origins = (None, (*found.origins[:2], None)) if placeholder else (found.stress, found.origins)
    of_cues = labels_of_cues(atoms, source)
    told = told_in(atoms, dict.fromkeys((*INPUTS, *(keys.inputs if keys else ())))) | of_cues.values
    reading = found.reading._replace(
        units=found.reading.units + of_cues.units, stated=of_cues.stated, no_stress=placeholder
    )
    labels = found.energy, found.forces, stress
    return Frame(structure_alone(atoms, source), *labels, source, origins, reading, told or None)


def _any_force(found: Found) -> bool:
    return found.forces is not None and bool(np.nan_to_num(found.forces).any())


def check_atoms(atoms: Atoms, source: str) -> None:
    """Raise DataError where there are no atoms, or some without an element."""
    if not len(atoms) or not (atoms.numbers > 0).all():
        what = f"atom {int(np.argmin(atoms.numbers))} has no element" if len(atoms) else "it has no atoms"
        raise DataError(f"{source} is no structure: {what}")
    if atoms.numbers.max() >= len(chemical_symbols):
        atom = int(atoms.numbers.argmax())
        raise DataError(f"{source} is no structure: atom {atom} has the atomic number {atoms.numbers[atom]}")


def structure_alone(atoms: Atoms, source: str) -> Atoms:
    """Elements, positions, cell and pbc, without what stands beside them. Raises DataError for what is no structure."""
    check_atoms(atoms, source)
    lost = [axis for axis, pbc, vector in zip("abc", atoms.pbc, atoms.cell, strict=True) if pbc and not vector.any()]
    if lost:
        raise DataError(
            f"{source}: cell is {atoms.cell.tolist()}, of which {', '.join(lost)} span no volume, but pbc is "
            f'{atoms.pbc.tolist()}: in extended XYZ write Lattice="ax ay az bx by bz cx cy cz", or pbc="F F F"'
        )
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _names(images: list[tuple[str, Atoms]]) -> str:
    found = {name for _, atoms in images for name in (*atoms.info, *atoms.arrays)} - {"numbers", "positions"}
    found |= {f"calculator {name}" for _, atoms in images if atoms.calc is not None for name in atoms.calc.results}
    return ", ".join(sorted(found)) or "no labels at all"


def label_table(frames: list[Frame]) -> str:
    """What was found, for the user to look at before training."""
    lines = [f"{'label':8s} {'frames':>12s}  {'rms':>12s} {'min':>12s} {'max':>12s}  unit       found in"]
    units = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å^3"}
    for position, (name, unit) in enumerate(units.items()):
        labelled = [f for f in frames if getattr(f, name) is not None]
        if not labelled:
            lines.append(f"{name:8s} {0:5d}/{len(frames):<6d}")
            continue
        scale = [len(f.atoms) if name == "energy" else 1.0 for f in labelled]
        values = np.concatenate([np.ravel(getattr(f, name)) / s for f, s in zip(labelled, scale, strict=True)])
        values = values[np.isfinite(values)]
        found = ", ".join(sorted({f.origins[position] for f in labelled}))
        lines.append(
            f"{name:8s} {len(labelled):5d}/{len(frames):<6d}  {np.sqrt(np.mean(values**2)):12.5g} "
            f"{values.min():12.5g} {values.max():12.5g}  {unit:9s}  {found}"
        )
    elements = Counter(chemical_symbols[z] for f in frames for z in f.atoms.numbers)
    sizes = [len(f.atoms) for f in frames]
    lines.append(f"atoms per frame {min(sizes)} to {max(sizes)}; elements {dict(sorted(elements.items()))}")
    return "\n".join([*lines, *rivals_of(frames), *changes_of(frames)])


def rivals_of(frames: list[Frame]) -> list[str]:
    """One line for each place where a label is, too, with other values than those that are taken."""
    differences: dict[tuple[str, str, str], list[float]] = {}
    for frame in frames:
        for rival in frame.reading.rivals:
            taken = frame.origins[("energy", "forces", "stress").index(rival.kind)]
            differences.setdefault((rival.kind, str(taken), rival.name), []).append(rival.difference)
    lines = []
    for (kind, taken, name), values in differences.items():
        size = np.abs(values)[np.isfinite(values)].max(initial=0)
        text = f"{kind}: {taken} is taken; {len(values)} of {len(frames)} frames have {name}, too, "
        if not np.isfinite(values).all():
            text += "which cannot be read in all of them"
        elif kind == "energy":
            text += f"up to {1e3 * size:.3g} meV/atom away (spread {1e3 * np.std(values):.3g} meV/atom)"
        else:
            text += f"up to {size:.3g} {'eV/Å' if kind == 'forces' else 'eV/Å^3'} away"
        if "free_energy" in taken and kind == "energy":
            text += "; forces are the derivative of the free energy"
        lines.append(f"{text}; --{kind}-key takes another")
    return lines


def changes_of(frames: list[Frame]) -> list[str]:
    """One line for each unit that was converted and for forces that are left out."""
    units = Counter(unit for frame in frames for unit in frame.reading.units)
    lines = [f"{kind}: in {unit} as {n} frames say, converted" for (kind, unit), n in units.items()]
    if zeros := sum(frame.reading.no_stress for frame in frames):
        lines.append(f"stress: exactly zero in {zeros} frames whose forces are not: taken for unknown")
    cut = [frame for frame in frames if frame.reading.cut]
    if cut:
        atoms = sum(int(np.isnan(f.forces).any(axis=1).sum()) if f.forces is not None else len(f.atoms) for f in cut)
        reasons = ", ".join(sorted({reason for frame in cut for reason in frame.reading.cut.split(", ")}))
        lines.append(f"forces: {atoms} atoms of {len(cut)} frames are left out, as cut or masked by {reasons}")
    return lines


def check_labels(frames: list[Frame]) -> None:
    """Raise DataError when there is nothing to learn from: no frames, no labels, or labels that are all zero."""
    if not frames:
        raise DataError("no frames to train on")
    if all(f.energy is None and f.forces is None for f in frames):
        alike = sorted({name for frame in frames for _, name in frame.reading.unread})
        raise DataError(
            "no frame has an energy or forces. Looked in the calculator's results, in atoms.info for energy, "
            "total_energy, E or free_energy and in atoms.arrays for forces, force or F, also as REF_energy or "
            f"dft_forces (any of {', '.join(PREFIXES)}); name yours with energy_key and forces_key (--energy-key, "
            f"--forces-key){f': {alike} look like labels' if alike else ''}"
        )
    many = [f for f in frames if len(f.atoms) > 1]
    for name in ("energy", "forces"):
        labelled = [getattr(f, name) for f in many if getattr(f, name) is not None]
        by_symmetry = name == "forces" and differ_in_cells_alone([f.atoms for f in many])
        if labelled and not by_symmetry and not any(np.nan_to_num(x).any() for x in labelled):
            raise DataError(f"{name} is zero in every frame ({len(labelled)} frames): the labels were lost on the way")


def differ_in_cells_alone(structures: list[Atoms]) -> bool:
    """Whether atoms of the same composition are in the same places of their cells, some of them in several, as those of
    crystals on a curve of energies over volumes, whose forces may vanish."""
    first: dict[tuple, np.ndarray] = {}
    several = False
    for atoms in structures:
        places = atoms.cell.scaled_positions(atoms.positions - atoms.positions[0]) if atoms.pbc.all() else None
        if places is None:
            return False
        known = first.setdefault(tuple(atoms.numbers.tolist()), places)
        several |= known is not places
        if np.abs(places - known - np.round(places - known)).max() > SAME_PLACE:
            return False
    return several


def check_geometries(frames: Sequence[Sourced]) -> None:
    """Raise DataError, with the frame, for positions and cells that have no neighbours to search."""
    for frame in frames:
        try:
            check_geometry(frame.atoms.positions, frame.atoms.cell.array, frame.atoms.pbc)
        except StructureError as error:
            raise DataError(f"{frame.source}: {error}") from error


OTHER_ELEMENTS = "Train one on frames of all these elements, or fine-tune one on frames of those that it lacks"


def check_species(
    frames: Sequence[Sourced], species: list[int], name: str, *, model: str = "potential", then: str = OTHER_ELEMENTS
) -> None:
    """Raise DataError when frames hold an element that the potential, or another model, was not trained for."""
    for frame in frames:
        extra = set(frame.atoms.numbers.tolist()) - set(species)
        if extra:
            symbols = ", ".join(chemical_symbols[z] for z in sorted(extra))
            known = ", ".join(chemical_symbols[z] for z in species)
            raise DataError(
                f"{name} set has {symbols} ({frame.source}); the {model} knows {known} from training. {then}"
            )


def species_of(frames: Sequence[Sourced]) -> list[int]:
    return sorted({int(z) for f in frames for z in f.atoms.numbers})


def split_frames(
    frames: list[Frame], fraction: float, seed: int, families: Sequence[int] | None = None
) -> tuple[list[Frame], list[Frame]]:
    """Draw a validation set at random from frames with labels; isolated atoms and the only frames of an element stay
    in training. See `drawn_from`."""
    labelled = [n for n, f in enumerate(frames) if f.energy is not None or f.forces is not None]
    lone = {n for n, f in enumerate(frames) if is_isolated_atom(f)}
    drawn = drawn_from([n for n in labelled if n not in lone], fraction, seed, families)
    drawn = but_only_ones(drawn, frames, lone)
    return [f for n, f in enumerate(frames) if n not in drawn], [frames[n] for n in sorted(drawn)]


def but_only_ones(drawn: set[int], frames: Sequence[Sourced], lone: set[int]) -> set[int]:
    """The numbers of those frames whose elements are all in frames that are neither drawn nor lone atoms."""
    learned = set(species_of([f for n, f in enumerate(frames) if n not in drawn | lone]))
    return {n for n in drawn if learned.issuperset(frames[n].atoms.numbers.tolist())}


def drawn_from(candidates: list[int], fraction: float, seed: int, families: Sequence[int] | None) -> set[int]:
    """A part of some numbers of frames, drawn at random.

    families: a number for each frame; those with the same stay together. Where none is as small as that part, the
    smallest is drawn, and nothing where all are of one.
    """
    count = round(fraction * len(candidates))
    if fraction > 0:
        count = min(max(count, 1), len(candidates) - 1)
    groups: dict[int, list[int]] = {}
    for n in candidates:
        groups.setdefault(n if families is None else families[n], []).append(n)
    chosen, members = [], list(groups.values())
    for k in np.random.default_rng(seed).permutation(len(members)):
        chosen += members[k] if len(chosen) + len(members[k]) <= count else []
    if not chosen and count > 0 and len(members) > 1:
        chosen = min(members, key=len)
    return set(chosen)


def is_isolated_atom(frame: Frame) -> bool:
    """One atom that its file calls so, or without an image within 6 Å or the cutoff (see `with_isolated_atoms`)."""
    return len(frame.atoms) == 1 and (frame.reading.isolated or nearest_image(frame.atoms) > ALONE)


def nearest_image(atoms: Atoms) -> float:
    """Distance of an atom from its own images, Å; infinite where it has none."""
    vectors = minkowski_reduce(atoms.cell.array * atoms.pbc[:, None], atoms.pbc)[0][atoms.pbc]
    return float(np.linalg.norm(vectors, axis=1).min(initial=np.inf))


def with_isolated_atoms(frames: list[Frame], cutoff: float) -> list[Frame]:
    """Frames in which one atom without a neighbour within the cutoff, Å, counts as isolated, whatever its box."""
    lone = [len(f.atoms) == 1 and nearest_image(f.atoms) > cutoff for f in frames]
    return [
        f._replace(reading=f.reading._replace(isolated=True)) if yes else f for f, yes in zip(frames, lone, strict=True)
    ]


def refuse_wires(frames: Iterable[Frame], cues: Sequence[Cue], electrostatics: str) -> None:
    """Raise DataError where charges of a frame cannot be summed up, see `refuse_sums`."""
    for frame in frames:
        try:
            refuse_sums(with_told(frame.atoms, frame.told or {}), cues, electrostatics)
        except StructureError as error:
            raise DataError(f"{frame.source}: {error}") from error
