"""What in a dataset would spoil a training: unread labels, units and signs, copies, leaks, outliers, absurd E0.

`check` reads files and looks at everything; `check_frames` looks at frames. Each kind of flaw is one function that
returns findings. Whether forces and stress belong to the energies is judged by the crude potential of `surrogate`.
"""

import io
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from segnn_ase.config import ConfigError, DataError, StructureError
from segnn_ase.data import (
    ENERGY_KEYS,
    FORCES_KEYS,
    STRESS_KEYS,
    VIRIAL_KEYS,
    Frame,
    LabelKeys,
    frame_from_atoms,
    label_table,
    read_images,
    split_index,
)
from segnn_ase.files import write_atomically
from segnn_ase.flaws import LABELS, OF_FRAMES, OF_SETS, Finding, Sets, fit_residuals, sentence, where_of
from segnn_ase.neighbors import check_geometry
from segnn_ase.plot import plot_dataset
from segnn_ase.relations import OF_FIT, VOIGT, Judged, judge
from segnn_ase.surrogate import collect_pairs

SEVERITIES = ("error", "warning", "note")
WORDS = {  # a name that holds one of these words looks like a label
    "energy": {"energy", "energies", "e", "en", "etot", "toten"},
    "forces": {"force", "forces", "f", "frc", "gradient", "gradients", "grad"},
    "stress": {"stress", "stresses", "virial", "virials", "sigma"},
}
USUAL = {"energy": ENERGY_KEYS, "forces": FORCES_KEYS, "stress": STRESS_KEYS + VIRIAL_KEYS}


class Report(NamedTuple):
    """What was found; `images` are the readable structures of the training files as ASE reads them."""

    findings: list[Finding]
    sets: Sets
    judged: Judged | None
    images: dict[str, Atoms]

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]

    def markdown(self, figure: str | None = None) -> str:
        """The whole report; figure: path of a picture to show."""
        counts = Counter(f.severity for f in self.findings)
        lines = ["# Data report", "", ", ".join(f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in SEVERITIES), ""]
        for name in ("train", "valid", "test"):
            if frames := getattr(self.sets, name):
                lines += [f"{name}: {len(frames)} frames", "", "```", label_table(frames), "```", ""]
        for severity in SEVERITIES:
            for f in (f for f in self.findings if f.severity == severity):
                lines += [f"- **{severity}: {f.code}.** {sentence(f)}"]
        return "\n".join([*lines, "", f"![overview]({figure})"] if figure else lines) + "\n"


def check(
    paths: "str | Path | list",
    *,
    valid: tuple = (),
    test: tuple = (),
    isolated_atoms: str | None = None,
    keys: LabelKeys | None = None,
) -> Report:
    """Read the files of a training and look for everything that is wrong; frames that cannot be used are findings.

    Raises FileNotFoundError for files that are not there.
    """
    keys, findings, sets, images = keys or LabelKeys(), [], [], {}
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    for name, files in (("train", paths), ("valid", valid), ("test", test)):
        pairs, found = read_all([str(p) for p in files], keys)
        sets.append([frame for frame, _ in pairs])
        findings += found + find_unread_labels(pairs)
        if name == "train":
            images = {frame.source: atoms for frame, atoms in pairs}
    isolated = None
    if isolated_atoms is not None:
        pairs, found = read_all([isolated_atoms], LabelKeys(energy=keys.energy))
        isolated = [frame for frame, _ in pairs]
        findings += found
    sets = Sets(*sets, isolated)
    judged = judge(sets.all)
    findings += check_frames(sets) + check_judged(sets.all, judged)
    order = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    return Report(order, sets, judged, images)


def check_frames(sets: Sets) -> list[Finding]:
    """The quick checks, of frames that have been read: a second or two for some thousand small ones."""
    if not sets.all:
        return [Finding("empty", "error", "there are no usable frames")]
    findings = [finding for find in OF_FRAMES for finding in find(sets.all)]
    return findings + [finding for find in OF_SETS for finding in find(sets)]


def check_judged(frames: list[Frame], judged: Judged | None) -> list[Finding]:
    """The checks that need the surrogate."""
    if judged is None:
        return [Finding("not judged", "note", "too few frames with energies and forces to judge units and signs")]
    return [finding for find in OF_FIT for finding in find(judged)]


def read_all(paths: list[str], keys: LabelKeys) -> tuple[list[tuple[Frame, Atoms]], list[Finding]]:
    """Every usable frame with the structure it came from, and findings about the others."""
    good, findings, bad = [], [], {}
    for path in paths:
        try:
            images = read_images(path)
        except DataError as error:
            images = readable_part(path)
            rest = f"; the first {len(images)} frames can be read" if images else ""
            findings.append(
                Finding("unreadable file", "error", f"{error}{rest}", (), "Write the file again", ("drop",))
            )
        for source, atoms in images:
            try:
                check_geometry(atoms.positions, atoms.cell.array, atoms.pbc)
                good.append((frame_from_atoms(atoms, keys, source=source), atoms))
            except (DataError, StructureError) as error:
                text = str(error).replace(f" of {source}", "")
                bad.setdefault(re.sub(r"-?\d[\d.e+-]*", "#", text), (text, []))[1].append(source)
    for text, sources in bad.values():
        findings.append(Finding("bad labels", "error", text, tuple(sources), "Drop or repair these frames", ("drop",)))
    for position, name in enumerate(LABELS):
        if getattr(keys, name) and good and not any(frame.origins[position] for frame, _ in good):
            findings.append(Finding("labels", "error", f"no frame has the {name} key {getattr(keys, name)!r}"))
    return good, findings


def readable_part(path: str) -> list[tuple[str, Atoms]]:
    """The frames of a torn file before the tear."""
    images: list[Atoms] = []
    try:
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


def warn_or_refuse(sets: Sets, report, *, refuse: bool = True) -> None:
    """Before a training: tell warnings by `report`, a function of text. Raises DataError for what would spoil it.

    Without `refuse` that is only told, too.
    """
    findings = check_frames(sets)
    errors = [sentence(f) for f in findings if f.severity == "error"]
    if errors and refuse:
        raise DataError(f"{' '.join(errors)} To train all the same, set refuse_flaws = false under [data]")
    for finding in findings:
        if finding.severity != "note":
            report(f"{finding.severity}: {finding.code}: {sentence(finding)}")


def write_report(report: Report, path: "str | Path") -> list[str]:
    """Write the report as Markdown and its figure beside it; returns the names of both."""
    figure = Path(path).with_suffix(".png")
    plot_report(report, figure)
    write_atomically(path, report.markdown(figure.name).encode())
    return [str(path), str(figure)]


def plot_report(report: Report, path: "str | Path") -> None:
    """Draw what was found in the data on one page."""
    named = {name: getattr(report.sets, name) for name in ("train", "valid", "test") if getattr(report.sets, name)}
    alone = {name: [f for f in frames if len(f.atoms) > 1 and f.energy is not None] for name, frames in named.items()}
    residuals = fit_residuals([f for frames in alone.values() for f in frames])
    parts = np.split(residuals, np.cumsum([len(frames) for frames in alone.values()])[:-1])
    forces = {
        name: np.concatenate([np.linalg.norm(f.forces, axis=1) for f in frames if f.forces is not None])
        for name, frames in named.items()
        if any(f.forces is not None for f in frames)
    }
    agreement = None
    if report.judged is not None:
        known = np.isfinite(report.judged.equations.energies)
        agreement = report.judged.forces_only.energy[known], report.judged.equations.energies[known]
    some = report.sets.all[:: -(-sum(len(f.atoms) for f in report.sets.all) // 20_000)]
    plot_dataset(path, dict(zip(alone, parts, strict=True)), forces, distances_by_elements(some), agreement)


def distances_by_elements(frames: list[Frame]) -> dict[str, np.ndarray]:
    """Distances, Å, up to the surrogate's cutoff."""
    pairs = collect_pairs([f.atoms for f in frames])
    a, b = (np.sort([pairs.numbers[pairs.i], pairs.numbers[pairs.j]], axis=0)) if len(pairs.i) else ([], [])
    r = np.linalg.norm(pairs.vectors, axis=1)
    kinds = sorted(set(zip(np.asarray(a).tolist(), np.asarray(b).tolist(), strict=True)))
    return {f"{chemical_symbols[x]}-{chemical_symbols[y]}": r[(a == x) & (b == y)] for x, y in kinds}


def repair(report: Report, out: "str | Path", keys: LabelKeys | None = None) -> list[str]:
    """Write the training frames with what can be repaired safely; returns what was done, line by line.

    Frames that cannot be read and repeated ones are left out, a stress of known unit and sign is converted, labels
    get the names that ASE reads. Raises ConfigError if `out` is one of the files that were read.
    """
    inputs = {Path(split_index(source.rpartition(", frame ")[0])[0]).resolve() for source in report.images}
    if Path(out).expanduser().resolve() in inputs:
        raise ConfigError(f"fixed frames would overwrite {str(out)!r}; give another name")
    keys, done = keys or LabelKeys(), []
    drop = {source for f in report.findings if f.repair[:1] == ("drop",) for source in f.frames}
    renamed = {f.repair[1]: f.repair[2] for f in report.findings if f.repair[:1] == ("key",)}
    factor = next((f.repair[1] for f in report.findings if f.repair[:1] == ("scale stress",)), 1.0)
    for f in report.findings:
        if f.repair[:1] == ("drop",):
            done.append(f"left out: {f.message}" + (f" [{where_of(f.frames)}]" if f.frames else ""))
    done += [f"read {kind} from {name!r}" for kind, name in renamed.items()]
    done += [f"multiplied the stress by {factor:.6g}"] if factor != 1.0 else []
    keys = keys.model_copy(update=renamed)
    kept = [
        relabelled(a, frame_from_atoms(a, keys, source=s), factor) for s, a in report.images.items() if s not in drop
    ]
    if not kept:
        raise DataError("nothing is left to write: no training frame can be used")
    text = io.StringIO()
    ase.io.write(text, kept, format="extxyz")
    write_atomically(out, text.getvalue().encode())
    return [*done, f"wrote {len(kept)} frames to {out}"]


def relabelled(atoms: Atoms, frame: Frame, factor: float) -> Atoms:
    """The structure with all it had, its labels under the names that ASE reads."""
    out = atoms.copy()
    for name in (*frame.origins, *(x for names in USUAL.values() for x in names)):
        out.info.pop(name, None)
        out.arrays.pop(name, None)
    results = {"energy": frame.energy, "forces": frame.forces}
    results["stress"] = None if frame.stress is None else factor * frame.stress.ravel()[VOIGT]
    out.calc = SinglePointCalculator(out, **{name: value for name, value in results.items() if value is not None})
    return out
