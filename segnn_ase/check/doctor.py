"""What in a dataset would spoil a training: unread labels, units and signs, copies, leaks, outliers, absurd E0.

`check` reads files and looks at everything, `examine` at frames; `check_frames` has a quick look at them. Each kind of
flaw is one function that returns findings: of the frames (`OF_LABELS`, `OF_FRAMES`, `OF_SIZES`, `OF_SETS`), or of what
a crude potential makes of them (`OF_FIT`), which tells whether forces and stress belong to the energies.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ase import Atoms

from segnn_ase.base.errors import DataError, StructureError, expect
from segnn_ase.check.consistency import OF_FIT, Judged, judge, judgeable
from segnn_ase.check.findings import Finding, Sets, sentence
from segnn_ase.check.labels import OF_LABELS, readable_part
from segnn_ase.check.pairs import Pairs
from segnn_ase.check.report import SEVERITIES, Report
from segnn_ase.check.sets_of_frames import OF_DIGITS, OF_SETS
from segnn_ase.check.single_frames import OF_FRAMES
from segnn_ase.check.sizes import OF_SIZES
from segnn_ase.check.stiffness import find_unit_of_energy
from segnn_ase.check.surroundings import Surroundings, survey
from segnn_ase.data.frames import Frame, as_paths, frame_from_atoms, keys_not_found, species_of
from segnn_ase.data.images import read_images
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.pulled import without_pull
from segnn_ase.structure.cue_settings import FIELD, Cue
from segnn_ase.structure.neighbors import check_geometry

IN_FIELDS = tuple(map(Cue.model_validate, (FIELD, "initial_charges")))  # what decides about the pull of a field


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
    keys, findings, sets, images = LabelKeys() if keys is None else keys, [], [], {}
    expect(isinstance(keys, LabelKeys), "keys", keys, "LabelKeys")
    known = isolated_atoms is None or isinstance(isolated_atoms, str | os.PathLike)
    expect(known, "isolated_atoms", isolated_atoms, "a path or None")
    for name, files in (("train", paths), ("valid", valid), ("test", test)):
        pairs, found = read_all(as_paths(files), keys)
        sets.append([frame for frame, _ in pairs])
        findings += found
        if name == "train":
            images = {frame.source: atoms for frame, atoms in pairs}
    isolated = None
    if isolated_atoms is not None:
        pairs, found = read_all([str(isolated_atoms)], LabelKeys(energy=keys.energy, inputs=keys.inputs))
        isolated = [frame for frame, _ in pairs]
        findings += found
    sets = Sets(*sets, isolated)
    examined = examine(sets)
    order = sorted(findings + examined.findings, key=lambda f: SEVERITIES.index(f.severity))
    return Report(order, sets, examined.judged, examined.drawn, images)


class Examined(NamedTuple):
    """What is known of frames that have been read."""

    findings: list[Finding]
    judged: Judged | None
    drawn: Pairs  # of some of them


def examine(sets: Sets) -> Examined:
    """All checks of frames that have been read."""
    frames = as_learned(sets).all
    chosen = judgeable(frames)
    some = [frames[n] for n in chosen]
    seen = survey([f.atoms for f in frames], chosen, species_of(some))
    judged = judge(some, seen.features, [seen.around[n].shortest for n in chosen]) if chosen else None
    of_fit = [of_tests_milder(finding, sets) for finding in check_judged(judged)]
    return Examined(check_frames(sets, seen.around) + of_fit, judged, seen.drawn)


def check_frames(sets: Sets, around: Sequence[Surroundings] | None = None) -> list[Finding]:
    """The quick checks, of frames that have been read: a second or two for some thousand small ones."""
    if not sets.all:
        return [Finding("empty", "error", "there are no usable frames")]
    around = survey([f.atoms for f in sets.all]).around if around is None else around
    sets = sets._replace(around=around)
    known = as_learned(sets)
    of_frames = [of_tests_milder(finding, sets) for find in OF_LABELS + OF_FRAMES + OF_SIZES for finding in find(known)]
    of_sets = [finding for find in OF_SETS for finding in find(sets if find in OF_DIGITS else known)]
    return of_frames + [of_tests_milder(finding, sets) for finding in of_sets]


def as_learned(sets: Sets) -> Sets:
    """Without the pull of fields on net charges, where there are such; digits are looked at as files have them."""
    if not any(("info", FIELD) in (frame.told or {}) for frame in sets.all):
        return sets
    found = [without_pull(list(frames or ()), IN_FIELDS, strict=False) for frames in sets[:4]]
    return sets._replace(train=found[0], valid=found[1], test=found[2], isolated=sets.isolated and found[3])


def of_tests_milder(finding: Finding, sets: Sets) -> Finding:
    """An error of test frames alone is a warning: a training does not touch them."""
    if finding.code == "unseen elements":  # which cannot be measured
        return finding
    others = {f.source for f in (*sets.train, *sets.valid)}
    spoils = finding.severity == "error" and (not finding.frames or others.intersection(finding.frames))
    return finding if spoils or finding.severity != "error" else finding._replace(severity="warning")


def check_judged(judged: Judged | None) -> list[Finding]:
    """The checks that need the surrogate."""
    if judged is None:
        return [Finding("not judged", "note", "too few frames with energies and forces to judge units and signs")]
    return [finding for find in (*OF_FIT, find_unit_of_energy) for finding in find(judged)]


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
    lost = keys_not_found(keys, [frame for frame, _ in good], [atoms for _, atoms in good]) if good else {}
    findings += [Finding("labels", "error", f"no frame has the {name} key {key!r}") for name, key in lost.items()]
    return good, findings


def warn_or_refuse(sets: Sets, report, *, refuse: bool = True, thorough: bool = False) -> None:
    """Before a training: tell warnings by `report`, a function of text. Raises DataError for what would spoil it.

    Without `refuse` that is only told, too. The checks are the quick ones, or all of frames.
    """
    findings = examine(sets).findings if thorough else check_frames(sets)
    errors = [sentence(f) for f in findings if f.severity == "error"]
    if errors and refuse:
        raise DataError(f"{' '.join(errors)} To train all the same, set refuse_flaws = false under [data]")
    for finding in findings:
        if finding.severity != "note":
            report(f"{finding.severity}: {finding.code}: {sentence(finding)}")


def seconds_of_check(frames: list[Frame]) -> float:
    """About how long all checks of frames take; measured 0.2 to 0.4 ms an atom, on one core."""
    return 0.5 + 3e-4 * sum(len(f.atoms) for f in frames)
