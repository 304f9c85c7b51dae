"""Labels that were not found or are in two places, and files of which only a part can be read."""

from collections import Counter

import ase.io
from ase import Atoms

from segnn_ase.base.label_names import looks_like as looks_like
from segnn_ase.check.findings import LABELS, Finding, Sets
from segnn_ase.data.frames import Frame, rivals_of
from segnn_ase.data.images import in_angstrom, readable_by_ase, split_index


def readable_part(path: str) -> list[tuple[str, Atoms]]:
    """The frames of a torn file before the tear."""
    images: list[Atoms] = []
    try:
        name, index = split_index(path)
        file, options = readable_by_ase(name)
        images.extend(in_angstrom(atoms, path) for atoms in ase.io.iread(file, index, **options))
    except Exception:  # whatever ASE raises at the tear; the caller has reported it
        pass
    return [(f"{path}, frame {n}", atoms) for n, atoms in enumerate(images)]


def find_unread_labels(sets: Sets) -> list[Finding]:
    """Labels from several keys, labels of some frames only, and what looks like a label but is not read."""
    findings = []
    for frames in (sets.train, sets.valid, sets.test):
        for position, kind in enumerate(LABELS):
            findings += mixed_keys(frames, position) + unread(frames, kind) + missing(frames, kind)
    return findings


def mixed_keys(frames: list[Frame], position: int) -> list[Finding]:
    read = Counter(name for f in frames if (name := told_apart(f, position)))
    if len(read) < 2:
        return []
    parts = ", ".join(f"{name} ({n} frames)" for name, n in read.items())
    text = f"{LABELS[position]} comes from {parts}"
    return [Finding("mixed keys", "warning", text, (), "Make sure they are one level of theory")]


def told_apart(frame: Frame, position: int) -> str | None:
    """Where a label comes from; an energy that equals the free energy beside it is that."""
    name = frame.origins[position]
    free = [other for other in frame.reading.agreeing if position == 0 and "free" in other.lower()]
    return free[0] if free else name


def unread(frames: list[Frame], kind: str) -> list[Finding]:
    lost = {f.source for f in frames if getattr(f, kind) is None}
    names: dict[str, list[str]] = {}
    for frame in frames:
        for other, name in frame.reading.unread:
            if other == kind:
                names.setdefault(name, []).append(frame.source)
    return [_unread(kind, name, s, lost, len(frames), len(names) == 1) for name, s in names.items()]


def _unread(kind: str, name: str, sources: list[str], without: set[str], count: int, alone: bool) -> Finding:
    """The finding for one name; without: frames that have no label of this kind."""
    text, lost, none_read = f"{name!r} looks like {kind} and is not read", without & set(sources), len(without) == count
    if not lost:
        return Finding("unread labels", "note", text)
    return Finding(
        "unread labels",
        "error" if none_read else "warning",
        f"{text}, though {len(lost)} of {count} frames have no other {kind}",
        tuple(sources),
        f"Name it with --{kind}-key {name}, or rename it",
        ("key", kind, name) if alone and none_read else (),
    )


def missing(frames: list[Frame], kind: str) -> list[Finding]:
    without = tuple(f.source for f in frames if getattr(f, kind) is None)
    if not 0 < len(without) < len(frames):
        return []
    return [Finding("missing labels", "note", f"{len(without)} of {len(frames)} frames have no {kind}", without)]


def find_absent_labels(sets: Sets) -> list[Finding]:
    findings = []
    for name, frames in (("training", sets.train), ("validation", sets.valid), ("test", sets.test)):
        if frames and all(f.energy is None and f.forces is None for f in frames):
            text = f"no frame of the {name} set has an energy or forces"
            findings.append(Finding("no labels", "error", text, tuple(f.source for f in frames)))
    many = [f for f in sets.train if len(f.atoms) > 1]
    if many and not findings and all(f.forces is None for f in many):
        text = "no frame has forces: energies alone teach little"
        findings.append(Finding("no forces", "warning", text, (), "Compute them, too, if you can"))
    return findings


def find_two_sources(sets: Sets) -> list[Finding]:
    """Labels that are in two places with two values."""
    return [
        Finding(
            "two sources", "note" if "free energy" in text else "warning", text, (), "Make sure it is the right one"
        )
        for text in rivals_of(sets.all)
    ]


OF_LABELS = (find_unread_labels, find_absent_labels, find_two_sources)
