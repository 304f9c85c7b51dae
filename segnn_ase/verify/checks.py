"""The checks of `verify`: each is a function that returns its lines, and `CHECKS` is the list of them.

Differences are judged by the size of the terms that energy, forces and stress are sums of, since rounding goes with
them: a hot melt has larger errors than a crystal at rest. Derivatives are taken in float64 by the same kind of code,
where differences of energies are sharp; float32 is then held against float64.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbor_list

from segnn_ase.base.errors import UnusedInputWarning
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.compiled.guard import ROUNDING
from segnn_ase.md.analysis import energy_slope
from segnn_ase.structure.ions import is_charged
from segnn_ase.structure.neighbors import Neighbors
from segnn_ase.verify.added import dispersion
from segnn_ase.verify.certificate import Check
from segnn_ase.verify.of_charges import attraction
from segnn_ase.verify.of_cues import cues, isolated, torque_of_cues, turned
from segnn_ase.verify.states import (
    PLAIN,
    RELATIVE,
    Sizes,
    State,
    Subject,
    code_of,
    compared,
    energies_of,
    judged,
    moved,
    state_of,
    states_of,
    without,
)
from segnn_ase.verify.trajectory import TEMPERATURE

CROSSING = 1e-7  # Å, to either side of the cutoff
AT_CUTOFF = 1e-9  # Å; such pairs are rounded to either side
STEP, ROUGH_STEP, STRAIN = 2e-4, 2e-2, 1e-4  # of finite differences: Å in float64, Å in float32, strain
FAST = {torch.float64: 1e-6, torch.float32: 1e-5}  # of compiled code, with radial functions from splines
PLAIN_PAIRS = 40_000  # plain PyTorch takes up to 0.1 MB a pair
JUMP = Sizes(1e-10, 1e-8, 1e-8)
SLOPE = {torch.float64: 1e-6, torch.float32: 1e-5}  # eV/atom/ps
BLOCKS = 10  # into which the energies of a trajectory are averaged: neighbouring ones are not independent


def _turned(s: Subject, name: str, sign: int) -> list[Check]:
    q, _ = np.linalg.qr(s.rng.normal(size=(3, 3)))
    q *= sign * np.linalg.det(q)
    expected = s.here._replace(
        forces=s.here.forces @ q.T, stress=None if s.here.stress is None else q @ s.here.stress @ q.T
    )
    return compared(name, [(state_of(s.calc, turned(s.atoms, q, s.cues)), expected)], s.tolerance)


def rotation(s: Subject) -> list[Check]:
    return _turned(s, "rotation", 1)


def reflection(s: Subject) -> list[Check]:
    return _turned(s, "reflection", -1)


def translation(s: Subject) -> list[Check]:
    found = state_of(s.calc, moved(s.atoms, np.eye(3), (3.1, -40.7, 12.3)))
    return compared("translation", [(found, s.here)], s.tolerance)


def permutation(s: Subject) -> list[Check]:
    order = s.rng.permutation(len(s.atoms))
    found = state_of(s.calc, s.atoms[order])
    return compared("permutation", [(found, s.here._replace(forces=s.here.forces[order]))], s.tolerance)


def wrapping(s: Subject) -> list[Check]:
    if not s.atoms.pbc.any():
        return [without("wrapped = unwrapped", "not periodic")]
    wrapped, far = s.atoms.copy(), s.atoms.copy()
    wrapped.wrap()
    far.positions += (s.rng.integers(-3, 4, (len(far), 3)) * far.pbc) @ far.cell.array
    return compared("wrapped = unwrapped", [(state_of(s.calc, x), s.here) for x in (wrapped, far)], s.tolerance)


def sums(s: Subject) -> list[Check]:
    """Energy of the atoms; total force, and torque of molecules (T9)."""
    forces, energies, push = s.here.forces, s.here.energies, max(1.0, s.sizes.forces)
    difference, rounding = abs(s.here.energy - energies.sum()), max(1e-10, 1e-15 * np.abs(energies).sum())
    lines = [
        judged("energy = sum over atoms", difference, rounding, "eV"),
        judged("total force", np.abs(forces.sum(axis=0)).max(), 1e-10 * push, "eV/Å"),
    ]
    if s.atoms.pbc.any():
        return [*lines, without("total torque", "not defined for a periodic structure")]
    arms = s.atoms.positions - s.atoms.positions.mean(axis=0)
    arm = max(1.0, float(np.linalg.norm(arms, axis=1).max()))
    torque = np.cross(arms, forces).sum(axis=0)
    if s.cues:
        state_of(s.calc, s.atoms)
        torque += torque_of_cues(s, s.calc.results)
    torque = np.abs(torque).max()
    return [*lines, judged("total torque", torque, RELATIVE[s.dtype].forces * 0.1 * push * arm, "eV")]


def _slope(energies: Callable[[float], np.ndarray], h: float) -> float:
    """Derivative by central differences of fourth order; atom by atom, so that large E0 do no harm."""
    return float((energies(-2 * h) - 8 * energies(-h) + 8 * energies(h) - energies(2 * h)).sum()) / (12 * h)


def _directions(s: Subject) -> list[np.ndarray]:
    """Random displacements (N, 3) of all atoms at once, of unit length for each atom, and of one along one axis."""
    n, rng, out = len(s.atoms), s.rng, []
    for _ in range(s.some(10)):
        v = rng.normal(size=(n, 3))
        one = np.zeros((n, 3))
        one[rng.integers(n), rng.integers(3)] = 1.0
        out += [v * n**0.5 / np.linalg.norm(v), one]
    return out


def _force_errors(s: Subject, calc: SEGNNCalculator, h: float) -> np.ndarray:
    """Deviations of forces from -dE/dr along `_directions`, eV/Å."""
    forces, errors = state_of(calc, s.atoms).forces, []
    for v in _directions(s):

        def energies(x: float, v=v) -> np.ndarray:
            return energies_of(calc, moved(s.atoms, np.eye(3), x * v))

        errors.append(((forces * v).sum() + _slope(energies, h)) / np.linalg.norm(v))
    return np.array(errors)


def finite_differences(s: Subject) -> list[Check]:
    note = f"{s.some(10)} random directions, {s.some(10)} single components"
    limit = max(1e-6, 1e-7 * s.sizes.forces)
    error = np.abs(_force_errors(s, s.double, STEP)).max()
    lines = [judged("forces = -dE/dr", error, limit, "eV/Å", f"float64; {note}")]
    if s.dtype is torch.float32:
        # steps so long that the energy's rounding matters little; their own error is that of the same steps in float64
        error = np.abs(_force_errors(s, s.calc, ROUGH_STEP) - _force_errors(s, s.double, ROUGH_STEP)).max()
        limit = s.tolerance.forces + 0.4 * s.tolerance.energy / len(s.atoms) ** 0.5 / ROUGH_STEP
        note = f"steps of {ROUGH_STEP} Å; limited by the rounding of energies"
        lines.append(judged("forces = -dE/dr (float32)", error, limit, "eV/Å", note))
    return lines


def finite_strain(s: Subject) -> list[Check]:
    name = "stress = dE/dstrain / V"
    if not s.atoms.pbc.all():
        return [without(name, f"not defined: periodic in {int(s.atoms.pbc.sum())} directions")]
    stress, errors, rng = state_of(s.double, s.atoms).stress, [], s.rng
    for _ in range(s.some(6)):
        strain = rng.normal(size=(3, 3))
        strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)

        def energies(x: float, strain=strain) -> np.ndarray:
            return energies_of(s.double, moved(s.atoms, np.eye(3) + x * strain))

        errors.append(abs((stress * strain).sum() - _slope(energies, STRAIN) / s.atoms.get_volume()))
    limit = max(1e-7, 1e-8 * s.sizes.stress)
    return [judged(name, max(errors), limit, "eV/Å³", f"float64; {s.some(6)} random strains")]


def _free_direction(atoms: Atoms) -> np.ndarray | None:
    """A unit vector orthogonal to all periodic ones."""
    if atoms.pbc.all():
        return None
    return np.linalg.svd(atoms.cell.array[atoms.pbc], full_matrices=True)[2][-1] if atoms.pbc.any() else np.eye(3)[0]


def _pair(s: Subject, distance: float) -> Atoms:
    """Two atoms and nothing else: each is the other's last neighbour."""
    return _cut_out(s.atoms, [0, len(s.atoms) - 1], [[0.0, 0.0, 0.0], distance * np.array([0.48, 0.6, 0.64])])


def _with_probe(s: Subject, distance: float) -> Atoms:
    """The structure and one more atom that only its outermost one can see."""
    u = _free_direction(s.atoms)
    outermost = int(np.argmax(s.atoms.positions @ u))
    return s.atoms + Atoms(s.atoms.numbers[:1], [s.atoms.positions[outermost] + distance * u])


def _scaled(s: Subject, nearest: float, distance: float) -> Atoms:
    """The whole structure scaled, so that its pairs that are `nearest` apart are `distance` apart."""
    return moved(s.atoms, np.eye(3) * distance / nearest)


def cutoff_crossings(s: Subject) -> list[Check]:
    """Jumps of energy and forces when a pair crosses the cutoff (T5)."""
    cutoff = s.parts.cutoff
    lines = _jumps(s, "cutoff, last neighbour", partial(_pair, s), cutoff)
    if _free_direction(s.atoms) is None:
        lines.append(without("cutoff, one of many", "no room for one more atom; the own pairs are many"))
    else:
        lines += _jumps(s, "cutoff, one of many", partial(_with_probe, s), cutoff)
    distances = ase_neighbor_list("d", s.atoms, 1.25 * cutoff)
    if not len(distances) or distances.max() < 0.8 * cutoff:
        return [*lines, without("cutoff, own pairs", "no pair is near it")]
    nearest = distances[np.argmin(np.abs(np.log(distances / cutoff)))]
    return lines + _jumps(s, "cutoff, own pairs", partial(_scaled, s, nearest), cutoff)


def _jumps(s: Subject, name: str, build: Callable[[float], Atoms], cutoff: float) -> list[Check]:
    """A third difference: zero where energy and forces go on evenly, the jump where they do not."""
    structures, lines = [build(cutoff + x * CROSSING) for x in (-3, -1, 1, 3)], []
    for calc in {id(c): c for c in (s.double, s.calc)}.values():
        states = [state_of(calc, atoms) for atoms in structures]
        energies, forces = (
            np.tensordot([0.5, -1.5, 1.5, -0.5], np.array([getattr(state, x) for state in states]), 1)
            for x in ("energies", "forces")
        )
        found = State(energies.sum(), energies, forces, None)
        size = np.abs(states[0].energies - s.parts.references(structures[0].numbers)).sum()
        rounding = Sizes(max(s.sizes.energy, size), *s.sizes[1:]).times(RELATIVE[torch.float32])
        exact = calc is s.double
        limits = Sizes(*np.multiply(JUMP, np.maximum(s.sizes, 10) / 10)) if exact else rounding.times(Sizes(4, 4, 4))
        label = name if exact else f"{name} (float32)"
        lines += compared(label, [(found, State(0.0, 0.0, 0.0, None))], limits, "float64" if exact else "")
    return lines


def isolated_atoms(s: Subject) -> list[Check]:
    """E = E0 and F = 0 (T6), in vacuum and in a large periodic cell."""
    box, pairs = 2.2 * s.parts.cutoff * np.eye(3), []
    for z in np.unique(s.atoms.numbers):
        zero = State(s.parts.references(np.array([z]))[0], np.zeros(1), np.zeros((1, 3)), np.zeros((3, 3)))
        lonely = [Atoms([z], [[0.3, 0.2, 0.1]]), Atoms([z], [[0.3, 0.2, 0.1]], cell=box, pbc=True)]
        lonely = isolated(lonely, s) if s.cues else lonely
        pairs += [(state_of(s.calc, atoms), zero) for atoms in lonely]
    largest = max((abs(zero.energy) for _, zero in pairs), default=0.0)
    return compared("isolated atom, E0", pairs, Sizes(max(1e-12, 1e-15 * largest), 1e-12, 1e-12))


def copies(s: Subject) -> list[Check]:
    """Twice the structure has twice the energy (T7): a supercell, or a copy far away."""
    here, u = s.here, _free_direction(s.atoms)
    if u is None:
        along = int(np.argmin(s.atoms.cell.lengths()))
        twice, note = s.atoms.repeat([1 + (k == along) for k in range(3)]), "a supercell"
    else:
        heights = s.atoms.positions @ u
        distance = np.ptp(heights) + s.parts.cutoff + 3.0
        twice, note = s.atoms + moved(s.atoms, np.eye(3), distance * u), "a copy out of sight"
    expected = State(2 * here.energy, np.tile(here.energies, 2), np.tile(here.forces, (2, 1)), here.stress)
    label = "size extensivity"
    latent = s.parts.potentials[0].config.electrostatics == "latent"
    if latent and is_charged(s.atoms, s.cues):
        return [without(label, "two have twice the charge, which the network is told")]
    found = state_of(s.calc, twice)
    if u is not None and s.parts.potentials[0].charges is not None:
        expected = expected._replace(energy=expected.energy + attraction(s, distance * u))
        found, note = found._replace(forces=None), f"{note}, which its charges attract"
    return compared(label, [(found, expected)], s.tolerance.times(Sizes(2, 1, 1)), note)


def neighbors(s: Subject) -> list[Check]:
    """All pairs, and what the model gives with those that ASE finds (T10)."""
    cutoff = s.parts.cutoff
    i, j, S = ase_neighbor_list("ijS", s.atoms, cutoff)
    theirs, ours = (set(map(tuple, np.column_stack(x).tolist())) for x in ((i, j, S), s.calc.get_pairs(s.atoms)))

    def certain(pairs: set) -> int:
        rows = np.array(sorted(pairs), dtype=int).reshape(-1, 5)
        vectors = s.atoms.positions[rows[:, 1]] - s.atoms.positions[rows[:, 0]] + rows[:, 2:] @ s.atoms.cell.array
        return int((np.abs(np.linalg.norm(vectors, axis=1) - cutoff) > AT_CUTOFF).sum())

    one_way = {pair for pair in ours if (pair[1], pair[0], *(-x for x in pair[2:])) not in ours}
    predictions = s.parts.predict(s.atoms, Neighbors(i, j, S))
    means = [np.mean([float(p.energy[0]) for p in predictions])]
    means += [np.mean([p[k].cpu().numpy() for p in predictions], axis=0) for k in (1, 2)]
    stress = np.mean([p.stress[0].cpu().numpy() for p in predictions], axis=0) if s.here.stress is not None else None
    return [
        judged("neighbours, missing or too many", certain(ours ^ theirs), 0, "pairs", f"ASE finds {len(theirs)}"),
        judged("neighbours, without reverse", certain(one_way), 0, "pairs"),
        *compared("neighbours of ASE", [(s.here, State(*means, stress))], s.tolerance),
    ]


def batches(s: Subject) -> list[Check]:
    """`evaluate` on several structures against one by one (T10)."""
    structures = [s.atoms, _rattled(s, 0.02), _pair(s, 0.5 * s.parts.cutoff), _rattled(s, 0.05)]
    single = [state_of(s.calc, atoms) for atoms in structures]
    return compared("batch = single", zip(states_of(s.calc, structures), single, strict=True), s.tolerance)


def _rattled(s: Subject, stdev: float) -> Atoms:
    atoms = s.atoms.copy()
    atoms.rattle(stdev, rng=s.rng)
    return atoms


def skin(s: Subject) -> list[Check]:
    """Atoms drift over the faces of the cell, are wrapped back, and at last the cell changes; with and without skin."""
    atoms, rng, frames = s.atoms.copy(), s.rng, []
    atoms.positions += 0.03 - atoms.positions[0]  # the first one is about to cross
    for step in range(10):
        atoms.positions += rng.normal(0.0, 0.01, (len(atoms), 3)) - 0.02
        if atoms.pbc.any() and step % 3 == 2:
            atoms.wrap()
        if step > 7:
            atoms = moved(atoms, np.eye(3) * 1.002)
        frames.append(atoms.copy())
    found = [state_of(s.calc, frame) for frame in frames]
    note = "10 steps; wrapped back, cell changed" if atoms.pbc.any() else "10 steps"
    return compared("skin = no skin", zip(found, states_of(s.calc, frames), strict=True), s.tolerance, note)


def cache(s: Subject) -> list[Check]:
    """Every change of the structure is seen by the calculator."""
    changed, frames = s.atoms.copy(), []
    others = [z for z in s.parts.potentials[0].species if z != changed.numbers[0]]
    for change in ("positions", "charges", "numbers", "cell", "pbc"):
        if change == "positions":
            changed.positions[0] += (0.02, -0.01, 0.03)
        elif change == "charges":
            charges = np.linspace(-0.1, 0.1, len(changed))
            changed.set_initial_charges(charges - charges.mean())
        elif change == "numbers" and others:
            changed.numbers[0] = others[0]
        elif change == "cell" and changed.pbc.any():
            changed.set_cell(changed.cell.array * 1.01)
        elif change == "pbc" and changed.pbc.any():
            changed.pbc = False
        frames.append(changed.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedInputWarning)  # of the charges above
        found = [state_of(s.calc, frame) for frame in frames]
        return compared("stale cache", zip(found, states_of(s.calc, frames), strict=True), s.tolerance)


def fast_path(s: Subject) -> list[Check]:
    """Compiled code against plain PyTorch (T16), on the whole structure, after the calculator has made up its mind."""
    if code_of(s.calc) == PLAIN:
        return [without("fast = slow", f"{PLAIN} is in use")]
    n_pairs = len(s.calc.get_pairs(s.atoms).i)
    atoms = s.atoms if n_pairs <= PLAIN_PAIRS else _nearest_as_molecule(s.atoms, len(s.atoms) * PLAIN_PAIRS // n_pairs)
    slow = state_of(s.make(accelerate="off"), atoms)
    exact = slow if s.dtype is torch.float64 else state_of(s.make(accelerate="off", dtype="float64"), atoms)
    usual = [ROUNDING * check.value for check in compared("", [(slow, exact)], s.tolerance)]
    limits = [FAST[s.dtype] * size for size in s.sizes]
    usual += [0.0] * (len(limits) - len(usual))
    note = "" if atoms is s.atoms else f"on {len(atoms)} of the atoms: plain PyTorch takes too much memory"
    return compared("fast = slow", [(state_of(s.calc, atoms), exact)], Sizes(*map(max, limits, usual)), note)


def _nearest_as_molecule(atoms: Atoms, n: int) -> Atoms:
    """The atoms nearest to the first one, as a molecule."""
    order = np.argsort(np.linalg.norm(atoms.positions - atoms.positions[0], axis=1), kind="stable")[:n]
    return _cut_out(atoms, order, atoms.positions[order])


def _cut_out(atoms: Atoms, chosen, positions) -> Atoms:
    """Some of the atoms, as a molecule at these positions."""
    part = atoms[chosen]
    part.set_cell(None)
    part.pbc = False
    part.positions = positions
    return part


def precision(s: Subject) -> list[Check]:
    single = s.calc if s.dtype is torch.float32 else s.make(dtype="float32")
    pair = (state_of(single, s.atoms), state_of(s.double, s.atoms))
    return compared("float32 = float64", [pair], s.sizes.times(RELATIVE[torch.float32]))


def constant_energy(s: Subject) -> list[Check]:
    """Velocity Verlet (T14). What oscillates with the square of the time step is known and taken off."""
    run, n = s.run, len(s.atoms)
    names = ("NVE, slope of the energy", "NVE, fluctuation")
    if run.problem:
        return [Check(name, None, None, "", False, f"the trajectory ended: {run.problem}") for name in names]
    times, energy = run.timestep * np.arange(len(run.shadow)), run.shadow / n
    blocks = [np.array([block.mean() for block in np.array_split(x, BLOCKS)]) for x in (times, energy)]
    slope = energy_slope(*blocks)
    (_, _), covariance = np.polyfit(blocks[0] / 1000, blocks[1] - blocks[1][0], 1, cov=True)
    ps = len(energy) * run.timestep / 1000
    note = f"{len(energy)} steps of {run.timestep:.2g} fs from {TEMPERATURE:.0f} K, mean {run.temperature.mean():.0f} K"
    raw = (run.energy - run.energy.mean()).std() / n
    # a window this short cannot tell a slope from its own error, nor from a hundredth of the fluctuation
    limit = SLOPE[s.dtype] + 5 * math.sqrt(covariance[0, 0]) + 0.01 * raw / ps
    noise = 0.3 * s.tolerance.energy / n**1.5
    return [
        judged(names[0], abs(slope), limit, "eV/atom/ps", f"{note}; its error over {ps:.2g} ps allowed"),
        judged(names[1], energy.std(), 0.3 * raw + noise, "eV/atom", f"of {raw:.1e} that the time step explains"),
    ]


def memory(s: Subject) -> list[Check]:
    """Growth over the trajectory: only what grows in its second and in its third part is real."""
    held = s.run.memory
    if s.run.problem or not held.all():
        return [without("memory growth", "cannot be measured here")]
    ends = [held[len(held) // 3], held[2 * len(held) // 3], held[-1]]
    steps = len(held) / 3
    growth = max(0.0, min(np.diff(ends)) / steps / 1024)
    return [judged("memory growth", growth, max(10.0, 2048 / steps), "kB/step", f"{ends[-1] / 2**20:.0f} MB held")]


def speed(s: Subject) -> list[Check]:
    return [Check("time of a step", s.run.ms_per_step, None, "ms", None, "reported only")]


def training_data(s: Subject) -> list[Check]:
    """What is outside the domain may hold all of the above and still be wrong."""
    ways = s.outside
    if ways is None:
        return [without("training data", "the model file does not tell what it was trained on")]
    note = "; ".join(way.reason for way in ways) if ways else "the structure is inside"
    return [Check("outside the training data", float(len(ways)), None, "ways", None, note)]


CHECKS = (
    rotation,
    reflection,
    translation,
    permutation,
    wrapping,
    sums,
    finite_differences,
    finite_strain,
    cutoff_crossings,
    isolated_atoms,
    copies,
    neighbors,
    batches,
    skin,
    cache,
    fast_path,
    precision,
    constant_energy,
    memory,
    speed,
    cues,
    training_data,
    dispersion,
)
