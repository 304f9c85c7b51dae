"""The passes over a network, each derived once from its steps: value, gradient, tangent and dual.

With lambda = dE/dx for every array x (E the weighted sum of epsilon), the gradient pass takes lambda from epsilon back
to the vectors of the edges: that is all that evaluation needs. A loss L(epsilon, lambda of the edges) has
a = dL/d epsilon and v = dL/d lambda; then dL/dW = d/dW (a . epsilon + dE/dt), with dE/dt the derivative of E when the
edges move along v. The tangent pass takes the arrays' tangents x' forward, and the dual pass

    mu_in = mu_out . dy/dx + lambda_out . d(y')/dx,    dL/dW = x mu + x' lambda

goes back: forward over reverse, without a second graph.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from segnn_ase.compiled.derivatives import derive, relaid
from segnn_ase.compiled.steps import (
    Array,
    MatrixProduct,
    NetworkSteps,
    Place,
    RowOperation,
    Segment,
    Step,
    View,
    Weight,
    WeightGradient,
    steps_of,
)


def value_pass(network: NetworkSteps) -> list[Segment]:
    """Vectors to epsilon and features."""
    at = _role("value")
    return [Segment(where, [step.on(at) for step in steps if writes(step)]) for where, steps in network.segments]


def writes(step: Step) -> bool:
    """Whether it writes anything: some kinds of features are reached by no path."""
    if not isinstance(step, RowOperation):
        return True
    return any(e is not None or o.overwrites for o, _, e in derive(step.operation, step.order).stores)


def gradient_pass(network: NetworkSteps) -> list[Segment]:
    """The gradient of epsilon to that of the vectors; weights are constants."""
    return _Reverse(network, "gradient").segments()


def tangent_pass(network: NetworkSteps) -> list[Segment]:
    """Tangents of the vectors to that of epsilon."""
    at = _role("tangent")

    def tangent(step: Step) -> Step:
        if isinstance(step, MatrixProduct):
            return replace(step.on(at), bias=None)
        values = step.on(_role("value")).inputs
        moving = tuple(None if isinstance(x, Weight) else at(x) for x in step.inputs)
        return RowOperation(step.operation, (*values, *moving), tuple(map(at, step.outputs)), "tangent")

    moving = [Segment(where, [tangent(step) for step in steps]) for where, steps in network.segments]
    return [Segment(where, [step for step in steps if writes(step)]) for where, steps in moving]


def dual_pass(network: NetworkSteps) -> list[Segment]:
    """The dual of epsilon to the gradients of all weights."""
    return _Reverse(network, "dual").segments()


def _role(role: str) -> Callable:
    return lambda array: Place(role, array)


class _Reverse:
    """Turns the steps of a network round, one by one: a matrix product into one with the transposed weights, an
    operation on rows into its derivative."""

    def __init__(self, network: NetworkSteps, role: str):
        self.network, self.role, self.at = network, role, _role(role)
        # what has been written of an array
        self._there: dict[Array, np.ndarray] = {x: np.ones(x.size, bool) for x in (network.epsilon, *network.read)}
        # to be added with the next product that goes to as many channels there
        self._waiting: dict[tuple[View, int], View] = {}

    def segments(self) -> list[Segment]:
        made = []
        for where, steps in reversed(self.network.segments):
            new = [one for step in reversed(steps) for one in self._back(step)]
            if new:
                made.append(Segment(where, new))
        if self._waiting:
            raise ValueError("a gradient was not added up")
        return made

    def _back(self, step: Step) -> list[Step]:
        if not isinstance(step, RowOperation):
            return self._product(step)
        if self.role == "dual" and step.outputs[0].geometry:  # weights have no part in it
            return []
        row = self._rows(step)
        return [row] if writes(row) else []

    def _product(self, step: MatrixProduct) -> list[Step]:
        g = step.c._replace(array=self.at(step.c.array))
        self._check_written(step.c.array)
        made: list[Step] = []
        inner, outer = step.weight.parameter.shape
        if self.role == "gradient" or not step.a.array.geometry:
            if step.d is not None:
                self._waiting[step.d, outer] = g
            add = self._write(step.a.array, _columns(step.a, inner))
            d = self._waiting.pop((step.a, inner), None)
            a = step.a._replace(array=self.at(step.a.array))
            made.append(MatrixProduct(g, step.weight, a, d=d, add=add, transposed=True))
        if self.role == "dual":
            for left, right in (("value", "dual"), ("tangent", "gradient")):
                a, c = (v._replace(array=Place(r, v.array)) for v, r in ((step.a, left), (step.c, right)))
                made.append(WeightGradient(step.weight, c, a))
            if step.bias is not None:
                made.append(WeightGradient(step.bias, g))
        return made

    def _rows(self, step: RowOperation) -> RowOperation:
        values, dual = step.on(_role("value")).inputs, self.role == "dual"
        given = tuple(Place(self.role, x) for x in step.outputs)
        for x in step.outputs:
            self._check_written(x)
        changes: dict = {}
        for o in step.operation.inputs:
            x = step.inputs[o.tensor]
            if isinstance(x, Weight):
                changes[o.name] = {} if dual else {"constant": True}
            elif o.where != "row":  # always added up; the first time from zero, which the executors look after
                self._there[x] = np.ones(x.size, bool)
            elif not (dual and x.geometry):
                width = step.operation.channels if o.level == "V" else 1
                changes[o.name] = {"added": self._write(x, np.add.outer(o.offsets, np.arange(width)).ravel())}
        into = tuple(self._target(x) for x in step.inputs)
        if not dual:
            return RowOperation(relaid(step.operation, **changes), (*values, *given), into, 1)
        moving = tuple(None if isinstance(x, Weight) else Place("tangent", x) for x in step.inputs)
        before = tuple(Place("gradient", x) for x in step.outputs)
        inputs = (*values, *moving, *before, *given)
        return RowOperation(relaid(step.operation, **changes), inputs, into, "dual")

    def _target(self, x: "Array | Weight") -> "Place | Weight | None":
        if isinstance(x, Weight):
            return x if self.role == "dual" else None
        return None if self.role == "dual" and x.geometry else self.at(x)

    def _write(self, array: Array, columns: np.ndarray) -> bool:
        """Note that something is written there; whether it must be added to what is there."""
        there = self._there.setdefault(array, np.zeros(array.size, bool))
        before = there[columns]
        if before.any() != before.all():
            raise ValueError("a part of a gradient is there, another is not")
        there[columns] = True
        return bool(before.any())

    def _check_written(self, array: Array) -> None:
        there = self._there.get(array)
        if there is None or not there.all():
            raise ValueError("a gradient is read before all of it is there")


def _columns(view: View, width: int) -> np.ndarray:
    starts = view.offset + view.stride * np.arange(view.rows)
    return np.add.outer(starts, np.arange(width)).ravel()


def joined(forward: list[Segment], back: list[Segment]) -> list[Segment]:
    """One pass behind the other; the last steps on nodes go on into the first ones, while all is in the cache."""
    return [*forward[:-1], Segment("node", [*forward[-1].steps, *back[0].steps]), *back[1:]]


class Evaluation(NamedTuple):
    """What evaluators run, and the places of what they give to it and take from it."""

    energies: list[Segment]
    everything: list[Segment]  # energies and their gradient
    back: list[Segment]  # the gradient, once the energies are there
    vectors: Place
    gradient: Place  # with respect to the vectors
    epsilon: Place
    weight: Place  # of each atom's epsilon in the sum whose gradient is taken
    features: Place
    cues: Place | None
    cue_gradient: Place | None
    read: tuple[Place, ...]
    read_weight: tuple[Place, ...]  # as `weight`, of what is read out

    def storage(self) -> "dict[Place, Storage]":
        inputs, outputs = {self.vectors, self.cues}, {self.epsilon, self.features, *self.read}
        back = {self.weight, *self.read_weight, self.gradient, self.cue_gradient}
        return shared(self.everything, {x for x in inputs | outputs | back if x is not None})


def evaluation(network: NetworkSteps, *, apart: bool = False) -> Evaluation:
    """apart: whether energies and gradient are run one by one, and not only in one pass."""
    forward, back = value_pass(network), gradient_pass(network)
    vectors, gradient = (Place(role, network.vectors) for role in ("value", "gradient"))
    epsilon, weight = (Place(role, network.epsilon) for role in ("value", "gradient"))
    features = Place("value", network.features.array)
    everything, told = [*forward, *back] if apart else joined(forward, back), network.cues
    cues = (None, None) if told is None else (Place("value", told), Place("gradient", told))
    read = (tuple(Place(role, x) for x in network.read) for role in ("value", "gradient"))
    passes = forward, everything, back if apart else []
    return Evaluation(*passes, vectors, gradient, epsilon, weight, features, *cues, *read)


@dataclass(eq=False)
class Storage:
    """Numbers for every pair, node or edge, or, for "scratch", for the nodes of a chunk: of one place or of several
    that are needed at different times."""

    where: str
    size: int


def apart(segments: list[Segment], outside: Iterable[Place]) -> dict[Place, Storage]:
    """Storage for every place of its own; outside: others that are read or written."""
    places = {*(x for step in steps_of(segments) for x in step.places()), *outside}
    return {x: Storage(x.array.where, x.array.size) for x in places}


def shared(segments: list[Segment], outside: set[Place]) -> dict[Place, Storage]:
    """The same storage for what is needed at different times, and scratch for what one segment alone needs.

    outside: places that are written or read before, between or after the segments.
    """
    spans: dict[Place, list[tuple[int, int]]] = {}
    at, bounds = 0, []
    for number, (_, steps) in enumerate(segments):
        bounds.append((at, at + len(steps) - 1))
        for step in steps:
            for place in step.places():
                spans.setdefault(place, []).append((at, number))
            at += 1
    found: dict[Place, Storage] = {place: Storage(place.array.where, place.array.size) for place in outside}
    free: dict[tuple[str, int], list[list]] = {}  # [until when it is taken, storage] by kind and size
    for place, uses in sorted(spans.items(), key=lambda item: item[1][0]):
        if place in outside:
            continue
        (first, begin), (last, end) = uses[0], uses[-1]
        where = place.array.where
        if begin == end and segments[begin].where != "edge":
            where = "scratch"
        else:  # chunks of atoms are in different steps of a segment
            first, last = bounds[begin][0], bounds[end][1]
        taken = free.setdefault((where, place.array.size), [])
        slot = next((one for one in taken if one[0] < first), None)
        if slot is None:
            slot = [last, Storage(where, place.array.size)]
            taken.append(slot)
        slot[0], found[place] = last, slot[1]
    return found
