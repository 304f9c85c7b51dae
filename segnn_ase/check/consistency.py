"""Whether energies, forces and stress belong together: signs, units, order of components, levels of theory.

The surrogate fitted to the forces says what energies and stress to expect; strained copies of one structure say what
the stress is, from energies alone.
"""

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np
from ase.units import Bohr, GPa, Hartree, Rydberg, kcal, kJ, mol
from scipy.stats import t

from segnn_ase.check.findings import Finding, sources_of
from segnn_ase.check.linear_model import (
    Equations,
    Features,
    Fit,
    apply_folds,
    equations_of,
    fit_folds,
    with_energies,
    without_forces,
)
from segnn_ase.check.matching import groups_of
from segnn_ase.check.strained_series import strained_pairs, stress_offset
from segnn_ase.check.surroundings import ordinary
from segnn_ase.data.frames import Frame, species_of
from segnn_ase.structure.told import Told

FORCE_FACTORS = {  # forces over forces in the units of the energies
    "forces in kcal/mol/Å, energies in eV": mol / kcal,
    "forces in kJ/mol/Å, energies in eV": mol / kJ,
    "forces in eV/Å, energies in kcal/mol": kcal / mol,
    "forces in eV/Å, energies in kJ/mol": kJ / mol,
    "forces in eV/Å, energies in Hartree": Hartree,
    "forces in eV/Å, energies in Rydberg": Rydberg,
    "forces in Hartree/Bohr, energies in eV": Bohr / Hartree,
    "forces in Rydberg/Bohr, energies in eV": Bohr / Rydberg,
    "forces in Hartree/Å, energies in eV": 1 / Hartree,
    "forces per Bohr, positions in Å": Bohr,
    "forces per Å, positions in Bohr": 1 / Bohr,
}
STRESS_FACTORS = {"GPa": 1 / GPa, "kbar": 10 / GPa, "bar": 1e4 / GPa, "eV/Å^3": 1.0}
VOIGT = [0, 4, 8, 5, 2, 1]
LEAST_FRAMES = 8
STATE = {
    "charge": 0,
    "spin": 1,
}  # in atoms.info, which energies may depend on, and what they are where they are missing
MANY_FRAMES = 40  # of fewer, crystals and melts among them, some seem to have forces per Bohr
MOST_SPECIES = 12
MOST_NUMBERS = 120_000_000  # features kept; of larger sets every second, third, ... frame is judged
TRUSTED = 0.25  # part of the forces that the surrogate must explain before it is believed; of sound ones over 0.85
LEADS = ((0.01, 0.1), (1.0, 1.0))  # weights of the energies when groups are looked for: see `two_groups`
FULL_WEIGHT = 10.0  # of energies: more leaves the forces no say
LEFT = 0.6  # part of the distance of two levels; measured 0.7 to 1.1 of levels, below 0.45 of crystals and melts
OFFSET = (0.1, 1e-4)  # GPa, and the probability to find as much by chance


class Judged(NamedTuple):
    """Frames with the surrogate fitted to them."""

    frames: list[Frame]
    equations: Equations
    factor: float  # what forces are divided by to agree with the energies
    fit: Fit  # to energies and forces
    forces_only: Fit
    explained: tuple[float, float]  # parts of energies and of forces in `fit`
    explained_alone: float  # part of the forces in `forces_only`


def judgeable(frames: list[Frame]) -> list[int]:
    """The frames to fit the surrogate to; none where it is too little, or more elements than it can tell apart."""
    chosen = [n for n, f in enumerate(frames) if len(f.atoms) > 1 and not (f.forces is None and f.energy is None)]
    with_forces = sum(frames[n].forces is not None for n in chosen)
    if with_forces < LEAST_FRAMES or len(species_of([frames[n] for n in chosen])) > MOST_SPECIES:
        return []
    numbers = 3 * 250 * sum(len(frames[n].atoms) for n in chosen)
    return chosen[:: -(-numbers // MOST_NUMBERS)]


def judge(frames: list[Frame], features: Features, shortest: list[float]) -> Judged:
    """Fit the surrogate to frames with these features, to the ordinary ones alone where it makes nothing of all;
    shortest: see `Surroundings`."""
    judged, usual = judge_all(frames, features), ordinary([f.atoms for f in frames], shortest)
    sound = judged.factor == 1.0 and judged.explained_alone > TRUSTED
    if sound or usual.all() or not judgeable(kept := [f for f, yes in zip(frames, usual, strict=True) if yes]):
        return judged
    forces = [one for one, yes in zip(features.forces, usual, strict=True) if yes]
    return judge_all(kept, Features(features.energy[usual], forces, features.stress[usual]))


def judge_all(frames: list[Frame], features: Features) -> Judged:
    energies = np.array([np.nan if f.energy is None else f.energy for f in frames])
    q = equations_of(features, [f.atoms for f in frames], energies, [f.forces for f in frames], species_of(frames))
    factor = best_factor(q)
    alone, explained_alone = fit_folds(q, energies=0.0)
    both, explained = fit_folds(q, factor=factor)
    fits = apply_folds(q, both), apply_folds(q, alone)
    return Judged(frames, q, factor, *fits, tuple(explained), float(explained_alone[1]))


def best_factor(equations: Equations) -> float:
    """What the forces are to be divided by to be minus the gradient of the energies.

    1, unless with another factor one potential explains energies and forces far better: the product of what is left
    unexplained of both is less than half of that for 1. Few frames say too little of factors near 1.
    """
    known = np.isfinite(equations.energies).sum()
    if known < 10:
        return 1.0

    def left(factor: float) -> float:
        return float(np.prod(np.maximum(1 - fit_folds(equations, factor=factor)[1], 1e-6)))

    grid = [sign * size for sign in (1.0, -1.0) for size in np.geomspace(1 / 128, 128, 57)]
    best = min(grid, key=left)
    clear = left(best) < 0.5 * left(1.0) and fit_folds(equations, factor=best)[1].min() > 0.4
    near = (0.6, 1.7) if known >= MANY_FRAMES else (1 / 3, 3)
    return best if clear and not near[0] < best < near[1] else 1.0


def find_unrelated_forces(judged: Judged) -> list[Finding]:
    """Forces that no field of the positions gives."""
    values = sum(np.isfinite(f.forces).sum() for f in judged.frames if f.forces is not None)
    rms = np.sqrt(judged.equations.square[1].sum() / values)
    if rms < 1e-3 or values < 10 * judged.equations.projected.shape[1] or judged.explained_alone > TRUSTED:
        return []
    text = (
        f"a simple potential explains {100 * max(judged.explained_alone, 0):.0f} % of the forces (of sound ones more "
    )
    text += "than 80 %): they do not belong to the positions"
    return [Finding("unrelated forces", "error", text, (), "Shuffled among atoms or frames? Write the file again")]


def find_odd_forces(judged: Judged) -> list[Finding]:
    """Frames whose forces the others do not let one expect."""
    known = {n: f.forces for n, f in enumerate(judged.frames) if f.forces is not None}
    if judged.explained_alone < TRUSTED:
        return []
    own = np.array([_rms(forces) for forces in known.values()])
    size = _rms(np.concatenate([forces.ravel() for forces in known.values()]))
    predicted = judged.forces_only.forces
    for _ in range(2):  # wrong forces make a fit wrong for others too: so again without what looks odd
        missed = np.array([_rms(predicted[n] - forces.ravel()) for n, forces in known.items()])
        middle = np.median(missed)
        chosen = missed > max(0.5 * size, 6 * middle)
        chosen |= missed > np.maximum(0.9 * own, max(0.4 * size, 3 * middle))
        if not chosen.any() or chosen.mean() > 0.3:
            return []
        odd = {n: forces for (n, forces), yes in zip(known.items(), chosen, strict=True) if yes}
        clean = without_forces(judged.equations, odd)
        predicted = apply_folds(clean, fit_folds(clean, energies=0.0)[0]).forces
    text = f"the forces of {len(odd)} frames are not what the other frames let one expect"
    zero = not any(np.nan_to_num(forces).any() for forces in odd.values())
    text += ": they are all zero" if zero else ""
    advice = "A wrong element, another level of theory, lost or shuffled forces? Or a kind of structure that is rare"
    sources = tuple(judged.frames[n].source for n in odd)
    return [Finding("odd forces", "error" if zero else "warning", text, sources, advice)]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(values**2)))  # NaN are forces that were cut


def find_units(judged: Judged) -> list[Finding]:
    """Sign and unit of the forces against the energies."""
    size = abs(judged.factor)
    if judged.factor == 1.0 or judged.explained_alone < TRUSTED:
        return []
    if 0.6 < size < 1.7:
        text = "the forces are negated: energies rise where they point"
        return [Finding("negated forces", "error", text, (), "Multiply them by -1; are they gradients?")]
    names = [name for name, f in FORCE_FACTORS.items() if 0.7 < size / f < 1.4]
    text = f"the forces are about {size:.2g} times what the energies say"
    text += ", and of the opposite sign" if judged.factor < 0 else ""
    text += f": {' or '.join(names)}" if names else ""
    return [Finding("units of energy and forces", "error", text, (), "Convert everything to eV and Å")]


class Split(NamedTuple):
    """Energies in two groups that a constant an atom separates."""

    upper: np.ndarray  # (n,) whether a frame is of the upper group
    apart: float  # eV/atom


def find_levels(judged: Judged) -> list[Finding]:
    """Energies in two groups that a constant an atom separates.

    A fit that the forces lead sees them, but sees crystals and their melt apart, too: it integrates forces over a long
    way. Where the structures themselves tell the groups apart, a fit with energies at full weight closes that gap. It
    cannot close one between levels of theory, as a linear potential is no judge of which frame had which.
    """
    q, known = judged.equations, np.isfinite(judged.equations.energies)
    if known.sum() < 2 * LEAST_FRAMES or judged.explained_alone < TRUSTED:
        return []
    found = [split for lead in LEADS if (split := two_groups(q, judged.factor, lead))]
    if not found:
        return []
    levels = [split for split in found if part_left(q, judged.factor, split) > LEFT]
    upper, apart = (levels or found)[0]
    few = upper if 2 * upper.sum() < known.sum() else known & ~upper
    sources = sources_of(judged.frames, few)
    numbers = f"{1e3 * apart:.0f} meV/atom apart: {few.sum()} frames against {known.sum() - few.sum()}"
    if not levels:
        text = f"a potential led by the forces sees energies of two kinds, {numbers}; one led by the energies does not"
        advice = "Kinds of structures, such as a crystal and its melt: nothing to do if all are of one level of theory"
        return [Finding("energies apart", "note", text, sources, advice)]
    text = f"the energies are of two kinds, {numbers}"
    if told_apart_by_state([f.told for f in judged.frames], few, known):
        advice = "They have other charges or multiplicities: nothing to do where the potential is told (--cues charge)"
        return [Finding("energies apart", "note", text, sources, advice)]
    groups = groups_of([f.atoms for f in judged.frames]).values()
    alike = sum(few[group].sum() for group in groups if (known & ~few)[group].any())
    if 2 * alike < few.sum():  # structures of their own kind: surfaces, say
        advice = "Another level of theory, or a kind of structure that is rare? They share no composition with others"
        return [Finding("energies apart", "warning", text, sources, advice)]
    advice = (
        "Two levels of theory or settings? Compute one of them again, or leave it out. Or charges that the potential "
    )
    advice += "is not told (--cues charge)?"
    return [Finding("mixed levels", "error", text, sources, advice)]


def told_apart_by_state(told: list[Told | None], few: np.ndarray, known: np.ndarray) -> bool:
    """Whether frames of one total charge and multiplicity are all in one of the groups."""

    def state(one: Told | None) -> tuple[str, ...]:
        values = [(one or {}).get(("info", name), usual) for name, usual in STATE.items()]
        return tuple(f"{x:g}" if isinstance(x, int | float | np.number) else str(x) for x in values)

    states = [{state(told[n]) for n in np.flatnonzero(group)} for group in (few, known & ~few)]
    return not states[0] & states[1]


def two_groups(equations: Equations, factor: float, lead: tuple[float, float]) -> Split | None:
    """Groups of energies with a gap between them, if there are.

    The constant spoils the fit that is to reveal it: so groups, constant and fit are improved in turn.
    lead: weights of the energies, in the first two fits and in the others.
    """
    q, known = equations, np.isfinite(equations.energies)
    upper, rest, clean = np.zeros(len(known), bool), q.energies, q
    for step in range(6):
        coefficients = fit_folds(clean, factor=factor, energies=lead[step >= 2])[0]
        rest = q.energies - apply_folds(clean, coefficients).energy
        cut, apart, width, gap = best_cut(rest[known])
        upper = known & (rest > cut)
        clean = with_energies(q, q.energies - upper * (rest[upper].mean() - rest[known & ~upper].mean()))
    return None if apart < 5 * width or gap < 0.8 * width or gap < 1e-3 else Split(upper, apart)


def part_left(equations: Equations, factor: float, split: Split) -> float:
    """Which part of the distance of two groups a fit with energies at full weight leaves, in frames it has not seen."""
    coefficients = fit_folds(equations, factor=factor, energies=FULL_WEIGHT)[0]
    rest = equations.energies - apply_folds(equations, coefficients).energy
    lower = np.isfinite(rest) & ~split.upper
    return float(rest[split.upper].mean() - rest[lower].mean()) / split.apart


def best_cut(values: np.ndarray) -> tuple[float, float, float, float]:
    """Where to cut values into two groups, the distance of their means, their width, and the gap between them."""
    x = np.sort(values)
    n, least = len(x), max(4, len(values) // 20)
    k = np.arange(least, n - least + 1)
    total, squares = np.cumsum(x), np.cumsum(x**2)
    low, high = total[k - 1] / k, (total[-1] - total[k - 1]) / (n - k)
    width = np.sqrt(np.maximum((squares[-1] - k * low**2 - (n - k) * high**2) / n, 1e-14))
    best = int(np.argmax((high - low) / width))
    left, right = x[k[best] - 1], x[k[best]]
    return float(left + right) / 2, float(high[best] - low[best]), float(width[best]), float(right - left)


def find_stress_problems(judged: Judged) -> list[Finding]:
    """Sign, unit and order of components of the stress."""
    known = [n for n, f in enumerate(judged.frames) if f.stress is not None]
    if judged.factor != 1.0 or judged.explained_alone < TRUSTED or len(known) < LEAST_FRAMES:
        return []
    label = np.array([judged.frames[n].stress for n in known]).reshape(-1, 9)[:, VOIGT]
    fitted = judged.fit.stress[known].reshape(-1, 9)[:, VOIGT]
    y, x = (values - values.mean(0) * (np.arange(6) < 3) for values in (label, fitted))
    strained = strained_pairs(judged.frames)
    if len(strained) >= 10:  # the energies themselves: better than a fit
        ratio, agreement = _ratio(strained[:, 0], strained[:, 1])
        source = f"{len(strained)} pairs of strained structures"
    else:
        ratio, agreement = _ratio(x.ravel(), y.ravel())
        source = "a potential fitted to energies and forces"
    findings = stress_scale(ratio, agreement, source)
    return findings or [*shear_order(x[:, 3:], y[:, 3:]), *find_offset(judged.frames)]


def find_offset(frames: list[Frame]) -> list[Finding]:
    """A constant pressure between the stress and the energies of strained structures."""
    found = stress_offset(frames)
    if found is None:
        return []
    chance = t.isf(OFFSET[1] / 2, found.freedom) * found.error
    if abs(found.pressure) < max(OFFSET[0] * GPa, chance + 2 * found.doubt):
        return []
    pressure, error = found.pressure / GPa, max(math.hypot(found.error, found.doubt) / GPa, 0.005)
    where = "above" if pressure > 0 else "below"
    text = f"the diagonal of the stress is {abs(pressure):.2f} ± {error:.2f} GPa {where} what the energies of "
    text += f"{len(found.frames)} strained structures in {found.series} series give"
    used = np.isin(np.arange(len(frames)), found.frames)
    advice = "A basis of plane waves too small for changing cells does that (Pulay stress), or energies without the "
    advice += "smearing's entropy. At once: train without the stress (--stress-weight 0), or on the frames that "
    advice += (
        "`segnn check --fix` writes, which subtracts this much from each. Better: more plane waves, and the energy "
    )
    advice += "that the stress belongs to"
    repair = ("shift stress", -found.pressure)
    return [Finding("offset of stress", "warning", text, sources_of(frames, used), advice, repair)]


def _ratio(expected: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """How many times larger the given values are, with the sign of the correlation, and the correlation."""
    a, b = np.sqrt((expected**2).sum()), np.sqrt((given**2).sum())
    if a == 0 or b == 0:
        return 1.0, 0.0
    agreement = float((expected * given).sum() / (a * b))
    return float(np.copysign(b / a, agreement)), agreement


def stress_scale(ratio: float, agreement: float, source: str) -> list[Finding]:
    """A finding when the stress given is not about once that expected."""
    size = abs(ratio)
    if abs(agreement) < 0.5 or 0.25 < ratio < 4:
        return []
    unit = min(STRESS_FACTORS, key=lambda name: abs(np.log(size / STRESS_FACTORS[name])))
    known = abs(np.log(size / STRESS_FACTORS[unit])) < np.log(3)
    words = ["has the sign opposite to ASE's (positive is tension)"] if ratio < 0 else []
    if not known:
        words.append(f"is {size:.3g} times too large: perhaps a virial in eV")
    elif unit != "eV/Å^3":
        words.append(f"is in {unit}")
    text = f"the stress {' and '.join(words)}; it is {ratio:.3g} times what {source} give"
    scale = float(np.sign(ratio)) / STRESS_FACTORS[unit]
    sure = known and abs(agreement) > 0.8
    code = "sign of stress" if known and unit == "eV/Å^3" else "units of stress"
    advice = f"Multiply it by {scale:.6g}" if known else "Convert it to eV/Å^3"
    return [Finding(code, "error", text, (), advice, ("scale stress", scale) if sure else ())]


def shear_order(x: np.ndarray, y: np.ndarray) -> list[Finding]:
    """Do the shears, (n, 3) each, come in another order than yz xz xy?"""
    scale = np.sqrt((x**2).sum(0)[:, None] * (y**2).sum(0))
    if not scale.all():
        return []
    table = x.T @ y / scale
    orders = {order: np.mean([table[k, order[k]] for k in range(3)]) for order in permutations(range(3))}
    best = max(orders, key=orders.get)
    if orders[best] < 0.6 or orders[best] < orders[0, 1, 2] + 0.3:
        return []
    given = " ".join(("yz", "xz", "xy")[best.index(k)] for k in range(3))
    text = f"the shears come as {given} instead of yz xz xy: correlation with those expected {orders[best]:.2f}"
    text += f" instead of {orders[0, 1, 2]:.2f}"
    return [Finding("order of stress", "error", text, (), "Write it in Voigt order xx yy zz yz xz xy")]


OF_FIT = (find_unrelated_forces, find_odd_forces, find_units, find_levels, find_stress_problems)
