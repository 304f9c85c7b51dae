"""Irreps of O(3): bookkeeping, Clebsch-Gordan tables, spherical harmonics.

Conventions are e3nn's (real basis, l = 1 components ordered x, y, z; `CONVENTION` is written into
every model file). Normalisation is "component": a steerable vector of degree l has norm sqrt(2l + 1)
when every component has unit variance, and Y^0 = 1.

Steerable features travel as a tuple with one tensor (n, 2l + 1, multiplicity) per irrep, channels
last: a linear map is then one matrix product and the channels are contiguous in memory.
"""

import math
import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.model.couplings import real_clebsch_gordan

Features = tuple[Tensor, ...]  # one (n, 2l + 1, multiplicity) per irrep
CONVENTION = "e3nn real spherical harmonics, order x y z, component normalisation"


class Kind(NamedTuple):
    """A type of irrep: degree l and parity p (+1 even, -1 odd)."""

    l: int
    p: int

    @property
    def dim(self) -> int:
        return 2 * self.l + 1

    def __str__(self) -> str:
        return f"{self.l}{'e' if self.p == 1 else 'o'}"


SCALAR = Kind(0, 1)


class Channels(NamedTuple):
    """So many irreps of one kind."""

    mul: int
    ir: Kind

    @property
    def dim(self) -> int:
        return self.mul * self.ir.dim

    def __str__(self) -> str:
        return f"{self.mul}x{self.ir}"


class Irreps(tuple[Channels, ...]):
    """A list of irreps with multiplicities in e3nn's notation, such as "32x0e+32x1o".

    Made from such a string, or from pairs (multiplicity, (l, parity)): those of e3nn's Irreps, too.
    """

    def __new__(cls, irreps: "str | Iterable") -> "Irreps":
        terms: Iterable = irreps
        if isinstance(irreps, str):
            terms = map(_parse_term, irreps.split("+") if irreps.strip() else ())
        return super().__new__(cls, (Channels(mul, Kind(ir[0], ir[1])) for mul, ir in terms))

    @property
    def dim(self) -> int:
        return sum(channels.dim for channels in self)

    def __str__(self) -> str:
        return "+".join(map(str, self))

    __repr__ = __str__


TERM = re.compile(r"\s*(?:(\d+)\s*x\s*)?(\d+)([eoy])\s*")  # y: the parity of spherical harmonics


def _parse_term(term: str) -> tuple[int, tuple[int, int]]:
    found = TERM.fullmatch(term)
    if found is None:
        raise ValueError(f"{term!r} is no irrep")
    l = int(found[2])
    return int(found[1] or 1), (l, {"e": 1, "o": -1, "y": (-1) ** l}[found[3]])


def parse_irreps(irreps: "str | Iterable") -> Irreps:
    """Return sorted irreps with one entry per kind; raise ValueError naming a string that is not irreps."""
    try:
        parsed = Irreps(irreps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"irreps is {irreps!r}; expected e3nn notation such as '32x0e+32x1o'") from error
    total: dict[Kind, int] = {}
    for mul, ir in parsed:
        total[ir] = total.get(ir, 0) + mul
    return Irreps((mul, ir) for ir, mul in sorted(total.items()) if mul)


def kinds(irreps: Irreps) -> tuple[Kind, ...]:
    return tuple(ir for _, ir in irreps)


def multiplicities(irreps: Irreps) -> tuple[int, ...]:
    return tuple(mul for mul, _ in irreps)


def spherical_kinds(lmax: int) -> tuple[Kind, ...]:
    return tuple(Kind(l, (-1) ** l) for l in range(lmax + 1))


class Layout:
    """e3nn's flat layout (n, irreps.dim) of irreps as the user wrote them, in any order, kinds repeated or not."""

    def __init__(self, irreps: "str | Iterable"):
        self.irreps = parse_irreps(irreps)
        order = kinds(self.irreps)
        self.blocks = [(order.index(ir), mul, ir.dim) for mul, ir in Irreps(irreps)]

    def split(self, x: Tensor) -> Features:
        """(n, irreps.dim) to one (n, 2l + 1, mul) tensor per kind, sorted."""
        parts: list[list[Tensor]] = [[] for _ in self.irreps]
        flat = x.split([mul * dim for _, mul, dim in self.blocks], dim=1)
        for (kind, mul, dim), block in zip(self.blocks, flat, strict=True):
            parts[kind].append(block.unflatten(1, (mul, dim)).transpose(1, 2))
        return tuple(torch.cat(part, dim=2) for part in parts)

    def join(self, features: Features) -> Tensor:
        """Inverse of `split`."""
        used = [0] * len(features)
        flat = []
        for kind, mul, _ in self.blocks:
            block = features[kind][:, :, used[kind] : used[kind] + mul]
            flat.append(block.transpose(1, 2).flatten(1))
            used[kind] += mul
        return torch.cat(flat, dim=1)


@cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """Coupling coefficients (2l1+1, 2l2+1, 2l3+1), float64, scaled so that unit variance in gives unit variance out."""
    return torch.tensor(real_clebsch_gordan(l1, l2, l3))


@cache
def matrices_of(l: int) -> Tensor:
    """The orthonormal 3 x 3 matrices that turn as degree l, row by row: (9, 2l + 1), float64."""
    table = clebsch_gordan(1, 1, l).flatten(0, 1)
    return table / table.norm(dim=0)


class Constant:
    """A float64 table handed out in the dtype and on the device of a tensor, converted once for each.

    Not a buffer: `module.to(float32).to(float64)` would leave it rounded.
    """

    def __init__(self, table: Tensor):
        self.table = table
        self._converted: dict = {}

    def __deepcopy__(self, memo: dict) -> "Constant":
        return self

    def like(self, x: Tensor) -> Tensor:
        key = (x.dtype, x.device)
        if key not in self._converted:
            self._converted[key] = self.table.to(x)
        return self._converted[key]


class Path(NamedTuple):
    """One way to couple two irreps into a third; the numbers index `Coupling.left`, `.right` and `.out`."""

    left: int
    right: int
    out: int


class Coupling:
    """All paths left (x) right -> out, each path once, grouped by left kind, then by out kind.

    `columns[i]` are the widths of the products of left kind i, one for each out kind: n_paths[i][k] paths
    of 2 l_out + 1 columns each. With `normalize=True` the paths into one kind are divided by the square
    root of their number, so that their sum has unit variance. With `symmetric=True` both factors are the
    same vector and mirrored paths are dropped. The last `with_scalars` of the right kinds multiply 0e alone.
    """

    def __init__(self, left, right, out, *, normalize: bool = False, symmetric: bool = False, with_scalars: int = 0):
        self.left, self.right, self.out = tuple(left), tuple(right), tuple(out)
        self._identity = (self.left, self.right, self.out, normalize, symmetric, with_scalars)
        self._normalize = normalize
        self.paths = [
            Path(i, j, k)
            for i, a in enumerate(self.left)
            for k, c in enumerate(self.out)
            for j, b in enumerate(self.right)
            if abs(a.l - b.l) <= c.l <= a.l + b.l
            and a.p * b.p == c.p
            and (a == SCALAR or j < len(self.right) - with_scalars)
            # the antisymmetric part of a product of a vector with itself is zero
            and not (symmetric and (i > j or (i == j and (2 * a.l + c.l) % 2)))
        ]
        self.n_paths = [
            [sum(path.left == i and path.out == k for path in self.paths) for k in range(len(self.out))]
            for i in range(len(self.left))
        ]
        self.columns = [[n * c.dim for n, c in zip(row, self.out, strict=True)] for row in self.n_paths]
        self.tables = [Constant(self._table(i)) for i in range(len(self.left))]

    def __deepcopy__(self, memo: dict) -> "Coupling":
        return self  # it never changes, and copying its paths would take most of a potential's copy

    def __eq__(self, other) -> bool:
        return isinstance(other, Coupling) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def paths_into(self, k: int) -> int:
        return sum(row[k] for row in self.n_paths)

    def scale(self, k: int) -> float:
        """What the coefficients of the paths into one kind are multiplied by."""
        return self.paths_into(k) ** -0.5 if self._normalize else 1.0

    def _table(self, left: int) -> Tensor:
        """Coefficients (right dim, 2 l_left + 1, columns) of the paths that start at one left kind."""
        right = _offsets(self.right)
        table = torch.zeros(right[-1], self.left[left].dim, sum(self.columns[left]), dtype=torch.float64)
        column = 0
        for i, j, k in self.paths:
            if i != left:
                continue
            coefficients = clebsch_gordan(self.left[i].l, self.right[j].l, self.out[k].l)
            width = self.out[k].dim
            table[right[j] : right[j + 1], :, column : column + width] = self.scale(k) * coefficients.transpose(0, 1)
            column += width
        return table

    def matrices(self, right: Tensor) -> list[Tensor]:
        """What multiplies each left kind, from the right factor (n, right dim): (n, 2 l_left + 1, columns)."""
        tables = [table.like(right) for table in self.tables]
        return [(right @ table.flatten(1)).unflatten(1, table.shape[1:]) for table in tables]

    def products(self, left: Features, matrices: list[Tensor]) -> list[Tensor]:
        """Couple channel by channel: one (n, 2 l_left + 1, c) per left kind to one (n, columns, c) each."""
        # a batched product over a single component is slower than broadcasting
        return [m.mT * x if x.shape[1] == 1 else m.mT @ x for x, m in zip(left, matrices, strict=True)]

    def channelwise(self, left: Features, right: Tensor) -> list[Tensor]:
        """The same with a right factor that has channels too, (n, right dim, c)."""
        return [
            table.like(x).flatten(0, 1).T @ (right[:, :, None] * x[:, None]).flatten(1, 2)
            for x, table in zip(left, self.tables, strict=True)
        ]

    def weigh_paths(self, products: list[Tensor], weights: Tensor) -> list[list[Tensor]]:
        """Weigh each path per channel by weights (n or 1, paths, c), then add up the paths from one left kind.

        Returns, for each out kind, one (n, 2l+1, c) per left kind that reaches it.
        """
        groups = iter(weights.split([n for row in self.n_paths for n in row], dim=1))
        out: list[list[Tensor]] = [[] for _ in self.out]
        for product, row, widths in zip(products, self.n_paths, self.columns, strict=True):
            for k, (block, n) in enumerate(zip(product.split(widths, dim=1), row, strict=True)):
                w = next(groups)
                if n == 1:
                    out[k].append(block * w)
                elif n > 1:
                    out[k].append((block.unflatten(1, (n, -1)) * w[:, :, None]).sum(1))
        return out


def _offsets(items: tuple[Kind, ...]) -> list[int]:
    offsets = [0]
    for kind in items:
        offsets.append(offsets[-1] + kind.dim)
    return offsets


@cache
def raise_degree(l: int) -> Constant:
    """Table ((2l+1) 3, 2l+3) with Y^{l+1} = (Y^l (x) r) . table, component-normalised, e3nn's signs."""
    table = clebsch_gordan(l, 1, l + 1).flatten(0, 1)
    pole = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)  # e3nn's polar axis is y: there Y^l_0 = sqrt(2l + 1)
    value = torch.outer(_harmonics_list(pole[None], l)[-1][0], pole).flatten() @ table
    return Constant(table * (math.sqrt(2 * l + 3) / value[l + 1]))


def _harmonics_list(unit: Tensor, lmax: int) -> list[Tensor]:
    harmonics = [torch.ones_like(unit[:, :1])]
    if lmax > 0:
        harmonics.append(math.sqrt(3.0) * unit)
    for l in range(1, lmax):
        outer = (harmonics[-1][:, :, None] * unit[:, None, :]).flatten(1)
        harmonics.append(outer @ raise_degree(l).like(unit))
    return harmonics


def spherical_harmonics(unit: Tensor, lmax: int) -> Tensor:
    """Evaluate Y^0 ... Y^lmax at unit vectors (n, 3) by raising the degree one step at a time: (n, (lmax + 1)^2)."""
    return torch.cat(_harmonics_list(unit, lmax), dim=1)
