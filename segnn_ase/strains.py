"""What energies of strained copies of one structure say of the stress."""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from segnn_ase.data import Frame

STRAINS = (1e-4, 0.06)  # of pairs
MOST = 100  # structures with the same atoms that are compared
MOVED = 0.03  # Å, rms of the components: more is another structure
SERIES = 5  # structures of a series, at least
SPAN = 0.02  # its strain, at least
STRAIGHT = 2e-3  # Å, that a cell may be beside the line


class Offset(NamedTuple):
    """By how much the diagonal of the stress exceeds what the energies give."""

    pressure: float  # eV/Å^3
    error: float  # standard error
    frames: list[int]  # that say so
    series: int  # lines that they lie on


class Group(NamedTuple):
    """Structures with the same atoms in the same order, labelled in full."""

    indices: list[int]  # into all frames
    frames: list[Frame]
    cells: np.ndarray  # (n, 3, 3) Å
    fractions: np.ndarray  # (n, N, 3) of the cells

    def moved(self, n: int, m: int) -> np.ndarray:
        """By how much atoms of m lie elsewhere in their cell than those of n, the means at one place, (N, 3) Å."""
        shift = self.fractions[m] - self.fractions[n]
        shift = shift - shift[0] - np.round(shift - shift[0])
        return (shift - shift.mean(0)) @ (self.cells[n] + self.cells[m]) / 2


def groups(frames: list[Frame]) -> list[Group]:
    """Of many with the same atoms those with the smallest forces, as strained crystals have."""
    members: dict[tuple, list[int]] = {}
    for n, f in enumerate(frames):
        if not (f.stress is None or f.energy is None or f.forces is None):
            members.setdefault((f.atoms.numbers.tobytes(), *f.atoms.pbc), []).append(n)
    found = []
    for indices in members.values():
        indices = sorted(indices, key=lambda n: float((frames[n].forces ** 2).mean()))[:MOST]
        atoms = [frames[n].atoms for n in indices]
        cells = np.array([a.cell.array for a in atoms])
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
        for n, m in combinations(range(len(group.frames)), 2):
            a, b = group.frames[n], group.frames[m]
            strain = np.linalg.solve((group.cells[n] + group.cells[m]) / 2, group.cells[m] - group.cells[n])
            if not STRAINS[0] < np.abs(strain).max() < STRAINS[1] or np.abs(strain - strain.T).max() > 2e-3:
                continue
            moved = group.moved(n, m)
            if (moved**2).mean() > MOVED**2:
                continue
            work = (a.atoms.cell.volume * a.stress + b.atoms.cell.volume * b.stress) / 2
            rows.append((b.energy - a.energy + ((a.forces + b.forces) * moved).sum() / 2, (work * strain).sum()))
            rows[-1] = tuple(value / len(a.atoms) for value in rows[-1])
    return np.array(rows).reshape(-1, 2)


def stress_offset(frames: list[Frame]) -> Offset | None:
    """The pressure that the stress has beyond what the energies along series of strained structures give.

    Along a straight line of cells C(t) dE/dt = V s : C^-1 dC/dt, integrated by a cubic spline. A constant pressure
    too much makes the energy fall behind its integral in proportion to the volume. None without such series.
    """
    x, y, used, lines = [], [], set(), 0
    for group in groups(frames):
        for line in _series(group):
            volumes, beyond = _beyond(group, line)
            if np.ptp(volumes) < SPAN * volumes.mean():  # sheared
                continue
            x.append(volumes - volumes.mean())
            y.append(beyond - beyond.mean())
            used.update(group.indices[n] for n in line)
            lines += 1
    if not lines:
        return None
    x, y = np.concatenate(x), np.concatenate(y)
    freedom, size = len(x) - lines - 1, (x**2).sum()
    if freedom < 3 or size == 0:
        return None
    slope = float((x * y).sum() / size)
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / freedom / size))
    return Offset(-slope, error, sorted(used), lines)


def _beyond(group: Group, line: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Volumes, Å^3 per atom, and the energies without the work of the stress, eV/atom, along a line."""
    chosen, size = [group.frames[n] for n in line], len(group.frames[0].atoms)
    whole = group.cells[line[-1]] - group.cells[line[0]]
    t = ((group.cells[line] - group.cells[line[0]]) * whole).sum((1, 2)) / (whole**2).sum()
    volumes = np.array([f.atoms.cell.volume for f in chosen])
    slopes = np.array([
        v * (f.stress * np.linalg.solve(c, whole)).sum()
        for v, f, c in zip(volumes, chosen, group.cells[line], strict=True)
    ])  # fmt: skip
    # without the displacements from where atoms are on average: w = k d^2 / 2 of the energy, dw/dt of its slope
    moved = np.array([[group.moved(m, n) for m in line] for n in line]).mean(1)
    squares = (moved**2).sum((1, 2))
    w = np.array([-(f.forces * d).sum() / 2 for f, d in zip(chosen, moved, strict=True)])
    stiffness = np.linalg.lstsq(squares[:, None] * np.stack([np.ones_like(t), t], 1), w, rcond=None)[0]
    slopes = slopes - stiffness[1] * squares
    energies = np.array([f.energy for f in chosen]) - w
    return volumes / size, (energies - CubicSpline(t, slopes).antiderivative()(t)) / size


def _series(group: Group) -> list[list[int]]:
    """Structures whose cells lie on a straight line, from one end to the other; each line once."""
    found: list[list[int]] = []
    n = len(group.frames)
    near = np.array([[(group.moved(a, b) ** 2).mean() < MOVED**2 for b in range(n)] for a in range(n)])
    span = SPAN * np.cbrt([f.atoms.cell.volume for f in group.frames])
    seen = np.zeros((n, n), dtype=bool)  # pairs on a line that was looked at
    for a, b in combinations(range(n), 2):
        apart = (group.cells - group.cells[a]).reshape(n, 9)
        size = float(np.linalg.norm(apart[b]))
        if seen[a, b] or not near[a, b] or size < span[a]:
            continue
        along = apart @ apart[b] / size
        beside = np.linalg.norm(apart - along[:, None] * apart[b] / size, axis=1)
        members = [int(m) for m in np.argsort(along) if near[a, m] and beside[m] < STRAIGHT]
        seen[np.ix_(members, members)] = True
        line = [m for k, m in enumerate(members) if k == 0 or along[m] - along[members[k - 1]] > STRAIGHT]
        gaps = np.diff(along[line])
        if len(line) >= SERIES and gaps.max() < 3 * np.median(gaps):
            found.append(line)
    return found
