"""The steps of a `SteerableLinear`, with its weights W before or behind the product, path by path.

W mixes channels only, so that W (x (x) a) = (W x) (x) a: it is applied where there are fewer components.
"""

from collections.abc import Iterable

from segnn_ase.compiled import formulas
from segnn_ase.compiled.derivatives import relaid
from segnn_ase.compiled.steps import Array, MatrixProduct, RowOperation, Step, View, Weight
from segnn_ase.model.irreps import Coupling, multiplicities
from segnn_ase.model.layers import SteerableLinear

GEOMETRY = {"geometry": True}


def steered_linear(
    linear: SteerableLinear,
    f: list[Array],
    a: Array,
    out: dict[int, View],
    beside: "dict[int, View] | None" = None,
    *,
    scale: float = 1.0,
) -> list[Step]:
    """out[k] = scale TP(f; a) + beside[k] for the kinds k that are wanted."""
    steered = _Steered(linear, f, a, out, scale)
    return [*steered.before(), *steered.behind(beside or {})]


def tensor_product(linear: SteerableLinear, k: int, scale: float = 1.0, rows: slice = slice(None)) -> Weight:
    return Weight(linear.weights[k], scale * max(len(linear.weights[k]), 1) ** -0.5, rows)


class _Steered:
    """Steps from f to `out`; paths by their numbers in the coupling, with the rows of weights that belong to each."""

    def __init__(self, linear: SteerableLinear, f: list[Array], a: Array, out: dict[int, View], scale: float):
        self.linear, self.f, self.a, self.out, self.scale = linear, f, a, out, scale
        self.coupling, self.channels = linear.coupling, multiplicities(linear.irreps_in)
        self.width, self.paths = multiplicities(linear.irreps_out), linear.coupling.paths
        self.climbing, self.others = (
            [p for p in chosen if self.paths[p].out in out]
            for chosen in (formulas.climbing(self.coupling), formulas.others(self.coupling))
        )
        self.first, used = [], [0] * len(self.width)  # rows of each path
        for path in self.paths:
            self.first.append(used[path.out])
            used[path.out] += self.channels[path.left]

    def weight(self, k: int, first: int, last: int) -> Weight:
        return tensor_product(self.linear, k, self.scale, slice(first, last))

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
                weight = self.weight(self.paths[p].out, self.first[p], self.first[p] + self.channels[i])
                to = View(mixed[i], rows, len(group) * width, q * width)
                steps.append(MatrixProduct(self.features(i), weight, to))
        outs = sorted({self.paths[p].out for p in chosen})
        part = self.part(mixed, outs)
        operation = formulas.summed_product(part, width, formulas.climbing(part))
        places = {f"out{q}": _components(self.out[k]) for q, k in enumerate(outs)}
        operation = relaid(operation, a=GEOMETRY, **places)
        return [*steps, RowOperation(operation, (*mixed.values(), self.a), tuple(self.out[k].array for k in outs))]

    def behind(self, beside: dict[int, View]) -> list[Step]:
        """W (x (x) a) of the other paths, added to what is there of a kind."""
        into = {k: [p for p in self.others if self.paths[p].out == k] for k in self.out}
        begin = {k: min((self.first[p] for p in paths), default=0) for k, paths in into.items()}
        apart = {}
        for k, paths in into.items():
            stride = sum(self.channels[self.paths[p].left] for p in paths)
            apart[k] = View(Array("node", self.coupling.out[k].dim * stride), self.coupling.out[k].dim, stride)
        steps: list[Step] = []
        for width in sorted(set(self.channels), reverse=True):
            lefts = [i for i, n in enumerate(self.channels) if n == width]
            starts = {
                k: [self.first[p] - begin[k] for p in paths if self.paths[p].left in lefts] for k, paths in into.items()
            }
            part = self.part(lefts, self.out)
            operation = formulas.product(part, width, formulas.others(part))
            places = {f"out{q}": _components(apart[k], starts[k]) for q, k in enumerate(self.out)}
            operation = relaid(operation, a=GEOMETRY, **places)
            inputs = (*(self.f[i] for i in lefts), self.a)
            steps.append(RowOperation(operation, inputs, tuple(view.array for view in apart.values())))
        climbed = {self.paths[p].out for p in self.climbing}
        for k, out in self.out.items():
            bias = Weight(self.linear.bias, self.scale) if k == self.linear.scalar else None
            weight = self.weight(k, begin[k], len(self.linear.weights[k]))
            steps.append(MatrixProduct(apart[k], weight, out, bias=bias, d=beside.get(k), add=k in climbed))
        return steps


def _components(view: View, starts: Iterable[int] = (0,)) -> dict:
    """Layout of what begins at these channels of every component."""
    offsets = tuple(view.offset + m * view.stride + start for m in range(view.rows) for start in starts)
    return {"size": view.array.size, "offsets": offsets}
