"""Labelled frames: found in files, checked, split into training and validation. eV, eV/Å, eV/Å^3, ASE's signs."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.io.formats import string2index
from ase.stress import voigt_6_to_full_3x3_stress

from segnn_ase.base.errors import DataError, expect
from segnn_ase.base.files import existing_file, home_expanded, is_file
from segnn_ase.base.settings import Settings
from segnn_ase.data.counts import refuse_impossible_counts

# names under which labels are found: those that say what they are go before a calculator's results, others after
REFERENCE_PREFIXES = ("REF_", "ref_", "dft_", "DFT_")
ENERGY_KEYS = ("energy", "Energy", "free_energy")
FORCES_KEYS = ("forces", "Forces", "force")
STRESS_KEYS = ("stress",)
VIRIAL_KEYS = ("virial", "virials")
LARGEST = {"energy": 1e12, "forces": 1e8, "stress": 1e8, "virial": 1e12}  # eV, Å; none of matter is larger


class LabelKeys(Settings):
    """Names of the labels in `atoms.info` and (forces) `atoms.arrays`; None searches the usual ones."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None


class Frame(NamedTuple):
    """One structure with whatever labels it has."""

    atoms: Atoms  # without calculator, info or labels
    energy: float | None  # eV
    forces: np.ndarray | None  # (N, 3) eV/Å
    stress: np.ndarray | None  # (3, 3) eV/Å^3
    source: str  # file and index, for messages
    origins: tuple[str | None, str | None, str | None]  # where each label was found


def read_frames(paths: "str | Path | list", keys: LabelKeys | None = None) -> list[Frame]:
    """Read every frame of one or more files that ASE reads, databases included, and find the labels.

    A path may carry ASE's index, "run.xyz@:100". Raises FileNotFoundError, and DataError for unreadable
    files, labels of the wrong shape, NaN labels and keys given by the user that no frame has.
    """
    keys = LabelKeys() if keys is None else keys
    expect(isinstance(keys, LabelKeys), "keys", keys, "LabelKeys")
    images = [image for path in as_paths(paths) for image in read_images(path)]
    frames = [frame_from_atoms(atoms, keys, source=source) for source, atoms in images]
    for position, name in enumerate(("energy", "forces", "stress")):
        wanted = getattr(keys, name)
        if wanted and not any(f.origins[position] for f in frames):
            raise DataError(f"key for {name} is {wanted!r}, but no frame has it; frames have {_names(images)}")
    return frames


def as_paths(paths: "str | Path | Sequence") -> list[str]:
    """One path or several as a list. Raises ConfigError for what is none."""
    many = list(paths) if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]
    expect(all(isinstance(path, str | os.PathLike) for path in many), "paths", paths, "a path or several")
    return [str(path) for path in many]


def read_images(path: str) -> list[tuple[str, Atoms]]:
    """Every frame of a file, as ASE gives it, after its source; raises as `read_frames` does."""
    name, index = split_index(path)
    try:
        if Path(name).suffix in (".db", ".json"):
            images = _read_database(name, index)
        else:
            refuse_impossible_counts(name)
            images = ase.io.read(name, index, do_not_split_by_at_sign=True)
    except Exception as error:  # ASE raises anything from StopIteration to KeyError on a bad file
        raise DataError(f"data file {name!r} cannot be read by ASE: {type(error).__name__}: {error}") from error
    images = images if isinstance(images, list) else [images]
    if not images:
        raise DataError(f"data file {name!r} has no frames")
    return [(f"{path}, frame {n}", atoms) for n, atoms in enumerate(images)]


def split_index(path: str) -> tuple[str, str]:
    """File and ASE's index; an @ in a folder's name or in that of a file that exists is no index."""
    name, _, index = path.rpartition("@")
    if "@" not in Path(path).name or is_file(home_expanded(path, "data file")):
        name, index = path, ":"
    return str(existing_file(name, "data file")), index


def _read_database(name: str, index: str) -> "list[Atoms] | Atoms":
    """Rows of an ASE database with their key-value pairs and data, where labels may be: `ase.io.read` drops them."""
    try:
        query, part = None, string2index(index)
    except ValueError:
        query, part = index, slice(None)
    images = []
    with ase.db.connect(name, serial=True) as database:
        for row in database.select(query):
            images.append(row.toatoms())
            images[-1].info.update({**row.data, **row.key_value_pairs})
    return images[part]


def frame_from_atoms(atoms: Atoms, keys: LabelKeys | None = None, *, source: str = "frame") -> Frame:
    """Take the labels off an `Atoms` object: the keys given, else its calculator's results, else the usual keys."""
    keys = keys or LabelKeys()
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    if not len(atoms) or not (atoms.numbers > 0).all():
        what = f"atom {int(np.argmin(atoms.numbers))} has no element" if len(atoms) else "it has no atoms"
        raise DataError(f"{source} is no structure: {what}")
    if atoms.numbers.max() >= len(chemical_symbols):
        atom = int(atoms.numbers.argmax())
        raise DataError(f"{source} is no structure: atom {atom} has the atomic number {atoms.numbers[atom]}")
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    energy, energy_from = _find(atoms.info, results, "energy", keys.energy, ENERGY_KEYS)
    forces, forces_from = _find({**atoms.info, **atoms.arrays}, results, "forces", keys.forces, FORCES_KEYS)
    stress, stress_from = _stress_or_virial(atoms, results, keys.stress, source) if atoms.pbc.all() else (None, None)
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    return Frame(
        atoms=bare,
        energy=_checked("energy", energy, (), source, energy_from),
        forces=_checked("forces", forces, (len(atoms), 3), source, forces_from),
        stress=stress,
        source=source,
        origins=(energy_from, forces_from, stress_from),
    )


def _stress_or_virial(
    atoms: Atoms, results: dict, key: str | None, source: str
) -> tuple[np.ndarray | None, str | None]:
    """The stress, or minus the virial over the volume, and where it was found."""
    stress, origin = _find(atoms.info, results, "stress", key, STRESS_KEYS)
    if stress is not None or key is not None:
        return _checked("stress", stress, (3, 3), source, origin), origin
    virial, origin = _find(atoms.info, {}, "virial", None, VIRIAL_KEYS)
    if virial is None:
        return None, None
    if atoms.cell.rank < 3:
        raise DataError(f"virial of {source} (from {origin}) needs a volume, but cell is {atoms.cell.tolist()}")
    return -_checked("virial", virial, (3, 3), source, origin) / atoms.cell.volume, origin


def _find(store: dict, results: dict, name: str, key: str | None, usual: tuple[str, ...]):
    if key is not None:
        found = store.get(key, results.get(key))
        return found, key if found is not None else None
    for candidate in (prefix + name for prefix in REFERENCE_PREFIXES):
        if store.get(candidate) is not None:
            return store[candidate], candidate
    if results.get(name) is not None:
        return results[name], f"calculator {name}"
    for candidate in usual:
        if store.get(candidate) is not None:
            return store[candidate], candidate
    if name == "energy" and results.get("free_energy") is not None:
        return results["free_energy"], "calculator free_energy"
    return None, None


def _checked(name: str, value, shape: tuple[int, ...], source: str, origin: str | None):
    if value is None:
        return None
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise DataError(f"{name} of {source} (from {origin}) is {value!r}; expected numbers") from None
    if shape == (3, 3) and array.shape == (6,):
        array = voigt_6_to_full_3x3_stress(array)
    if shape in ((), (3, 3)) and array.size == math.prod(shape):
        array = array.reshape(shape)
    if array.shape != shape:
        raise DataError(f"{name} of {source} (from {origin}) has shape {array.shape}; expected {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name} of {source} (from {origin}) has NaN or infinite values: drop or repair that frame")
    if array.size and np.abs(array).max() > LARGEST[name]:
        where = tuple(map(int, np.unravel_index(np.abs(array).argmax(), shape)))
        place = f" of atom {where[0]}" if name == "forces" else ""
        raise DataError(
            f"{name} of {source} (from {origin}) is {array[where]:.3g}{place}; expected up to {LARGEST[name]:g} "
            "in eV and Å: drop or repair that frame"
        )
    return float(array) if shape == () else array


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
        found = ", ".join(sorted({f.origins[position] for f in labelled}))
        lines.append(
            f"{name:8s} {len(labelled):5d}/{len(frames):<6d}  {np.sqrt(np.mean(values**2)):12.5g} "
            f"{values.min():12.5g} {values.max():12.5g}  {unit:9s}  {found}"
        )
    elements = Counter(chemical_symbols[z] for f in frames for z in f.atoms.numbers)
    sizes = [len(f.atoms) for f in frames]
    lines.append(f"atoms per frame {min(sizes)} to {max(sizes)}; elements {dict(sorted(elements.items()))}")
    return "\n".join(lines)


def check_labels(frames: list[Frame]) -> None:
    """Raise DataError when there is nothing to learn from: no frames, no labels, or labels that are all zero."""
    if not frames:
        raise DataError("no frames to train on")
    if all(f.energy is None and f.forces is None for f in frames):
        raise DataError(
            "no frame has an energy or forces. Looked in the calculator's results, in atoms.info for "
            f"{', '.join(ENERGY_KEYS)} and in atoms.arrays for {', '.join(FORCES_KEYS)}, also as REF_energy or "
            "dft_forces; name yours with energy_key and forces_key (--energy-key, --forces-key)"
        )
    many = [f for f in frames if len(f.atoms) > 1]
    for name in ("energy", "forces"):
        labelled = [getattr(f, name) for f in many if getattr(f, name) is not None]
        if labelled and not any(np.any(x) for x in labelled):
            raise DataError(f"{name} is zero in every frame ({len(labelled)} frames): the labels were lost on the way")


def check_species(frames: list[Frame], species: list[int], name: str) -> None:
    """Raise DataError when frames hold an element that the potential was not trained for."""
    for frame in frames:
        extra = set(frame.atoms.numbers.tolist()) - set(species)
        if extra:
            symbols = ", ".join(chemical_symbols[z] for z in sorted(extra))
            known = ", ".join(chemical_symbols[z] for z in species)
            raise DataError(
                f"{name} set has {symbols} ({frame.source}); the potential knows {known} from training. Train one on "
                "frames of all these elements: fine-tuning adds none"
            )


def species_of(frames: list[Frame]) -> list[int]:
    return sorted({int(z) for f in frames for z in f.atoms.numbers})


def split_frames(
    frames: list[Frame], fraction: float, seed: int, families: Sequence[int] | None = None
) -> tuple[list[Frame], list[Frame]]:
    """Draw a validation set at random from frames with labels; isolated atoms stay in training.

    families: a number for each frame; those with the same stay together, as long as others can be drawn. Returns
    training and validation frames.
    """
    labelled = [n for n, f in enumerate(frames) if f.energy is not None or f.forces is not None]
    candidates = [n for n in labelled if not is_isolated_atom(frames[n])]
    count = round(fraction * len(candidates))
    if fraction > 0 and len(candidates) > 1:
        count = min(max(count, 1), len(candidates) - 1)
    groups: dict[int, list[int]] = {}
    for n in candidates:
        groups.setdefault(n if families is None else families[n], []).append(n)
    chosen, members = [], list(groups.values())
    for k in np.random.default_rng(seed).permutation(len(members)):
        chosen += members[k] if len(chosen) + len(members[k]) <= count else []
    if not chosen and count:
        chosen = min(members, key=len)[:count]
    drawn = set(chosen)
    return [f for n, f in enumerate(frames) if n not in drawn], [frames[n] for n in sorted(drawn)]


def is_isolated_atom(frame: Frame) -> bool:
    """One atom, not periodic or alone in a box of at least 10 Å."""
    return len(frame.atoms) == 1 and (not frame.atoms.pbc.any() or min(frame.atoms.cell.lengths()) >= 10.0)
