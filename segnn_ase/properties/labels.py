"""Labels of properties in the frames of files: in `info`, in `arrays` and among a calculator's results."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.base.label_names import PREFIXES
from segnn_ase.data.frames import structure_alone
from segnn_ase.data.images import read_images
from segnn_ase.properties.targets import Target, irreps_of

PER_ATOM = {"charges", "energies", "forces", "magmoms", "stresses"}  # results of ASE's calculators
SYMMETRIC_WITHIN = 1e-3  # of the largest entry
NOTHING = 1e-3  # of the sum of absolute values: files round charges


class Label(NamedTuple):
    """One property of one frame."""

    value: np.ndarray  # (n, *shape), n = 1 for a structure
    per: str
    origin: str


class Labelled(NamedTuple):
    """A structure and what is known of it, by the names of properties."""

    atoms: Atoms
    labels: dict[str, Label]
    source: str


def read_labelled(paths: Iterable[str], names: Iterable[str], *, every: bool = True) -> list[Labelled]:
    """Every frame of files, with the properties that it has.

    Raises FileNotFoundError, and DataError for what cannot be read and where a property is in no frame; if not
    `every`, where all are.
    """
    found, there = [], set()
    for path in paths:
        for source, atoms in read_images(path):
            labels = {name: label_of(atoms, name, source) for name in names}
            known = {name: label for name, label in labels.items() if label is not None}
            found.append(Labelled(structure_alone(atoms, source), known, source))
            there |= {name for _, name, *_ in places_of(atoms)}
    lost = [name for name in names if not any(name in frame.labels for frame in found)]
    if lost if every else len(lost) == len(list(names)):
        others = ", ".join(sorted(there)) or "no properties at all"
        raise DataError(f"no frame of {', '.join(paths)} has the target {', '.join(lost)}; frames have {others}")
    return found


def places_of(atoms: Atoms) -> list[tuple[str, str, str, Any]]:
    """Where labels may be: the place in words, the name, whether of structures or atoms, the value."""
    results = {} if atoms.calc is None else atoms.calc.results
    found = [(f"calculator {k}", str(k), "atom" if k in PER_ATOM else "structure", v) for k, v in results.items()]
    found += [(f"info {k}", str(k), "structure", v) for k, v in atoms.info.items()]
    return found + [
        (f"arrays {k}", str(k), "atom", v) for k, v in atoms.arrays.items() if k not in ("numbers", "positions")
    ]


def label_of(atoms: Atoms, name: str, source: str) -> Label | None:
    """A property by its name, or by that behind a usual prefix such as REF_ or dft_; None where there is none.

    A label of which nothing is a number counts as none. Raises DataError for what can be no label.
    """
    wanted = [name.lower(), *(f"{prefix}_{name}".lower() for prefix in PREFIXES)]
    places = [place for place in places_of(atoms) if place[1].lower() in wanted]
    if not places:
        return None
    origin, _, per, value = min(places, key=lambda place: (place[1] != name, wanted.index(place[1].lower())))
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise DataError(f"{name} of {source} ({origin}) is {value!r}; expected numbers") from None
    rows = len(atoms) if per == "atom" else 1
    array = array.reshape(rows, -1) if array.size % rows == 0 else array
    if array.size == 0 or len(array) != rows:
        raise DataError(f"{name} of {source} ({origin}) has shape {np.shape(value)}; expected numbers for {rows} rows")
    if np.isinf(array).any():
        raise DataError(f"{name} of {source} ({origin}) has infinite values: drop or repair that frame")
    unknown = np.isnan(array).any(axis=1)
    if unknown.all():
        return None
    shape = {1: (), 3: (3,), 9: (3, 3)}.get(array.shape[1], (array.shape[1],))
    return Label(np.where(unknown[:, None], math.nan, array).reshape(rows, *shape), per, origin)


def targets_of(
    frames: list[Labelled], names: Iterable[str], irreps: dict[str, str], pooling: dict[str, str]
) -> list[Target]:
    """What is to be learned. Raises DataError where frames differ in the form of a label, ConfigError for irreps that
    do not fit, and for a pooling of atoms' properties."""
    found = []
    for name in names:
        labels = [(frame.labels[name], frame.source) for frame in frames if name in frame.labels]
        first, where = labels[0]
        for label, source in labels:
            if (label.per, label.value.shape[1:]) != (first.per, first.value.shape[1:]):
                raise DataError(
                    f"{name} of {source} is of shape {label.value.shape[1:]}, one for each {label.per}, but that of "
                    f"{where} of {first.value.shape[1:]} for each {first.per}; expected the same in all frames"
                )
        shape = first.value.shape[1:]
        symmetric = shape == (3, 3) and all(is_symmetric(label.value) for label, _ in labels)
        turns = irreps_of(name, first.per, shape, symmetric, irreps.get(name))
        if first.per == "atom" and name in pooling:
            raise ConfigError(f"setting 'data.pooling.{name}' is {pooling[name]!r}, but it is of atoms; leave it out")
        if first.per == "atom":
            pooled = "zero" if shape == () and all(adds_up_to_nothing(label.value) for label, _ in labels) else ""
        else:
            pooled = pooling.get(name) or usual_pooling(frames, name, shape)
        found.append(Target(name, first.per, shape, turns, pooled))
    return found


def adds_up_to_nothing(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and abs(values.sum()) <= NOTHING * np.abs(values).sum())


def is_symmetric(matrices: np.ndarray) -> bool:
    known = matrices[np.isfinite(matrices).all(axis=(1, 2))]
    odd = np.abs(known - known.swapaxes(1, 2)).max(initial=0.0)
    return bool(odd <= SYMMETRIC_WITHIN * np.abs(known).max(initial=0.0))


def usual_pooling(frames: list[Labelled], name: str, shape: tuple[int, ...]) -> str:
    """Whether a number grows with the structure: which of both, the composition or its fractions, says more of it.

    What turns grows with the structure, as dipoles and polarizabilities do.
    """
    known = [(frame.atoms, frame.labels[name].value) for frame in frames if name in frame.labels]
    if shape or known[0][1].shape[0] > 1:
        return "sum"
    values = np.concatenate([np.ravel(value) for _, value in known])
    counts = compositions([atoms for atoms, _ in known])
    if len(np.unique(counts.sum(axis=1))) == 1:
        return "sum"
    missed = [residual_of(x, values) for x in (counts, counts / counts.sum(axis=1, keepdims=True))]
    return "sum" if missed[0] <= missed[1] else "mean"


def compositions(structures: list[Atoms], species: list[int] | None = None) -> np.ndarray:
    """Atoms of each element, (n, elements)."""
    species = species or sorted({int(z) for atoms in structures for z in atoms.numbers})
    return np.array([[np.count_nonzero(atoms.numbers == z) for z in species] for atoms in structures], dtype=float)


def residual_of(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square of what a linear fit without a constant leaves of y."""
    return float(np.sqrt(np.mean((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)))


def table_of(frames: list[Labelled], targets: list[Target]) -> str:
    """What was found, for the user to look at before training."""
    head = f"{'target':20s} {'frames':>12s}  {'of':12s} {'irreps':16s} {'rms':>10s} {'min':>10s} {'max':>10s}  found in"
    lines = [head]
    for target in targets:
        labels = [frame.labels[target.name] for frame in frames if target.name in frame.labels]
        values = np.concatenate([label.value.ravel() for label in labels])
        values = values[np.isfinite(values)]
        of = "atoms, sum 0" if target.pooling == "zero" else target.pooling or "atoms"
        lines.append(
            f"{target.name:20s} {len(labels):5d}/{len(frames):<6d}  {of:12s} {target.irreps:16s} "
            f"{np.sqrt(np.mean(values**2)):10.4g} {values.min():10.4g} {values.max():10.4g}  "
            f"{', '.join(sorted({label.origin for label in labels}))}"
        )
    return "\n".join(lines)
