"""The checks of cues: what must hold of charges, moments, and what else a potential is told of a structure."""

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import StructureError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.structure.cue_settings import FIELD, Cue
from segnn_ase.structure.cues import response_of
from segnn_ase.structure.ions import is_charged, net_charge
from segnn_ase.verify.certificate import Check
from segnn_ase.verify.states import Subject, compared, judged, moved, pull_on, state_of, without

STEP = 1e-3  # of the cue's scale
FIELD_STEP = 1e-2  # V/Å; of polynomials
SLOPES = 1e-6  # eV, times the scale: of finite differences


def turned(atoms: Atoms, matrix: np.ndarray, cues: tuple[Cue, ...]) -> Atoms:
    """r -> matrix r for a rotation or a reflection, with all vectors: axial ones are turned alone."""
    new = moved(atoms, matrix)
    for cue in cues:
        if cue.size == 3 and np.ndim(atoms.arrays.get(cue.name)) == 2:
            sign = np.linalg.det(matrix) if cue.kind == "axial" else 1.0
            new.arrays[cue.name] = sign * atoms.arrays[cue.name] @ matrix.T
        if cue.name == FIELD and FIELD in atoms.info:
            new.info[FIELD] = np.asarray(atoms.info[FIELD], dtype=float) @ matrix.T
    return new


def with_defaults(atoms: Atoms, cues: tuple[Cue, ...]) -> Atoms:
    """The same with what it lacks where there is a default."""
    new = atoms.copy()
    for cue in cues:
        place = new.arrays if cue.per == "node" else new.info
        if place.get(cue.name) is None and cue.default != "error":
            value = np.array(cue.default, dtype=float)
            place[cue.name] = (
                np.tile(value, (len(new), 1) if cue.size > 1 else len(new)) if cue.per == "node" else value
            )
    return new


def nothing_told(atoms: Atoms, cues: tuple[Cue, ...]) -> Atoms:
    """The same with cues that say nothing: charges and moments of zero, multiplicities of one."""
    new = atoms.copy()
    for cue in cues:
        if cue.name == FIELD:
            new.info[FIELD] = np.zeros(3)
        elif cue.per == "node":
            new.arrays[cue.name] = np.zeros((len(atoms), cue.size) if cue.size > 1 else len(atoms))
        else:
            new.info[cue.name] = float(cue.name == "spin")
    return new


def torque_of_cues(s: Subject, responses: dict) -> np.ndarray:
    """Sum of c x (-dE/dc) over vectors that turn with the atoms, eV: with that of the forces it is zero."""
    total = np.zeros(3)
    for cue in s.cues:
        field = np.asarray(s.atoms.info.get(FIELD, np.zeros(3)), dtype=float)
        if cue.name == FIELD and field.any():
            total += np.cross(field, responses["dipole"] - pull_on(s.calc, s.atoms).get("dipole", 0.0))
        if cue.size == 3 and np.ndim(s.atoms.arrays.get(cue.name)) == 2:
            name, sign = response_of(cue)
            total -= sign * np.cross(s.atoms.arrays[cue.name], responses[name]).sum(axis=0)
    return total


def cues(s: Subject) -> list[Check]:
    """Each cue: that it matters, its derivative, time reversal, and for moments the freedom of their directions."""
    return [line for cue in s.cues for line in _checks_of(s, cue)]


def _checks_of(s: Subject, cue: Cue) -> list[Check]:
    if cue.name == FIELD:
        return _of_field(s)
    lines = [*_matters(s, cue), *_derivative(s, cue)]
    if cue.time_reversal == -1:
        reversed_ = s.atoms.copy()
        reversed_.arrays[cue.name] = -reversed_.arrays[cue.name]
        lines += compared(f"{cue.name}, time reversal", [(state_of(s.calc, reversed_), s.here)], s.tolerance)
        lines += _free_directions(s, cue)
    return lines


def _of_field(s: Subject) -> list[Check]:
    """The field's conjugates by finite differences, their symmetry, and the sum rule of a neutral structure."""
    here, rng, atoms = np.asarray(s.atoms.info.get(FIELD, np.zeros(3)), dtype=float), s.rng, s.atoms.copy()
    alpha = s.double.get_property("polarizability", atoms)
    even = judged(
        "polarizability, symmetry", np.abs(alpha - alpha.T).max(), 1e-9 * max(1.0, abs(alpha).max()), "e Å²/V"
    )
    charge = net_charge(atoms, s.cues)
    if atoms.pbc.any() and is_charged(atoms, s.cues):
        return [without("dipole = -dE/dF", "a periodic ion is refused in a field"), even]
    mu, born = (s.double.get_property(name, atoms) for name in ("dipole", "born_effective_charges"))
    u, v = rng.normal(size=3), rng.normal(size=(len(atoms), 3))
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v) * len(atoms) ** 0.5

    def in_field(x: float) -> Atoms:
        new = s.atoms.copy()
        new.info[FIELD] = here + x * u
        return new

    def slope(of, h: float):
        ends = [of(k * h) for k in (-2, -1, 1, 2)]
        return (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)

    energy = slope(lambda x: s.double.get_property("energies", in_field(x)).sum(), FIELD_STEP)
    dipole = slope(lambda x: s.double.get_property("dipole", in_field(x)), FIELD_STEP)
    force = slope(lambda x: s.double.get_property("forces", in_field(x)), FIELD_STEP)
    moving = slope(lambda x: s.double.get_property("dipole", moved(s.atoms, np.eye(3), x * v)), 2e-4)
    note = "float64; one direction"
    scale = max(1.0, float(np.abs(born).max()))
    free = born.sum(axis=0) - charge * np.eye(3)
    return [
        judged("dipole = -dE/dF", abs(u @ mu + energy), 1e-6 * max(1.0, float(np.abs(mu).max())), "e Å", note),
        judged(
            "polarizability = dmu/dF", np.abs(alpha @ u - dipole).max(), 1e-6 * max(1.0, abs(alpha).max()), "e Å²/V"
        ),
        even,
        judged(
            "Born charges = dforces/dF", np.abs(np.einsum("i,nij->nj", u, born) - force).max(), 1e-6 * scale, "e", note
        ),
        judged(
            "Born charges = dmu/dr", np.abs(np.einsum("nij,nj->i", born, v) - moving).max(), 1e-5 * scale, "e", note
        ),
        judged("Born charges, sum", np.abs(free).max(), 1e-9 * scale * len(atoms) ** 0.5, "e"),
    ]


def _must_be_neutral(s: Subject, cue: Cue) -> bool:
    """Whether the structure is a slab whose charges the potential sums up, and the cue is their sum."""
    kind = s.parts.potentials[0].config.electrostatics
    summed = {"latent": ("charge", "initial_charges"), "given": ("initial_charges",)}.get(kind, ())
    return sum(s.atoms.pbc) == 2 and cue.name in summed


def _matters(s: Subject, cue: Cue) -> list[Check]:
    if _must_be_neutral(s, cue) and cue.per == "graph":
        return [without(f"{cue.name} matters", "a charged slab is refused")]
    changed = s.atoms.copy()
    if cue.per == "node":
        changed.arrays[cue.name] = _stretched(s, cue)
    else:
        changed.info[cue.name] = float(changed.info[cue.name]) + 2
    difference = abs(state_of(s.calc, changed).energy - s.here.energy)
    return [Check(f"{cue.name} matters", difference, None, "eV", bool(difference > 0), "energy of another one")]


def _stretched(s: Subject, cue: Cue) -> np.ndarray:
    here = s.atoms.arrays[cue.name]
    changed = 1.2 * here if here.any() else np.full_like(here, cue.scale, dtype=float)
    if _must_be_neutral(s, cue):
        changed = here + cue.scale * (-1.0) ** np.arange(len(here))
        changed -= changed.mean()
    return changed


def _derivative(s: Subject, cue: Cue) -> list[Check]:
    name, sign = response_of(cue)
    if cue.per == "graph":
        return [without(name, "an integer has no small steps")]
    here = np.asarray(s.atoms.arrays[cue.name], dtype=float)
    v = s.rng.normal(size=here.shape)
    v -= v.mean(axis=0) * _must_be_neutral(s, cue)
    v *= cue.scale / np.linalg.norm(v) * len(s.atoms) ** 0.5

    def energy(x: float, calc: SEGNNCalculator = s.double) -> float:
        atoms = s.atoms.copy()
        atoms.arrays[cue.name] = here + x * v
        atoms.calc = calc
        return float(atoms.get_potential_energies().sum() - reference)

    reference = float(s.parts.references(s.atoms.numbers).sum())
    slope = (energy(-2 * STEP) - 8 * energy(-STEP) + 8 * energy(STEP) - energy(2 * STEP)) / (12 * STEP)
    atoms = s.atoms.copy()
    found = s.double.get_property(name, atoms)
    error = abs(sign * float(np.sum(found * v)) - slope) / len(s.atoms) ** 0.5
    lines = [
        judged(f"{name} = dE/d{cue.name}", error, SLOPES * max(1.0, s.sizes.forces), "eV", "float64; one direction")
    ]
    if cue.kind == "axial":
        none = nothing_told(s.atoms, (cue,))
        largest = float(np.abs(s.double.get_property(name, none)).max())
        lines.append(judged(f"{name} without moments", largest, 1e-12 * max(1.0, s.sizes.forces), "eV/μB"))
    return lines


def _free_directions(s: Subject, cue: Cue) -> list[Check]:
    """Moments turned alone: nothing changes without spin-orbit interaction."""
    name, here = f"{cue.name} turned alone", np.asarray(s.atoms.arrays[cue.name], dtype=float)
    if here.ndim == 1:
        return [without(name, "the moments are along no axis in particular")]
    q, _ = np.linalg.qr(s.rng.normal(size=(3, 3)))
    alone = s.atoms.copy()
    alone.arrays[cue.name] = here @ (q * np.linalg.det(q)).T
    if cue.spin_orbit:
        change = abs(state_of(s.calc, alone).energy - s.here.energy)
        return [Check(name, change, None, "eV", None, "coupled to space: its energy may change")]
    return compared(name, [(state_of(s.calc, alone), s.here)], s.tolerance)


def isolated(atoms: list[Atoms], s: Subject) -> list[Atoms]:
    """Of lonely atoms those that may have a multiplicity of one, with cues that say nothing."""
    found = []
    for one in (nothing_told(a, s.cues) for a in atoms):
        try:
            state_of(s.calc, one)
        except StructureError:  # an odd number of electrons
            continue
        found.append(one)
    return found
