"""Flaws that only many frames together have: odd ones out, reference energies, copies, splits that leak."""

import math
from collections import Counter

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from segnn_ase.base.errors import DataError
from segnn_ase.check.findings import LABELS, Finding, Sets, energies_per_atom, numbered
from segnn_ase.check.matching import (
    NEAR,
    SAME,
    Described,
    Match,
    displacement,
    groups_of,
    matches,
    trajectories,
    turn_onto,
)
from segnn_ase.data.frames import Frame, is_isolated_atom, species_of, told_inputs
from segnn_ase.data.references import energies_of_isolated_atoms, is_lone_ion, reference_energies

TOLERANCES = (1e-3, 0.01, 1e-3)  # eV/atom, eV/Å and eV/Å^3, of labels of one structure
MUCH = 5.0  # times these: one of the two is wrong
STIFF = 150.0  # eV/Å^2, by which forces change as atoms move: of triple bonds up to 145
STALE = 3  # frames with one energy, at least
COINCIDENCE = 1e-3  # expected groups of equal energies, below which they are no accident


def find_lone_elements(sets: Sets) -> list[Finding]:
    """Elements and compositions of a frame or two that look like a mistake among many alike."""
    big = [f for f in sets.all if len(f.atoms) > 1]
    if len(big) < 10:
        return []
    where = {z: [f for f in big if z in f.atoms.numbers] for z in species_of(big)}
    findings, told = [], set()
    for z, holders in where.items():
        if len(holders) <= max(1, len(big) // 100):
            text = f"{chemical_symbols[z]} occurs in {len(holders)} of {len(big)} frames only: too few to learn it"
            advice = "Is the element right? If it is, add frames"
            findings.append(Finding("lone element", "warning", text, tuple(f.source for f in holders), advice))
            told |= {f.source for f in holders}
    formulas = Counter(f.atoms.get_chemical_formula() for f in big)
    common = {(tuple(np.sort(f.atoms.numbers)), n) for f in big if (n := formulas[f.atoms.get_chemical_formula()]) > 9}
    for frame in big:
        name = frame.atoms.get_chemical_formula()
        if formulas[name] > max(1, len(big) // 100) or len(formulas) > len(big) // 5 or frame.source in told:
            continue
        for numbers, n in common:
            swapped = Counter(numbers) - Counter(frame.atoms.numbers.tolist())
            if len(numbers) == len(frame.atoms) and sum(swapped.values()) == 1:
                text = f"one frame is {name}, {n} others with as many atoms are {_formula(numbers)}"
                findings.append(Finding("lone composition", "warning", text, (frame.source,), "Is an element wrong?"))
                break
    return findings


def _formula(numbers: tuple) -> str:
    return Atoms(numbers=numbers).get_chemical_formula()


def find_mixed_periodicity(sets: Sets) -> list[Finding]:
    kinds: dict[str, Counter] = {}
    for f in sets.all:
        if len(f.atoms) > 1:
            kinds.setdefault(f.atoms.get_chemical_formula(), Counter())["".join("FT"[int(b)] for b in f.atoms.pbc)] += 1
    mixed = {name: dict(c) for name, c in kinds.items() if len(c) > 1}
    if not mixed:
        return []
    name, counts = next(iter(mixed.items()))
    text = f"the periodicity differs between frames of one composition ({name}: {counts})"
    return [Finding("mixed periodicity", "warning", text, (), "Set pbc alike, or make sure that both are meant")]


def find_coarse_energies(sets: Sets) -> list[Finding]:
    """Energies that are rounded to few digits, or were once stored in float32."""
    known = [f for f in sets.all if f.energy is not None and len(f.atoms) > 1]
    energies = np.array([f.energy for f in known])
    if len(np.unique(energies)) < 10:
        return []
    step = next((q for q in (1.0, 0.1, 0.01, 1e-3) if (np.abs(energies / q - np.round(energies / q)) < 1e-6).all()), 0)
    grid = np.spacing(np.abs(energies).astype("f4")).astype(float)
    if not step and np.median(grid) > 1e-4 and (np.abs(energies - energies.astype("f4")) < 0.1 * grid).all():
        step = float(np.median(grid))
    per_atom = step / np.median([len(f.atoms) for f in known])
    if not step:
        return []
    text = f"energies are multiples of {1e3 * step:.2g} meV ({1e3 * per_atom:.2g} meV/atom): rounded or once in float32"
    return [Finding("coarse energies", "warning" if per_atom > 2e-3 else "note", text)]


def find_reference_problems(sets: Sets) -> list[Finding]:
    """E0 that are missing, undetermined, or give absurd atomisation energies."""
    species = species_of(sets.all)
    lonely = [f for f in (*sets.train, *(sets.isolated or ())) if is_isolated_atom(f) and f.energy is not None]
    lonely = [f for f in lonely if not is_lone_ion(f, None)]
    known = {int(f.atoms.numbers[0]) for f in lonely}
    missing = ", ".join(chemical_symbols[z] for z in species if z not in known)
    bound = [f for f in sets.all if f.energy is not None and not is_isolated_atom(f)]
    if sets.isolated is not None and missing:
        text = f"isolated atoms lack an energy of {missing}"
        return [Finding("missing E0", "error", text, (), "Add one frame of one atom for each")]
    if not bound:
        return []
    fit = reference_energies([f for f in sets.train if not is_isolated_atom(f)] or bound, species)
    if missing:
        text = "there are no isolated atoms: E0 will come from least squares"
        if known:
            text = f"there are no isolated atoms of {missing}: the others are left out, and E0 come from least squares"
        if fit.rank is not None and fit.rank < len(species):
            text += f", and the compositions determine {fit.rank} of {len(species)}"
        advice = "Compute one atom of each element at the same level, if you can"
        return [Finding("E0", "warning" if known else "note", text, (), advice)]
    try:
        values = energies_of_isolated_atoms(lonely, names=None)
    except DataError as error:
        return [Finding("contradictory E0", "error", str(error), (), "Keep the energy of the lowest state of each")]
    per_atom = np.array([(f.energy - sum(values[z] for z in f.atoms.numbers.tolist())) / len(f.atoms) for f in bound])
    middle = float(np.median(per_atom))
    if -15 < middle < 0.5:
        return []
    text = f"with the isolated atoms given, half of the frames are bound by more than {-middle:.1f} eV/atom"
    if middle > 0:
        text = (
            f"with the isolated atoms given, half of the frames lie more than {middle:.1f} eV/atom above separate atoms"
        )
    advice = "Are atoms and frames of one level of theory, with the same pseudopotentials and units?"
    return [Finding("absurd E0", "error" if not -15 < middle < 5 else "warning", text, (), advice)]


def find_unseen_elements(sets: Sets) -> list[Finding]:
    if not sets.train:
        return []
    known, findings = {*species_of(sets.train), *sets.known}, []
    for name in ("validation", "test"):
        frames = [f for f in (sets.valid if name == "validation" else sets.test) if set(f.atoms.numbers) - known]
        if frames:
            extra = ", ".join(chemical_symbols[z] for z in species_of(frames) if z not in known)
            text = f"the {name} set has {extra}, which no training frame has"
            findings.append(Finding("unseen elements", "error", text, tuple(f.source for f in frames)))
    return findings


def find_copies(sets: Sets) -> list[Finding]:
    """Structures that occur twice or nearly so, within a set and across sets, and splits that cut trajectories."""
    described, around = {}, iter(sets.around)
    for name, frames in (("training", sets.train), ("validation", sets.valid), ("test", sets.test)):
        prints = [next(around).fingerprint for _ in frames]
        told = [told_inputs(f) for f in frames]
        described[name] = frames, Described([f.atoms for f in frames], prints, energies_per_atom(frames), told)
    findings = [f for name, (frames, own) in described.items() for f in copies_within(name, frames, matches(own, own))]
    for name in ("validation", "test"):
        frames, own = described[name]
        found = matches(own, described["training"][1])
        findings += copies_across(name, frames, found) + interleaved(name, found)
    if not sets.valid:
        findings += alike_in_sequence(sets.train)
    return findings


def copies_within(name: str, frames: list[Frame], found: list[Match]) -> list[Finding]:
    findings = []
    exact = [m for m in found if m.kind == "exact"]
    differ, much = (
        {n for m in exact if not same_labels(frames[m.first], frames[m.second], slack) for n in (m.first, m.second)}
        for slack in (1.0, MUCH)
    )
    same = {n for m in exact if m.first not in differ for n in superfluous(frames, m)} - differ
    if same:
        text = f"{len(same)} frames of the {name} set repeat another one"
        findings.append(Finding("duplicates", "warning", text, numbered(frames, same), "Drop them", ("drop",)))
    if much:
        text = f"{len(much)} frames of the {name} set are the same structures with different labels"
        advice = "Two levels of theory, forces of another sign or orientation, or no convergence? Keep the right one"
        findings.append(Finding("contradiction", "error", text, numbered(frames, much), advice))
    if slightly := differ - much:
        text = f"{len(slightly)} frames of the {name} set are the same structures with slightly different labels"
        advice = "Other settings, or a state that positions do not tell, such as spins? A potential learns the mean"
        findings.append(Finding("contradiction", "warning", text, numbered(frames, slightly), advice))
    for kind, words in (
        ("symmetry", "equal another in energy and distances: copies by symmetry or another order of atoms"),
        ("near", f"lie within {NEAR} Å (rms of the components) of another"),
    ):
        chosen = {max(m.first, m.second) for m in found if m.kind == kind}
        if chosen:
            severity = "warning" if len(chosen) > 0.3 * len(frames) else "note"
            text = f"{len(chosen)} of {len(frames)} frames of the {name} set {words}"
            findings.append(Finding(f"{kind} copies", severity, text, numbered(frames, chosen)))
    return findings


def copies_across(name: str, frames: list[Frame], found: list[Match]) -> list[Finding]:
    """Frames of validation and test that are in the training set, or nearly."""
    findings = []
    for kind, words, limit, advice in (
        ("exact", "are in the training set", 0.2, "Take them out of one of the two"),
        ("symmetry", "are copies of training frames by symmetry or order", 0.3, "Take them out of one of the two"),
        (
            "near",
            f"lie within {NEAR} Å (rms of the components) of a training frame",
            1.0,
            "Split a trajectory into blocks, not at random",
        ),
    ):
        chosen = {m.first for m in found if m.kind == kind}
        if chosen:
            # a training does not touch the frames for tests
            severity = "error" if name != "test" and len(chosen) > limit * len(frames) else "warning"
            text = f"{len(chosen)} of {len(frames)} {name} frames {words}: errors on them say nothing of new structures"
            findings.append(Finding(f"{kind} copies across sets", severity, text, numbered(frames, chosen), advice))
    return findings


def interleaved(name: str, found: list[Match]) -> list[Finding]:
    """Frames that lie between training frames of one trajectory: close to one each, in the same order."""
    found = sorted(m for m in found if m.typical > 0)
    if len(found) < 8:  # fewer are in order by chance
        return []
    steps = np.diff([m.second for m in found])
    close = np.median([m.distance / m.typical for m in found])
    if (steps >= 0).mean() < 0.9 or (steps > 0).mean() < 0.5 or close > 0.8:
        return []
    text = f"the {name} frames lie between training frames of one trajectory, in the same order"
    advice = "Take a block of the trajectory for each set: the errors will be honest"
    return [Finding("interleaved split", "warning", text, (), advice)]


def alike_in_sequence(frames: list[Frame]) -> list[Finding]:
    """Trajectories whose consecutive frames are alike: a random split would test on what was learnt by heart."""
    alike = sum(len(members) for members in trajectories([f.atoms for f in frames]))
    if alike <= 0.5 * len(frames):
        return []
    text = f"{alike} of {len(frames)} frames are of trajectories whose consecutive frames are alike"
    advice = "A training draws blocks of them for validation; best is a set of its own, the last part of each"
    return [Finding("trajectory", "note", text, (), advice)]


def same_labels(a: Frame, b: Frame, slack: float = 1.0) -> bool:
    """Labels that both of two copies have agree to `TOLERANCES`, times the slack, turned as the structures are.

    Energies and forces may differ by what the structures do, too.
    """
    turn, (energy, forces, stress) = turn_onto(a.atoms, b.atoms), (slack * value for value in TOLERANCES)
    moved = displacement(a.atoms, b.atoms) * np.sqrt(3 * len(a.atoms))  # all atoms together
    if a.forces is not None and b.forces is not None:
        energy += moved * np.linalg.norm(np.nan_to_num(a.forces)) / len(a.atoms)
        apart = np.abs(a.forces - b.forces @ turn)  # NaN where one of them was cut
        if (apart > forces + STIFF * moved + 1e-5 * np.abs(a.forces)).any():
            return False
    if a.energy is not None and b.energy is not None and abs(a.energy - b.energy) > energy * len(a.atoms):
        return False
    return a.stress is None or b.stress is None or np.allclose(a.stress, turn.T @ b.stress @ turn, atol=stress)


def superfluous(frames: list[Frame], match: Match) -> set[int]:
    """Which of two copies that agree tells nothing more: the one with fewer labels, or the later one."""
    labels = {n: {k for k in LABELS if getattr(frames[n], k) is not None} for n in (match.first, match.second)}
    kept, other = sorted(labels, key=lambda n: (-len(labels[n]), n))
    return {other} if labels[other] <= labels[kept] else set()


def find_stale_labels(sets: Sets) -> list[Finding]:
    """Energies or forces that are equal to the digit although the atoms have moved: those of another structure."""
    findings, frames = [], sets.all
    groups = groups_of([f.atoms for f in frames]).values()
    for kind in ("energy", "forces"):
        stale = {n for group in groups for n in stale_in(group, frames, sets.around, kind)}
        if stale:
            text = f"{len(stale)} frames have {kind} equal to the digit to those of others, though atoms have moved"
            advice = (
                "Labels of another structure, left in the file under other names (REF_energy, ...)? Name the right "
            )
            advice += f"ones with --{kind}-key, or write the file without the old ones"
            findings.append(Finding("stale labels", "error", text, numbered(frames, stale), advice))
    return findings


def stale_in(group: list[int], frames: list[Frame], around, kind: str) -> set[int]:
    """Those of frames of one composition that share a label, if it is no coincidence of rounded numbers."""
    values: dict[bytes, list[int]] = {}
    for n in group:
        label = getattr(frames[n], kind)
        if label is not None and (kind == "energy" or np.nan_to_num(label).any()):
            values.setdefault(np.asarray(label).tobytes(), []).append(n)
    usual = _usual_company([frames[n].energy for its in values.values() for n in its]) if kind == "energy" else 0.0
    found: set[int] = set()
    for first, *others in values.values():
        moved = [n for n in others if _has_moved(around[first].fingerprint, around[n].fingerprint)]
        expected = len(group) * usual ** len(moved) / math.factorial(min(len(moved), 20))
        if len(moved) + 1 >= STALE and (len(values) == 1 or expected < COINCIDENCE):
            found |= {first, *moved}
    return found


def _usual_company(energies: list[float]) -> float:
    """How many others have the same rounded energy as a frame, by chance, if they are normally distributed."""
    e = np.array(energies)
    if len(e) < 2 or e.std() == 0.0:
        return 0.0
    digits = next((k for k in range(12) if np.allclose(e, np.round(e, k), rtol=0, atol=10.0 ** -(k + 4))), 12)
    step = 10.0**-digits
    if (np.abs(e - e.astype(np.float32)) <= step).all():  # these were numbers of single precision before
        step = max(step, float(np.spacing(np.float32(np.abs(e).max()))))
    return len(e) * step / (2.0 * math.sqrt(math.pi) * float(e.std()))


def _has_moved(before: np.ndarray, after: np.ndarray) -> bool:
    return bool(np.sqrt(np.mean((before - after) ** 2)) > SAME) if len(before) else False


OF_SETS = (
    find_stale_labels,
    find_lone_elements,
    find_mixed_periodicity,
    find_coarse_energies,
    find_reference_problems,
    find_unseen_elements,
    find_copies,
)
OF_DIGITS = (find_stale_labels, find_coarse_energies)  # of labels as files have them
