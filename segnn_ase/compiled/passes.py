"""What a network does with one structure, forward and back, as a list of steps for `engine.py` and `device_engine.py`.

The way back is derived from the steps of `program.py` one by one: a matrix product by one with the transposed weights,
a row operation by its gradient, compiled from the same formula. Everything is evaluated with the weights that the
network has when the plan is made.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from segnn_ase.compiled import network_steps
from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.network_steps import Array, Program, Weight, make_program
from segnn_ase.model.irreps import multiplicities


@dataclass(eq=False)
class Buffer:
    """Numbers for every atom ("node"), for the atoms of one chunk ("scratch"), or for every edge ("edge"); `size` for
    each. A fixed one ("weights") has its tensor. "shared" is a node buffer that several threads add to."""

    kind: str
    size: int = 0
    tensor: Tensor | None = None


class View(NamedTuple):
    """Features in a buffer: `rows` rows an atom, `stride` apart, with the channels from `offset` on."""

    buffer: Buffer
    rows: int
    stride: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """An operation (order 0) or its gradient (order 1) on every atom or edge; one buffer for each of its tensors."""

    operation: Operation
    order: int
    inputs: list[Buffer]
    outputs: list[Buffer | None]

    def buffers(self) -> list[Buffer]:
        return [b for b in (*self.inputs, *self.outputs) if b is not None]

    def moved(self, place: dict[Buffer, Buffer]) -> "Rows":
        inputs, outputs = ([b and place.get(b, b) for b in side] for side in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)


@dataclass(frozen=True, eq=False)
class Product:
    """c = a weight + bias + d, or c += the same."""

    a: View
    weight: Tensor  # (K, N)
    c: View
    bias: Tensor | None = None
    d: View | None = None
    add: bool = False

    def buffers(self) -> list[Buffer]:
        return [view.buffer for view in (self.a, self.c, self.d) if view is not None]

    def moved(self, place: dict[Buffer, Buffer]) -> "Product":
        a, c, d = (v and v._replace(buffer=place.get(v.buffer, v.buffer)) for v in (self.a, self.c, self.d))
        return replace(self, a=a, c=c, d=d)


Segment = list[Rows | Product]


@dataclass
class Plan:
    """Segments to be run one after the other: steps on atoms, or one step on edges.

    The first are given the geometry (harmonics, envelope, fraction: edges; attributes: atoms) and leave `epsilon` and
    `features`; all together leave the gradients of the sum of `weight` * epsilon.
    """

    harmonics: Buffer
    envelope: Buffer
    fraction: Buffer
    attributes: Buffer
    g_harmonics: Buffer
    g_envelope: Buffer
    g_fraction: Buffer
    g_attributes: Buffer
    epsilon: Buffer
    weight: Buffer
    features: View
    segments: list[Segment]
    n_forward: int  # segments that the energies need; the last of them goes on into the gradient
    n_last: int  # steps of it that they need

    def given(self) -> list[Buffer]:
        """What is written or read from outside."""
        geometry = [self.harmonics, self.envelope, self.fraction, self.attributes]
        gradients = [self.g_harmonics, self.g_envelope, self.g_fraction, self.g_attributes]
        return [*geometry, *gradients, self.epsilon, self.weight, self.features.buffer]


def on_edges(segment: Segment) -> bool:
    return isinstance(segment[0], Rows) and segment[0].operation.edges


def supported(potential: nn.Module) -> bool:
    """Whether `make_plan` knows this network: a steerable or linear message, as many channels for every irrep."""
    config = potential.config
    return config.message != "published" and len(set(multiplicities(potential.segnn.irreps))) == 1


def make_plan(potential: nn.Module) -> Plan:
    """Steps of a network whose radial functions are tabulated; see `supported`."""
    source = make_program(potential, tabulated=True)
    way = _BothWays(source)
    forward = [[way.forward(step) for step in steps] for _, steps in source.segments]
    back = [[new for step in reversed(steps) for new in way.back(step)] for _, steps in reversed(source.segments)]
    if way.waiting:
        raise ValueError("a gradient was not added up")
    plan = Plan(
        *(way.value(x) for x in (source.harmonics, source.envelope, source.fraction, source.attributes)),
        *(way.gradient(x) for x in (source.harmonics, source.envelope, source.fraction, source.attributes)),
        epsilon=way.value(source.epsilon),
        weight=way.gradient(source.epsilon),
        features=way.view(source.features, way.value),
        segments=[*forward[:-1], [*forward[-1], *back[0]], *back[1:]],
        n_forward=len(forward),
        n_last=len(forward[-1]),
    )
    share(plan)
    return plan


class _BothWays:
    """Turns the steps of a program into those of a plan."""

    def __init__(self, source: Program):
        self._values: dict[Array, Buffer] = {}
        self._gradients: dict[Array, Buffer] = {}
        self._written = {source.epsilon}  # gradients that are there
        self.waiting: dict[tuple, View] = {}  # gradients to be added to that of a view
        self._weights: dict[int, Buffer] = {}

    def value(self, array: Array) -> Buffer:
        return self._values.setdefault(array, Buffer(array.where, array.size))

    def gradient(self, array: Array) -> Buffer:
        return self._gradients.setdefault(array, Buffer(array.where, array.size))

    @staticmethod
    def view(view: network_steps.View, of) -> View:
        return View(of(view.array), view.rows, view.stride, view.offset)

    def forward(self, step: "network_steps.Rows | network_steps.Product") -> "Rows | Product":
        if isinstance(step, network_steps.Rows):
            return Rows(step.operation, 0, self._inputs(step), [self.value(x) for x in step.outputs])
        a, c, d = (v and self.view(v, self.value) for v in (step.a, step.c, step.d))
        bias = None if step.bias is None else _as_used(step.bias)
        return Product(a, _as_used(step.weight), c, bias=bias, d=d, add=step.add)

    def _inputs(self, step: network_steps.Rows) -> list[Buffer]:
        return [self._fixed(x) if isinstance(x, Weight) else self.value(x) for x in step.inputs]

    def _fixed(self, weight: Weight) -> Buffer:
        return self._weights.setdefault(id(weight), Buffer("weights", tensor=_as_used(weight)))

    def back(self, step: "network_steps.Rows | network_steps.Product") -> Iterable["Rows | Product"]:
        if isinstance(step, network_steps.Rows):
            yield self._rows_back(step)
            return
        g = self.view(step.c, self.gradient)
        if step.d is not None:
            self.waiting[step.d] = g  # added with the next product that goes there
        if step.a.array.geometry:
            return
        weight = _as_used(step.weight).T
        whole = step.a.offset == 0 and weight.shape[1] == step.a.stride
        if not whole and step.a.array not in self._written:
            raise ValueError("the first gradient of an array must be that of all of it")
        add = step.a.array in self._written
        self._written.add(step.a.array)
        yield Product(g, weight, self.view(step.a, self.gradient), d=self.waiting.pop(step.a, None), add=add)

    def _rows_back(self, step: network_steps.Rows) -> Rows:
        gradients: list[Buffer | None] = [None if isinstance(x, Weight) else self.gradient(x) for x in step.inputs]
        changes = {}
        for o in step.operation.inputs:
            x = step.inputs[o.tensor]
            if isinstance(x, Weight):
                changes[o.name] = {"constant": True}
            elif not x.geometry:  # gradients of the geometry are added up from zero
                changes[o.name] = {"added": x in self._written}
                if step.operation.edges:
                    gradients[o.tensor].kind = "shared"
        self._written |= {x for x in step.inputs if isinstance(x, Array)}
        given = [self.gradient(x) for x in step.outputs]
        return Rows(network_steps.relaid(step.operation, **changes), 1, [*self._inputs(step), *given], gradients)


def _as_used(weight: Weight) -> Tensor:
    return weight.parameter.detach().double() * weight.scale


def share(plan: Plan) -> None:
    """Let what is needed at different times lie in the same place, and what one segment alone needs in scratch."""
    outside, spans = set(plan.given()), {}
    at, bounds = 0, []
    for number, segment in enumerate(plan.segments):
        bounds.append((at, at + len(segment) - 1))
        for step in segment:
            for buffer in step.buffers():
                if buffer.kind != "weights" and buffer not in outside:
                    spans.setdefault(buffer, []).append((at, number))
            at += 1
    place: dict[Buffer, Buffer] = {}
    free: dict[tuple[str, int], list[tuple[int, Buffer]]] = {}  # places by kind and size, and when they are free
    for buffer, uses in sorted(spans.items(), key=lambda item: item[1][0]):
        (first, begin), (last, end) = uses[0], uses[-1]
        if begin == end and not on_edges(plan.segments[begin]):
            buffer.kind = "scratch"
        else:  # chunks of atoms are in different steps of a segment
            first, last = bounds[begin][0], bounds[end][1]
        places = free.setdefault((buffer.kind, buffer.size), [])
        found = next((k for k, (until, _) in enumerate(places) if until < first), None)
        if found is None:
            places.append((last, buffer))
        else:
            place[buffer] = places[found][1]
            places[found] = (last, places[found][1])
    plan.segments = [[step.moved(place) for step in segment] for segment in plan.segments]
