"""Flaws of single frames: labels and distances that are out of the ordinary."""

import numpy as np
from ase.units import Bohr, GPa, Hartree

from segnn_ase.check.findings import FEW, Finding, Sets, fit_residuals, robust_score, sources_of
from segnn_ase.check.surroundings import DETACHED, distances_from, ordinary
from segnn_ase.data.frames import Frame, is_isolated_atom


def find_energy_outliers(sets: Sets) -> list[Finding]:
    seen = [
        (f, around.shortest)
        for f, around in zip(sets.all, sets.around, strict=True)
        if f.energy is not None and not is_isolated_atom(f)
    ]
    if len(seen) < 10:
        return []
    known = [f for f, _ in seen]
    usual = ordinary([f.atoms for f in known], [shortest for _, shortest in seen])
    residuals = fit_residuals(known)
    score, away = robust_score(residuals, 1e-3), np.abs(residuals - np.median(residuals))
    findings = []
    wrong = (score > 50) & (away > 5) & usual
    for severity, chosen in (("error", wrong), ("warning", (score > 20) & (away > 0.2) & ~wrong)):
        if chosen.any() and chosen.mean() < 0.1:
            text = f"{chosen.sum()} energies lie up to {away[chosen].max():.2f} eV/atom from those of the other frames"
            advice = "Look for calculations that did not converge, another level of theory or a wrong element"
            findings.append(Finding("energy outliers", severity, text, sources_of(known, chosen), advice))
    return findings


def find_force_outliers(sets: Sets) -> list[Finding]:
    known = [f for f in sets.all if f.forces is not None and len(f.atoms) > 1]
    if not known:
        return []
    largest = np.array([np.linalg.norm(np.nan_to_num(f.forces), axis=1).max() for f in known])
    rms = np.sqrt(np.nanmean(np.concatenate([f.forces for f in known]) ** 2))
    findings = []
    if rms > 8:
        text = f"the forces' rms is {rms:.1f} eV/Å, far more than in a solid or liquid"
        findings.append(Finding("large forces", "warning", text, (), "Make sure that forces are in eV/Å"))
    chosen = (largest > 30) & (largest > 10 * np.median(largest))
    if chosen.any():
        text = f"{chosen.sum()} frames have forces up to {largest.max():.0f} eV/Å; half of the frames stay below "
        text += f"{np.median(largest):.1f}"
        findings.append(Finding("force outliers", "warning", text, sources_of(known, chosen), "Drop them if unwanted"))
    return findings


def find_net_forces(sets: Sets) -> list[Finding]:
    """Forces that do not sum to zero, which no energy of positions alone can give."""
    known = [f for f in sets.all if f.forces is not None and len(f.atoms) > 1 and f.forces.any() and not f.reading.cut]
    if not known:
        return []
    rms = np.sqrt(np.mean(np.concatenate([f.forces for f in known]) ** 2))
    net = np.array([np.linalg.norm(f.forces.sum(0)) for f in known])
    per_atom = net / [len(f.atoms) for f in known]
    chosen = (net > 0.01) & (per_atom > 1e-4 * rms)
    if not chosen.any():
        return []
    severity = "warning" if (per_atom[chosen] > 0.03 * rms).any() else "note"
    text = f"forces sum to up to {net[chosen].max():.2f} eV/Å a frame ({per_atom[chosen].max():.4f} an atom) in "
    text += f"{chosen.sum()} frames; a potential's always sum to zero"
    return [Finding("net forces", severity, text, sources_of(known, chosen) if severity != "note" else ())]


def find_cut_forces(sets: Sets) -> list[Finding]:
    """Forces that constraints have set to zero: they were left out when the frames were read."""
    cut = np.array(["zeros" in f.reading.cut for f in sets.all], bool)
    named = sum("constraints" in f.reading.cut for f in sets.all)
    findings = []
    if cut.any():
        text = (
            f"{cut.sum()} frames have atoms with forces of exactly zero, and forces that do not sum to zero: left out"
        )
        advice = "Constraints set them to zero when the file was written: write them with apply_constraint=False"
        findings.append(Finding("constrained forces", "warning", text, sources_of(sets.all, cut), advice))
    if named:
        text = f"{named} frames have constraints, which cut the forces of their atoms: these are left out"
        findings.append(Finding("constrained forces", "note", text))
    return findings


def find_short_distances(sets: Sets) -> list[Finding]:
    shortest = np.array([around.shortest for around in sets.around])
    findings = []
    for severity, low, high, text in (
        ("error", -1.0, 0.1, "lie on one another"),  # collisions in radiation damage are wider
        ("warning", 0.1, 0.6, "are unusually close"),
    ):
        chosen = (shortest > low) & (shortest <= high)
        if chosen.any():
            text = f"atoms {text} in {chosen.sum()} frames: {shortest[chosen].min():.2f} of the sum of covalent radii"
            advice = "Look at these frames; are coordinates in Å?"
            findings.append(Finding("short distances", severity, text, sources_of(sets.all, chosen), advice))
    return findings


def find_detached_atoms(sets: Sets) -> list[Finding]:
    """Atoms far from all others: torn molecules, whose labels are of whole ones, and atoms that really left."""
    seen = [(f, a.detached) for f, a in zip(sets.all, sets.around, strict=True) if len(f.atoms) > 1]
    known, chosen = [f for f, _ in seen], np.array([alone.any() for _, alone in seen], bool)
    if not chosen.any():
        return []
    few = chosen.mean() < FEW
    wrong = np.array([few and is_pulled(f, alone) for f, alone in seen], bool)
    findings = []
    text = f"of {len(known)} frames have an atom without a neighbour within {DETACHED[0]:g} Å and "
    text += f"{DETACHED[1]:g} times the sum of the covalent radii"
    if wrong.any():
        advice = "Broken coordinates, or a molecule cut by a box that the file has lost? Repair or drop them"
        message = f"{wrong.sum()} {text}, and a force on it that nothing so far away can give"
        findings.append(Finding("detached atoms", "error", message, sources_of(known, wrong), advice))
    if (rest := chosen & ~wrong).any():
        severity = "warning" if chosen.mean() < 0.5 else "note"
        advice = "If that is not meant, drop them; if it is, the cutoff cannot join what is farther apart"
        findings.append(Finding("detached atoms", severity, f"{rest.sum()} {text}", sources_of(known, rest), advice))
    return findings


def is_pulled(frame: Frame, alone: np.ndarray) -> bool:
    """Is the force on a detached atom clearly larger than that between unit charges as far apart as its neighbour?"""
    for n in np.flatnonzero(alone) if frame.forces is not None else ():
        r = distances_from(frame.atoms, n).min()
        if np.linalg.norm(frame.forces[n]) > max(0.05, 1.2 * Hartree * Bohr / r**2):
            return True
    return False


def find_large_stress(sets: Sets) -> list[Finding]:
    known = [np.abs(f.stress).max() for f in sets.all if f.stress is not None]
    if known and np.median(known) > 0.6:
        half = np.median(known)
        text = f"half of the frames have a stress of more than {half:.3g} eV/Å^3 ({half / GPa:.0f} GPa)"
        return [Finding("large stress", "warning", text, (), "It may be in kbar, GPa or eV; ASE's unit is eV/Å^3")]
    return []


OF_FRAMES = (
    find_energy_outliers,
    find_force_outliers,
    find_net_forces,
    find_cut_forces,
    find_short_distances,
    find_detached_atoms,
    find_large_stress,
)
