"""The steps of a `SteerableLinear`, with its weights W before or behind the product, path by path.

W mixes channels only, so that W (x (x) a) = (W x) (x) a: it is applied where there are fewer components.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.compiled import steered_formulas
from segnn_ase.compiled.derivatives import relaid
from segnn_ase.compiled.steps import Array, MatrixProduct, RowOperation, Step, View, Weight
from segnn_ase.model.irreps import Coupling, multiplicities
from segnn_ase.model.layers import SteerableLinear

GEOMETRY = {"geometry": True}


class SteeredMap(NamedTuple):
    """The linear map of a `SteerableLinear`, or of a part of its channels."""

    coupling: Coupling
    channels: tuple[int, ...]  # of each kind that comes in
    width: tuple[int, ...]  # channels of each kind that goes out
    weights: Sequence[Tensor]
    scales: list[float]  # of the weights of each kind that goes out
    bias: Weight
    scalar: int | None


def steered_map(linear: SteerableLinear, scale: float = 1.0) -> SteeredMap:
    channels, width = multiplicities(linear.irreps_in), multiplicities(linear.irreps_out)
    scales = [scale * max(len(w), 1) ** -0.5 for w in linear.weights]
    bias = Weight(linear.bias, scale)
    return SteeredMap(linear.coupling, channels, width, [*linear.weights], scales, bias, linear.scalar)


def parted(linear: SteeredMap, channels: tuple[int, ...]) -> tuple[SteeredMap, SteeredMap]:
    """Of the first of the channels that come in, and of the others, with the weights as they are now."""
    parts, path_rows = [], rows_of_paths(linear)
    for first in (True, False):
        rows = [[w.detach()[:0]] for w in linear.weights]
        for path, own in zip(linear.coupling.paths, path_rows, strict=True):
            middle = own.start + channels[path.left]
            chosen = slice(own.start, middle) if first else slice(middle, own.stop)
            rows[path.out].append(linear.weights[path.out].detach()[chosen])
        width = channels if first else tuple(n - c for n, c in zip(linear.channels, channels, strict=True))
        parts.append(linear._replace(channels=width, weights=[torch.cat(x) for x in rows]))
    return parts[0], parts[1]


def rows_of_paths(linear: SteeredMap) -> list[slice]:
    """Those of the weights that belong to each path."""
    rows, used = [], [0] * len(linear.width)
    for path in linear.coupling.paths:
        begin = used[path.out]
        used[path.out] += linear.channels[path.left]
        rows.append(slice(begin, used[path.out]))
    return rows


def steered_linear(
    linear: SteeredMap,
    f: list[Array],
    a: Array,
    out: dict[int, View],
    beside: "dict[int, View] | None" = None,
    *,
    add: bool = False,
) -> list[Step]:
    """out[k] = TP(f; a) + beside[k] for the kinds k that are wanted; add: to what is there."""
    steered = _Steered(linear, f, a, out, add)
    return [*steered.before(), *steered.behind(beside or {})]


class _Steered:
    """Steps from f to `out`; paths by their numbers in the coupling."""

    def __init__(self, linear: SteeredMap, f: list[Array], a: Array, out: dict[int, View], add: bool):
        self.linear, self.f, self.a, self.out, self.add = linear, f, a, out, add
        self.coupling, self.channels, self.width = linear.coupling, linear.channels, linear.width
        self.paths, self.rows = linear.coupling.paths, rows_of_paths(linear)
        self.climbing, self.others = (
            [p for p in chosen if self.paths[p].out in out]
            for chosen in (steered_formulas.climbing(self.coupling), steered_formulas.not_climbing(self.coupling))
        )

    def weight(self, k: int, rows: slice) -> Weight:
        whole = self.linear.weights[k]
        return Weight(whole, self.linear.scales[k], None if rows == slice(0, len(whole)) else rows)

    def features(self, i: int) -> View:
        return View(self.f[i], self.coupling.left[i].dim, self.channels[i])

    def part(self, lefts, outs) -> Coupling:
        """The coupling of some kinds: its paths are in the same order."""
        c = self.coupling
        return Coupling([c.left[i] for i in lefts], c.right, [c.out[k] for k in outs])

    def before(self) -> list[Step]:
        """(W x) (x) a, summed over paths."""
        steps: list[Step] = []
        for width in dict.fromkeys(self.width[self.paths[p].out] for p in self.climbing):
            chosen = [p for p in self.climbing if self.width[self.paths[p].out] == width]
            steps += self._mixed_before(chosen, width)
        return steps

    def _mixed_before(self, chosen: list[int], width: int) -> list[Step]:
        """Paths into kinds with as many channels."""
        steps: list[Step] = []
        mixed = {}
        for i in dict.fromkeys(self.paths[p].left for p in chosen):
            group, rows = [p for p in chosen if self.paths[p].left == i], self.coupling.left[i].dim
            mixed[i] = Array("node", rows * len(group) * width)
            for q, p in enumerate(group):
                weight = self.weight(self.paths[p].out, self.rows[p])
                to = View(mixed[i], rows, len(group) * width, q * width)
                steps.append(MatrixProduct(self.features(i), weight, to))
        outs = sorted({self.paths[p].out for p in chosen})
        part = self.part(mixed, outs)
        operation = steered_formulas.summed_product(part, width, steered_formulas.climbing(part))
        places = {f"out{q}": components(self.out[k]) | {"added": self.add} for q, k in enumerate(outs)}
        operation = relaid(operation, a=GEOMETRY, **places)
        return [*steps, RowOperation(operation, (*mixed.values(), self.a), tuple(self.out[k].array for k in outs))]

    def behind(self, beside: dict[int, View]) -> list[Step]:
        """W (x (x) a) of the other paths, added to what is there of a kind."""
        # their rows lie behind those of the climbing ones: kinds are in order of their degrees
        begin = {
            k: min((self.rows[p].start for p in self.others if self.paths[p].out == k), default=0) for k in self.out
        }
        apart, steps = self._apart(begin)
        climbed = {self.paths[p].out for p in self.climbing}
        for k, out in self.out.items():
            bias = self.linear.bias if k == self.linear.scalar else None
            weight, add = self.weight(k, slice(begin[k], len(self.linear.weights[k]))), self.add or k in climbed
            steps.append(MatrixProduct(apart[k], weight, out, bias=bias, d=beside.get(k), add=add))
        return steps

    def _apart(self, begin: dict[int, int]) -> tuple[dict[int, View], list[Step]]:
        """x (x) a, the channels of all paths into a kind beside each other, and the steps to it."""
        apart, steps = {}, []
        for k in self.out:
            dim, stride = self.coupling.out[k].dim, len(self.linear.weights[k]) - begin[k]
            apart[k] = View(Array("node", dim * stride), dim, stride)
        for width in sorted(set(self.channels), reverse=True):
            lefts = [i for i, n in enumerate(self.channels) if n == width]
            places = {}
            for q, k in enumerate(self.out):
                into = [p for p in self.others if self.paths[p].out == k and self.paths[p].left in lefts]
                places[f"out{q}"] = components(apart[k], [self.rows[p].start - begin[k] for p in into])
            part = self.part(lefts, self.out)
            operation = steered_formulas.product(part, width, steered_formulas.not_climbing(part))
            inputs = (*(self.f[i] for i in lefts), self.a)
            operation = relaid(operation, a=GEOMETRY, **places)
            steps.append(RowOperation(operation, inputs, tuple(view.array for view in apart.values())))
        return apart, steps


def components(view: View, starts: Iterable[int] = (0,)) -> dict:
    """Layout of what begins at these channels of every component."""
    offsets = tuple(view.offset + m * view.stride + start for m in range(view.rows) for start in starts)
    return {"size": view.array.size, "offsets": offsets}
