"""What a network does, as steps on arrays: the one representation from which `passes.py` derives all derivatives.

A step is a matrix product with weights of the network or an operation on rows (`derivatives.Operation`), on pairs of
atoms, on atoms, or on edges. All but sums over edges act on single atoms, pairs or edges: around those lies what
another process's atoms would have to be asked for (`Segment.asked_for`, `Segment.sent_back`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from segnn_ase.compiled.derivatives import Operation


@dataclass(eq=False, frozen=True)
class Array:
    """Numbers for every "pair", "node" or "edge"; `size` for each."""

    where: str
    size: int
    geometry: bool = False  # does not depend on the weights


class Place(NamedTuple):
    """An array's "value", or what belongs to it in the "gradient", "tangent" or "dual" pass."""

    role: str
    array: Array


class View(NamedTuple):
    """Features in an array: `rows` rows an atom, `stride` apart, with the channels from `offset` on."""

    array: "Array | Place"
    rows: int
    stride: int
    offset: int = 0


@dataclass(eq=False, frozen=True)
class Weight:
    """A parameter or some rows of it, or a table of radial functions, as it is used: times scale."""

    whole: Tensor
    scale: float = 1.0
    rows: slice | None = None  # all

    @property
    def parameter(self) -> Tensor:
        return self.whole if self.rows is None else self.whole.detach()[self.rows]


@dataclass(eq=False, frozen=True)
class MatrixProduct:
    """c = a W + bias + d, or c += the same, with W (K, N) or, transposed, its transpose."""

    a: View
    weight: Weight
    c: View
    bias: Weight | None = None
    d: View | None = None
    add: bool = False
    transposed: bool = False

    def places(self) -> "list[Array | Place]":
        return [view.array for view in (self.a, self.c, self.d) if view is not None]

    def weights(self) -> list[Weight]:
        return [w for w in (self.weight, self.bias) if w is not None]

    def on(self, place: Callable) -> "MatrixProduct":
        """The same on other arrays."""
        a, c, d = (v and v._replace(array=place(v.array)) for v in (self.a, self.c, self.d))
        return replace(self, a=a, c=c, d=d)


@dataclass(eq=False, frozen=True)
class RowOperation:
    """An operation or one of its derivatives (see `derivatives.derive`) on every row; one entry for each tensor."""

    operation: Operation
    inputs: "tuple[Array | Place | Weight | None, ...]"
    outputs: "tuple[Array | Place | Weight | None, ...]"  # Weight: its gradient is added to
    order: int | str = 0

    def places(self) -> "list[Array | Place]":
        return [x for x in (*self.inputs, *self.outputs) if isinstance(x, Array | Place)]

    def weights(self) -> list[Weight]:
        return [x for x in self.inputs if isinstance(x, Weight)]

    def on(self, place: Callable) -> "RowOperation":
        inputs, outputs = (
            tuple(place(x) if isinstance(x, Array | Place) else x for x in side) for side in (self.inputs, self.outputs)
        )
        return replace(self, inputs=inputs, outputs=outputs)


@dataclass(eq=False, frozen=True)
class WeightGradient:
    """dL/dW += a' g, and without a dL/d bias += the sum of the rows of g."""

    weight: Weight
    g: View
    a: View | None = None

    def places(self) -> "list[Array | Place]":
        return [view.array for view in (self.a, self.g) if view is not None]

    def weights(self) -> list[Weight]:
        return []

    def on(self, place: Callable) -> "WeightGradient":
        a, g = (v and v._replace(array=place(v.array)) for v in (self.a, self.g))
        return replace(self, a=a, g=g)


Step = MatrixProduct | RowOperation | WeightGradient


class Segment(NamedTuple):
    """Steps that are done one after the other for a chunk of "pair"s or "node"s, or one step on "edge"s: `summed` over
    those of each receiver, or on each edge alone."""

    where: str
    steps: list[Step]

    @property
    def summed(self) -> bool:
        return self.where == "edge" and self.steps[0].operation.edges

    def asked_for(self) -> "list[Array | Place]":
        """What is read from the senders of edges: of atoms of another process it must be asked for before."""
        return self._at_senders("inputs")

    def sent_back(self) -> "list[Array | Place]":
        """What is added to at the senders of edges: for atoms of another process it must be sent there behind."""
        return self._at_senders("outputs")

    def _at_senders(self, side: str) -> "list[Array | Place]":
        if self.where != "edge":
            return []
        (step,) = self.steps
        forward = (isinstance(step.order, int) and step.order == 0) or step.order == "tangent"
        if forward and side == "outputs":
            return []
        sent = {o.tensor for o in step.operation.inputs if o.where == "sender"}
        operands, n_in = getattr(step, side), step.operation.n_inputs()
        repeated = n_in if side == "inputs" else len(operands)  # values, and behind them their tangents
        last = {"tangent": 2, "dual": 2}.get(step.order, 1) * n_in if side == "inputs" else n_in
        return [x for k, x in enumerate(operands[:last]) if k % repeated in sent and isinstance(x, Array | Place)]


@dataclass
class NetworkSteps:
    """Segments that take the vectors r_ij of edges and, without tables, those of pairs to `epsilon` and `features`."""

    vectors: Array
    pair_vectors: Array
    epsilon: Array
    features: View
    cues: Array | None = None  # what atoms are told besides, if anything
    read: tuple[Array, ...] = ()  # of dipoles and polarizabilities, one for each kind of irreps
    segments: list[Segment] = field(default_factory=list)


def steps_of(segments: Iterable[Segment]) -> Iterator[Step]:
    for segment in segments:
        yield from segment.steps
