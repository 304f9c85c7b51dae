"""What energies of strained copies of one structure say of the stress."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from segnn_ase.data.frames import Frame

STRAINS = (1e-4, 0.06)  # of pairs
MOST = 100  # structures with the same atoms that are compared, fewer large ones:
MOST_NUMBERS = 20_000_000  # of atoms in all pairs
MOVED = 0.03  # Å, rms of the components: more is another structure
SERIES = 6  # structures of a series, at least
SPAN = 0.02  # its strain, at least
STRAIGHT = 2e-3  # Å, that a cell may be beside the line
STIFFENING = 4.0  # -d ln k / d ln V of a usual solid's force constants k, taken to be right to a factor of 2


class Offset(NamedTuple):
    """By how much the diagonal of the stress exceeds what the energies give."""

    pressure: float  # eV/Å^3
    error: float  # its standard error, from the scatter
    freedom: int  # degrees of freedom behind it
    doubt: float  # of the model: of the stiffening half, of the spline's difference from the trapezoidal rule a quarter
    frames: list[int]  # that say so
    series: int  # lines that they lie on


class Group(NamedTuple):
    """Structures with the same atoms in the same order, labelled in full."""

    indices: list[int]  # into all frames
    frames: list[Frame]
    cells: np.ndarray  # (n, 3, 3) Å
    fractions: np.ndarray  # (n, N, 3) of the cells

    def moved(self, n: int, others) -> np.ndarray:
        """How far atoms of others lie elsewhere in their cell than those of n, their means alike, (..., N, 3) Å."""
        shift = self.fractions[others] - self.fractions[n]
        shift = shift - shift[..., :1, :]
        shift -= np.round(shift)
        return (shift - shift.mean(-2, keepdims=True)) @ ((self.cells[n] + self.cells[others]) / 2)

    def near(self, n: int) -> np.ndarray:
        """Whether each structure is like n but for its cell, (n,)."""
        return (self.moved(n, np.arange(len(self.cells))) ** 2).mean((1, 2)) < MOVED**2


def groups(frames: list[Frame]) -> list[Group]:
    """Of many with the same atoms those with the smallest forces, as strained crystals have; none where cells agree."""
    members: dict[tuple, list[int]] = {}
    for n, f in enumerate(frames):
        if not (f.stress is None or f.energy is None or f.forces is None or f.reading.cut):
            members.setdefault((f.atoms.numbers.tobytes(), *f.atoms.pbc), []).append(n)
    found = []
    for indices in members.values():
        most = min(MOST, int((MOST_NUMBERS / len(frames[indices[0]].atoms)) ** 0.5))
        indices = sorted(indices, key=lambda n: round(float(np.sqrt((frames[n].forces ** 2).mean())), 3))[:most]
        atoms = [frames[n].atoms for n in indices]
        cells = np.array([a.cell.array for a in atoms])
        if np.ptp(cells, axis=0).max() > STRAIGHT:
            fractions = np.array([a.cell.scaled_positions(a.positions) for a in atoms])
            found.append(Group(indices, [frames[n] for n in indices], cells, fractions))
    return found


def strained_pairs(frames: list[Frame]) -> np.ndarray:
    """Energy differences that strain makes, and what the stress says they are, (n, 2) eV/atom.

    Pairs of one structure that differ by a small symmetric strain e. By the trapezoidal rule dE + F.d = V s:e with the
    means of forces and of V s, right to third order.
    """
    rows = []
    for group in groups(frames):
        for n, a in enumerate(group.frames):
            cells = (group.cells[n] + group.cells) / 2
            strains = np.linalg.solve(cells, group.cells - group.cells[n])
            size, turned = (np.abs(x).max((1, 2)) for x in (strains, strains - strains.transpose(0, 2, 1)))
            alike = group.near(n) & (size > STRAINS[0]) & (size < STRAINS[1]) & (turned < 2e-3)
            for m in np.flatnonzero(alike[n + 1 :]) + n + 1:
                b, moved = group.frames[m], group.moved(n, m)
                work = (a.atoms.cell.volume * a.stress + b.atoms.cell.volume * b.stress) / 2
                change = b.energy - a.energy + ((a.forces + b.forces) * moved).sum() / 2
                rows.append((change / len(a.atoms), (work * strains[m]).sum() / len(a.atoms)))
    return np.array(rows).reshape(-1, 2)


def stress_offset(frames: list[Frame]) -> Offset | None:
    """The pressure that the stress has beyond what the energies along series of strained structures give.

    A constant pressure too much makes the energy fall behind the work of stress and forces in proportion to the volume.
    None without such series.
    """
    lines, used = [], set()
    for group in groups(frames):
        for line in _series(group):
            volumes, *columns = _beyond(group, line)
            if np.ptp(volumes) > SPAN * volumes.mean():  # not only sheared
                lines.append(np.array([volumes, *columns]) - np.mean([volumes, *columns], axis=1)[:, None])
                used.update(group.indices[n] for n in line)
    freedom = len(used) - len(lines) - 1
    if not lines or freedom < 3:
        return None
    volumes, beyond, stiffening, curved = np.concatenate(lines, axis=1)
    slope, by_stiffening, by_curvature = (
        float(volumes @ y / (volumes @ volumes)) for y in (beyond, stiffening, curved)
    )
    scatter = float(np.sqrt(np.square(beyond - slope * volumes).sum() / freedom / (volumes @ volumes)))
    doubt = math.hypot(by_stiffening / 2, by_curvature / 4)
    return Offset(-slope, scatter, freedom, doubt, sorted(used), len(lines))


def _beyond(group: Group, line: list[int]) -> tuple[np.ndarray, ...]:
    """Along a line of cells: volumes, Å^3 per atom, and in eV/atom what the energies have beyond the work of stress and
    forces; the part of it that the stiffening of the crystal has; and the correction of the trapezoidal rule.

    dE/dt = V s : C^-1 dC/dt along the line C(t), by a cubic spline. The work of the forces is by the trapezoidal rule,
    which for E = k(t) d^2 / 2 is too small by dk d^2 / 4 of each step's d and dk.
    """
    chosen, size = [group.frames[n] for n in line], len(group.frames[0].atoms)
    cells, whole = group.cells[line], group.cells[line[-1]] - group.cells[line[0]]
    t = ((cells - cells[0]) * whole).sum((1, 2)) / (whole**2).sum()
    volumes = np.array([f.atoms.cell.volume for f in chosen])
    strains = np.linalg.solve(cells, np.broadcast_to(whole, cells.shape))
    slopes = volumes * (np.array([f.stress for f in chosen]) * strains).sum((1, 2))
    by_spline = CubicSpline(t, slopes).antiderivative()(t)
    steps = np.array([group.moved(n, m) for n, m in pairwise(line)])
    forces = np.array([f.forces for f in chosen])
    work = _sums(-((forces[1:] + forces[:-1]) / 2 * steps).sum((1, 2)))
    curvature = -(np.diff(forces, axis=0) * steps).sum((1, 2))  # k d^2
    stiffening = _sums(-STIFFENING * np.diff(np.log(volumes)) * curvature / 4)
    beyond = np.array([f.energy for f in chosen]) - by_spline - work + stiffening
    by_rule = _sums((slopes[1:] + slopes[:-1]) / 2 * np.diff(t))
    return volumes / size, beyond / size, stiffening / size, (by_spline - by_rule) / size


def _sums(steps: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(steps)])


def _series(group: Group) -> list[list[int]]:
    """Structures whose cells lie on a straight line, from one end to the other; no two have more than two in common."""
    found: list[list[int]] = []
    cells = group.cells.reshape(-1, 9)
    span = SPAN * np.cbrt([f.atoms.cell.volume for f in group.frames])
    seen = np.zeros((len(cells), len(cells)), dtype=bool)  # pairs on a line that was looked at
    for a in range(len(cells)):
        apart = cells - cells[a]
        sizes = np.linalg.norm(apart, axis=1)
        near = None
        for b in np.flatnonzero(sizes > span[a]):
            near = group.near(a) if near is None else near
            if b < a or seen[a, b] or not near[b]:
                continue
            along = apart @ apart[b] / sizes[b]
            beside = np.linalg.norm(apart - along[:, None] * apart[b] / sizes[b], axis=1)
            members = [m for m in np.argsort(along) if near[m] and beside[m] < STRAIGHT]
            seen[np.ix_(members, members)] = True
            line = [int(members[0])]
            for m in members[1:]:
                if along[m] - along[line[-1]] > STRAIGHT:
                    line.append(int(m))
            gaps = np.diff(along[line])
            apart_from_others = all(len(set(line) & set(other)) <= 2 for other in found)
            if len(line) >= SERIES and gaps.max() < 3 * np.median(gaps) and apart_from_others:
                found.append(line)
    return found
