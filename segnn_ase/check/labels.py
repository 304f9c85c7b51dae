"""Labels that were not found, and files of which only a part can be read."""

import re
from collections import Counter

import ase.io
import numpy as np
from ase import Atoms

from segnn_ase.check.findings import LABELS, Finding
from segnn_ase.data.counts import refuse_impossible_counts
from segnn_ase.data.frames import ENERGY_KEYS, FORCES_KEYS, STRESS_KEYS, VIRIAL_KEYS, Frame, split_index

USUAL = {"energy": ENERGY_KEYS, "forces": FORCES_KEYS, "stress": STRESS_KEYS + VIRIAL_KEYS}
WORDS = {  # a name that holds one of these words looks like a label
    "energy": {"energy", "energies", "e", "en", "etot", "toten"},
    "forces": {"force", "forces", "f", "frc", "gradient", "gradients", "grad"},
    "stress": {"stress", "stresses", "virial", "virials", "sigma"},
}


def readable_part(path: str) -> list[tuple[str, Atoms]]:
    """The frames of a torn file before the tear."""
    images: list[Atoms] = []
    try:
        refuse_impossible_counts(split_index(path)[0])
        images.extend(ase.io.iread(*split_index(path), do_not_split_by_at_sign=True))
    except Exception:  # whatever ASE raises at the tear; the caller has reported it
        pass
    return [(f"{path}, frame {n}", atoms) for n, atoms in enumerate(images)]


def looks_like(name: str, value, size: int) -> str | None:
    """The kind of label that a name and the shape of its value suggest, for a structure of `size` atoms."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    shape = np.shape(value)
    numeric = np.asarray(value).dtype.kind in "fiu"
    fits = {"energy": shape in ((), (1,)), "forces": shape == (size, 3), "stress": shape in ((6,), (9,), (3, 3))}
    return next((kind for kind in LABELS if numeric and fits[kind] and words & WORDS[kind]), None)


def find_unread_labels(pairs: list[tuple[Frame, Atoms]]) -> list[Finding]:
    """Labels from several keys, labels of some frames only, and what looks like a label but is not read."""
    if not pairs:
        return []
    findings, unread = [], {kind: {} for kind in LABELS}
    for frame, atoms in pairs:
        for name, value in {**atoms.info, **atoms.arrays}.items():
            kind = looks_like(name, value, len(atoms))
            if kind and name not in frame.origins and not (kind == "stress" and not atoms.pbc.all()):
                unread[kind].setdefault(name, []).append(frame.source)
    for position, kind in enumerate(LABELS):
        origins = Counter(frame.origins[position] for frame, _ in pairs)
        missing = tuple(frame.source for frame, _ in pairs if frame.origins[position] is None)
        read = {name: n for name, n in origins.items() if name}
        if len(read) > 1:
            parts = ", ".join(f"{name} ({n} frames)" for name, n in read.items())
            findings.append(
                Finding(
                    "mixed keys", "warning", f"{kind} comes from {parts}", (), "Make sure they are one level of theory"
                )
            )
        for name, sources in unread[kind].items():
            lost = set(sources) & set(missing)
            text = f"{name!r} looks like {kind} and is not read"
            if not lost:
                findings.append(Finding("unread labels", "note", text))
                continue
            alone = len(unread[kind]) == 1 and not read
            findings.append(
                Finding(
                    "unread labels",
                    "error" if not read else "warning",
                    f"{text}, though {len(lost)} of {len(pairs)} frames have no other {kind}",
                    tuple(sources) if read else (),
                    f"Name it with --{kind}-key {name}, or rename it",
                    ("key", kind, name) if alone else (),
                )
            )
        if missing and read:
            text = f"{len(missing)} of {len(pairs)} frames have no {kind}"
            findings.append(Finding("missing labels", "note", text, missing))
    if all(frame.energy is None and frame.forces is None for frame, _ in pairs):
        findings.append(Finding("no labels", "error", "no frame has an energy or forces"))
    elif all(frame.forces is None for frame, _ in pairs):
        findings.append(Finding("no forces", "note", "no frame has forces: energies alone teach little"))
    return findings
