"""Labels of properties in the frames of files: in `info`, in `arrays` and among a calculator's results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.base.label_names import PREFIXES
from segnn_ase.data.frames import structure_alone
from segnn_ase.data.images import read_images
from segnn_ase.properties.targets import POOLINGS, Target, given_irreps, irreps_of, is_of_matrix

PER_ATOM = {"born_effective_charges", "charges", "energies", "forces", "magmoms", "stresses"}  # names that ASE knows
SYMMETRIC_WITHIN = 1e-3  # of the largest entry
ROUNDED = 1e-4  # e an atom: files round charges
MOST_ROUNDED = 0.1  # e
UNDECIDED = 1e-3  # by less, relative, one fit of two is no better
SAME = 1e-5  # of the largest entry, between two places that agree


class Label(NamedTuple):
    """One property of one frame."""

    value: np.ndarray  # (n, *shape), n = 1 for a structure
    per: str
    origin: str
    rival: str = ""  # another place with other numbers


class Labelled(NamedTuple):
    """A structure and what is known of it, by the names of properties."""

    atoms: Atoms
    labels: dict[str, Label]
    source: str


def read_labelled(
    paths: Sequence[str], names: Sequence[str], irreps: Mapping[str, str], *, every: bool = True
) -> list[Labelled]:
    """Every frame of files, with the properties that it has; irreps: those that are given.

    Raises FileNotFoundError, and DataError for what cannot be read and where a property is in no frame; if not
    `every`, where all are.
    """
    found, there = [], set()
    for path in paths:
        for source, atoms in read_images(path):
            labels = {name: label_of(atoms, name, source, irreps.get(name)) for name in names}
            known = {name: label for name, label in labels.items() if label is not None}
            found.append(Labelled(structure_alone(atoms, source), known, source))
            there |= {place.name for place in places_of(atoms)}
    lost = [name for name in names if not any(name in frame.labels for frame in found)]
    if lost if every else len(lost) == len(names):
        others = ", ".join(sorted(there)) or "no properties at all"
        raise DataError(f"no frame of {', '.join(paths)} has the target {', '.join(lost)}; frames have {others}")
    return found


class LabelPlace(NamedTuple):
    """Where a label may be."""

    words: str
    name: str
    per: str  # by the place alone
    value: Any


def places_of(atoms: Atoms) -> list[LabelPlace]:
    results = {} if atoms.calc is None else atoms.calc.results
    found = [LabelPlace(f"calculator {k}", str(k), "structure", v) for k, v in results.items()]
    found += [LabelPlace(f"info {k}", str(k), "structure", v) for k, v in atoms.info.items()]
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    return found + [LabelPlace(f"arrays {k}", str(k), "atom", v) for k, v in arrays.items()]


def label_of(atoms: Atoms, name: str, source: str, irreps: str | None = None) -> Label | None:
    """A property by its name behind a usual prefix such as REF_ or dft_, else of the calculator, else by its name.

    None where there is none, or nothing of it is a number. Nine numbers are a matrix row by row, and six a symmetric
    one in Voigt's order, unless irreps say otherwise. Raises DataError for what can be no label.
    """
    wanted = [*(f"{prefix}_{name}".lower() for prefix in PREFIXES), name.lower()]
    places = [place for place in places_of(atoms) if place.name.lower() in wanted]
    places.sort(key=lambda place: wanted.index(place.name.lower()))  # the calculator's come first among equals
    found = [label for place in places if (label := _label_at(place, atoms, name, source, irreps)) is not None]
    if not found:
        return None
    return found[0]._replace(rival=next((other.origin for other in found[1:] if _differ(found[0], other)), ""))


def _label_at(place: LabelPlace, atoms: Atoms, name: str, source: str, irreps: str | None) -> Label | None:
    where = f"{name} of {source} ({place.words})"
    try:
        array = np.asarray(place.value)
    except ValueError:  # rows of different lengths
        array = np.asarray("")
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where} is {place.value!r}; expected real numbers")
    per = "atom" if name.lower() in PER_ATOM else place.per
    rows = len(atoms) if per == "atom" else 1
    if array.size == 0 or array.size % rows or (per == "atom" and array.shape[:1] != (rows,)):
        raise DataError(f"{where} has shape {array.shape}; expected numbers for each of {rows} {per}s")
    array = array.astype(float).reshape(rows, -1)
    if np.isinf(array).any():
        raise DataError(f"{where} has infinite values: drop or repair that frame")
    unknown = np.isnan(array).any(axis=1)
    if unknown.all():
        return None
    array = np.where(unknown[:, None], math.nan, array)
    width, matrix = array.shape[1], irreps is None or is_of_matrix(given_irreps(name, irreps))
    if width == 6 and matrix:
        return Label(np.array([voigt_6_to_full_3x3_stress(row) for row in array]), per, f"{place.words}, Voigt")
    shape = (3, 3) if width == 9 and matrix else () if width == 1 else (width,)
    return Label(array.reshape(rows, *shape), per, place.words)


def _differ(one: Label, other: Label) -> bool:
    if one.value.shape != other.value.shape:
        return True
    return not np.allclose(one.value, other.value, rtol=0, atol=SAME * np.nanmax(np.abs(one.value)), equal_nan=True)


def targets_of(
    frames: Sequence[Labelled], names: Iterable[str], irreps: Mapping[str, str], pooling: Mapping[str, str]
) -> list[Target]:
    """What is to be learned. Raises DataError where frames differ in the form of a label, ConfigError for irreps that
    do not fit, and for a pooling that is not for properties of structures, or of atoms."""
    found = []
    for name in names:
        labels = [frame.labels[name] for frame in frames if name in frame.labels]
        per, shape = labels[0].per, labels[0].value.shape[1:]
        symmetric = shape == (3, 3) and all(is_symmetric(label.value) for label in labels)
        target = Target(
            name, per, shape, irreps_of(name, per, shape, symmetric, irreps.get(name)), pooling.get(name, "")
        )
        check_forms(frames, [target])
        if not target.pooling:
            usual = usual_of_atoms(name, labels) if per == "atom" else usual_pooling(frames, name)
            target = target._replace(pooling=usual)
        if target.pooling not in POOLINGS[per]:
            expected = " or ".join(POOLINGS[per])
            raise ConfigError(f"setting 'data.pooling.{name}' is {target.pooling!r}; of {per}s expected {expected}")
        if target.pooling == "zero" and shape:
            raise ConfigError(f"setting 'data.pooling.{name}' is 'zero', which is for one number an atom; leave it out")
        found.append(target)
    return found


def check_forms(frames: Sequence[Labelled], targets: Sequence[Target]) -> None:
    """Raise DataError for a label of another form than its target."""
    for frame in frames:
        for target in targets:
            label = frame.labels.get(target.name)
            if label is None:
                continue
            if (label.per, label.value.shape[1:]) != (target.per, target.shape):
                raise DataError(
                    f"{target.name} of {frame.source} ({label.origin}) has shape {label.value.shape[1:]} for each "
                    f"{label.per}; expected {target.shape} for each {target.per}, as in the other frames"
                )
            if target.irreps == "1x0e+1x2e" and not is_symmetric(label.value):
                raise DataError(
                    f"{target.name} of {frame.source} ({label.origin}) is no symmetric matrix, as those that were "
                    "learned; leave it out, or train with it"
                )


def is_symmetric(matrices: np.ndarray) -> bool:
    known = matrices[np.isfinite(matrices).all(axis=(1, 2))]
    odd = np.abs(known - known.swapaxes(1, 2)).max(initial=0.0)
    return bool(odd <= SYMMETRIC_WITHIN * np.abs(known).max(initial=0.0))


def usual_of_atoms(name: str, labels: Sequence[Label]) -> str:
    """Whether charges always add up to nothing."""
    of_charge = "charge" in name.lower() and labels[0].value.ndim == 1
    return "zero" if of_charge and all(adds_up_to_nothing(label.value) for label in labels) else "free"


def adds_up_to_nothing(values: np.ndarray) -> bool:
    return bool(abs(values.sum()) <= min(1e-3 + ROUNDED * len(values), MOST_ROUNDED))  # not if one is unknown


def usual_pooling(frames: Sequence[Labelled], name: str) -> str:
    """Whether a number, or the trace of a matrix, grows with the structure; vectors, as dipoles do, and what the
    compositions do not tell, are taken to."""
    of_sum, of_mean = fits_of_pooling(frames, name)
    return "mean" if of_mean < (1 - UNDECIDED) * of_sum else "sum"


def fits_of_pooling(frames: Sequence[Labelled], name: str) -> tuple[float, float]:
    """What is left of a number, or the trace of a matrix, by the composition and by its fractions; (0, 0) of others."""
    known = [(frame.atoms, frame.labels[name].value) for frame in frames if name in frame.labels]
    if known[0][1].shape[1:] not in ((), (3, 3)):
        return 0.0, 0.0
    values = np.array([np.trace(value[0]) if value.ndim == 3 else value[0] for _, value in known])
    counts = compositions([atoms for atoms, _ in known])
    return residual_of(counts, values), residual_of(counts / counts.sum(axis=1, keepdims=True), values)


def compositions(structures: Sequence[Atoms], species: list[int] | None = None) -> np.ndarray:
    """Atoms of each element, (n, elements)."""
    species = species or sorted({int(z) for atoms in structures for z in atoms.numbers})
    return np.array([[np.count_nonzero(atoms.numbers == z) for z in species] for atoms in structures], dtype=float)


def residual_of(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square of what a linear fit without a constant leaves of y, beside y's own."""
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(np.sqrt(np.mean(left**2) / (np.mean(y**2) or 1.0))) + 1e-9  # below that, digits


def table_of(frames: Sequence[Labelled], targets: Sequence[Target]) -> str:
    """What was found, for the user to look at before training."""
    head = f"{'target':20s} {'frames':>12s}  {'of':12s} {'irreps':16s} {'rms':>10s} {'min':>10s} {'max':>10s}  found in"
    lines, notes = [head], []
    for target in targets:
        labels = [frame.labels[target.name] for frame in frames if target.name in frame.labels]
        values = np.concatenate([label.value.ravel() for label in labels])
        values = values[np.isfinite(values)]
        of = {"free": "atoms", "zero": "atoms, sum 0"}.get(target.pooling, target.pooling)
        lines.append(
            f"{target.name:20s} {len(labels):5d}/{len(frames):<6d}  {of:12s} {target.irreps:16s} "
            f"{np.sqrt(np.mean(values**2)):10.4g} {values.min():10.4g} {values.max():10.4g}  "
            f"{', '.join(sorted({label.origin for label in labels}))}"
        )
        notes += notes_on(frames, target, labels)
    return "\n".join([*lines, *notes])


def notes_on(frames: Sequence[Labelled], target: Target, labels: Sequence[Label]) -> list[str]:
    """Where a label is in another place with other numbers, and where nothing says how it grows."""
    notes, rivals = [], [label.rival for label in labels if label.rival]
    if rivals:
        places = ", ".join(sorted(set(rivals)))
        notes.append(f"{target.name}: {len(rivals)} of {len(frames)} frames have other numbers in {places}, left aside")
    if target.per == "structure" and target.shape != (3,):
        of_sum, of_mean = fits_of_pooling(frames, target.name)
        if abs(of_sum - of_mean) <= UNDECIDED * max(of_sum, of_mean) and len({len(f.atoms) for f in frames}) > 1:
            notes.append(
                f"{target.name}: these compositions do not tell whether it grows with a structure; --pooling "
                f"{target.name}=mean is for what does not"
            )
    return notes
