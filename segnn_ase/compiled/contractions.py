"""Paths along one direction by contractions: fewer operations than with Clebsch-Gordan matrices, and the same values.

The harmonics of an edge are those of one unit vector. What couples x of degree l with Y^L to degree l' is then a
combination of ladders: down from l to some foot k by contractions with the vector, and up from there to l' by products
with it,

    T_k = U_{l'-1} ... U_k  U_k^T ... U_{l-1}^T x,

where U_l (2l+3, 2l+1) is linear in the vector and takes Y^l to Y^{l+1}. Where l + L + l' is odd there is a rotation at
the foot, CG(k, 1, k). T_k has parts of L up to l + l' - 2k, so that every path goes with the ladder that reaches its L,
and is a combination of that one and those with higher feet.
"""

import itertools
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.model.irreps import (
    Coupling,
    Path,
    clebsch_gordan,
    raise_degree,
    spherical_harmonics,
    spherical_kinds,
)

EXACT = 1e-13  # of the largest coefficient
Vector = list["Expr | None"]


class Foot(NamedTuple):
    """Of a ladder: its degree, and whether it turns there."""

    k: int
    turns: bool


def harmonic_kinds(coupling: Coupling) -> int:
    """How many of the right kinds are harmonics of the edge's direction; behind them are attributes by cues."""
    alike = (kind == own for kind, own in zip(coupling.right, spherical_kinds(len(coupling.right) - 1), strict=True))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def harmonics_in(coupling: Coupling) -> int:
    """Their components."""
    return harmonic_kinds(coupling) ** 2


def foot_of(coupling: Coupling, path: Path) -> Foot:
    """The foot of the ladder that goes with a path: with one that another attribute steers, its head."""
    if path.right >= harmonic_kinds(coupling):
        return Foot(coupling.out[path.out].l, False)
    l, right, out = coupling.left[path.left].l, coupling.right[path.right].l, coupling.out[path.out].l
    turns = bool((l + right + out) % 2)
    return Foot((l + out - right + turns) // 2, turns)


@cache
def mixture(coupling: Coupling) -> Tensor:
    """(paths, paths): every path as a combination of the ladders of the paths between the same kinds."""
    found = torch.zeros(len(coupling.paths), len(coupling.paths), dtype=torch.float64)
    for p, path in enumerate(coupling.paths):
        l, right, out = coupling.left[path.left].l, coupling.right[path.right].l, coupling.out[path.out].l
        if path.right >= harmonic_kinds(coupling):
            found[p, p] = coupling.scale(path.out)
            continue
        for foot, c in _multiples(l, right, out).items():
            (q,) = (q for q in _alike(coupling, path) if foot_of(coupling, coupling.paths[q]) == foot)
            found[p, q] = c * coupling.scale(path.out)
    return found


def _alike(coupling: Coupling, path: Path) -> list[int]:
    def alike(other: Path) -> bool:
        return (other.left, other.out) == (path.left, path.out) and other.right < harmonic_kinds(coupling)

    return [q for q, other in enumerate(coupling.paths) if alike(other)]


@cache
def _multiples(l: int, right: int, out: int) -> dict[Foot, float]:
    """CG(l, L, l') Y^L as these multiples of ladders. Raises ValueError if it is not."""
    turns = bool((l + right + out) % 2)
    feet = [Foot(k, turns) for k in range((l + out - right + turns) // 2, min(l, out) + 1)]
    # equivariance takes one direction to all others; a second one for the check
    units = torch.nn.functional.normalize(torch.tensor([[3.0, -7.0, 5.0], [9.0, 2.0, -4.0]], dtype=torch.float64))
    harmonics = spherical_harmonics(units, right)[:, right**2 :]
    wanted = torch.einsum("nr,mrq->nmq", harmonics, clebsch_gordan(l, right, out)).flatten()
    basis = torch.stack([torch.stack([_ladder(l, out, foot, unit) for unit in units]).flatten() for foot in feet], 1)
    found = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    error = float((basis @ found - wanted).abs().max())
    if not error <= EXACT:
        raise ValueError(f"ladders do not make the path {l} x {right} -> {out}: they differ by {error:.1e}")
    return {foot: c for foot, c in zip(feet, found.tolist(), strict=True) if abs(c) > EXACT}


def _ladder(l: int, out: int, foot: Foot, unit: Tensor) -> Tensor:
    """T_k as a matrix (2l+1, 2l'+1)."""
    steps = [_rise(q).mT for q in reversed(range(foot.k, l))]
    steps += [_turn(foot.k)] if foot.turns else []
    steps += [_rise(q) for q in range(foot.k, out)]
    total = torch.eye(2 * l + 1, dtype=torch.float64)
    for step in steps:
        total = total @ torch.einsum("r,rmq->mq", math.sqrt(3.0) * unit, step)
    return total


def _rise(l: int) -> Tensor:
    """U_l as a table (3, 2l+1, 2l+3), for the vector as Y^1."""
    return raise_degree(l).table.unflatten(0, (2 * l + 1, 3)).transpose(0, 1) / math.sqrt(3.0)


def _turn(k: int) -> Tensor:
    return clebsch_gordan(k, 1, k).transpose(0, 1)


class Ladders:
    """The ladders of a coupling along the direction of one edge, as formulas; harmonics: of that edge; beside: further
    attributes, with which products are taken one by one."""

    def __init__(self, f: Formula, coupling: Coupling, harmonics: list[Expr], beside: "list[Expr] | None" = None):
        self.f, self.coupling, self.harmonics, self.beside = f, coupling, harmonics, beside or []
        self.feet = [foot_of(coupling, path) for path in coupling.paths]
        self._directed = harmonic_kinds(coupling)

    def down(self, x: list[Vector]) -> list[Vector]:
        """Every path's left kind at the foot of its ladder."""
        at = [self._feet(k, v) for k, v in enumerate(x)]
        return [
            at[path.left][foot] if path.right < self._directed else self._coupled(path, x[path.left])
            for path, foot in zip(self.coupling.paths, self.feet, strict=True)
        ]

    def _coupled(self, path: Path, x: Vector) -> Vector:
        """The product with an attribute that is not of the direction."""
        f, right = self.f, self.coupling.right
        first = sum(kind.dim for kind in right[self._directed : path.right])
        a, out = self.beside[first : first + right[path.right].dim], self.coupling.out[path.out]
        table = clebsch_gordan(self.coupling.left[path.left].l, right[path.right].l, out.l)
        return [
            f.add(
                *(
                    f.mul(f.mul(f.const(c), a[r]), v)
                    for row, v in zip(table[:, :, m].tolist(), x, strict=True)
                    for r, c in enumerate(row)
                    if abs(c) > EXACT
                )
            )
            for m in range(out.dim)
        ]

    def up(self, out: int, at_feet: list[tuple[int, Vector]]) -> Vector:
        """The sum of what stands at the feet of some paths into one kind, which are given by their numbers."""
        l, at = self.coupling.out[out].l, {}
        for p, v in at_feet:
            k = self.feet[p].k
            at[k] = [*map(self.f.add, at[k], v)] if k in at else v
        lowest = min((k for k in at if k), default=l)
        x = at.get(lowest, [None] * (2 * lowest + 1))
        if lowest and 0 in at:  # straight to where the others begin
            x = [self.f.add(self.f.mul(y, at[0][0]), v) for y, v in zip(self._degree(lowest), x, strict=True)]
        for k in range(lowest, l):
            x = [*map(self.f.add, self._times(_rise(k), x), at.get(k + 1, [None] * (2 * k + 3)))]
        return x

    def _feet(self, left: int, x: Vector) -> dict[Foot, Vector]:
        """One kind at all feet that its paths have."""
        paths, l = self.coupling.paths, self.coupling.left[left].l
        both = zip(paths, self.feet, strict=True)
        wanted = {foot for path, foot in both if path.left == left and path.right < self._directed}
        lowest = min((foot.k for foot in wanted if foot.k), default=l)
        at = {Foot(l, False): x}
        for k in reversed(range(lowest, l)):
            at[Foot(k, False)] = self._times(_rise(k).mT, at[Foot(k + 1, False)])
        if l and Foot(0, False) in wanted:
            along = map(self.f.mul, self._degree(lowest), at[Foot(lowest, False)])
            at[Foot(0, False)] = [self.f.add(*along)]
        turned = [foot for foot in wanted if foot.turns]
        return at | {foot: self._times(_turn(foot.k), at[Foot(foot.k, False)]) for foot in sorted(turned)}

    def _degree(self, l: int) -> list[Expr]:
        return self.harmonics[l**2 : (l + 1) ** 2]

    def _times(self, table: Tensor, x: Vector) -> Vector:
        """x times the matrix that a table and the vector make."""
        f, y = self.f, self._degree(1)
        rows = [
            [f.add(*(f.mul(f.const(c), r) for c, r in zip(entry, y, strict=True) if abs(c) > EXACT)) for entry in row]
            for row in table.permute(2, 1, 0).tolist()
        ]
        return [f.add(*(f.mul(a, v) for a, v in zip(row, x, strict=True))) for row in rows]
