"""An operation evaluated term by term with numpy: what a compiled kernel must give, whatever the weights are.

A network shows a wrong constant only as far as its weights let it through; here every path counts.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from segnn_ase.compiled.derivatives import Derivative, Operand, Operation, derive
from segnn_ase.compiled.expressions import Expr

ROWS, LANES = 7, 35  # made-up rows; more where they are the lanes of vectors
COUNT = {"row": LANES, "receiver": 4, "sender": 4, "pair": 5, "knot": 3, "shared": 1}  # of made-up places
SMALLEST = 0.1  # below this a component's values are compared with it, not with their own size
TOLERANCE = {np.dtype("float64"): 1e-10, np.dtype("float32"): 1e-4}  # of the largest value of a component
FUNCTIONS = {
    "sigmoid": expit,
    "sqrt": np.sqrt,
    "reciprocal": np.reciprocal,
    "sin": np.sin,
    "cos": np.cos,
    "max": np.maximum,
    "above": lambda x, least: (x >= least).astype(float),
}
Tensors = dict[int, np.ndarray]


class _Rows(NamedTuple):
    """Made-up rows: the index of each in places of each kind."""

    first: np.ndarray  # rows of each receiver
    at: dict[str, np.ndarray]
    channels: int

    def places(self, o: Operand, component: int) -> np.ndarray:
        """Where a component of every row lies in its tensor: (rows, channels), or (rows, 1) for a scalar."""
        width = self.channels if o.level == "V" else 1
        return (self.at[o.where] * o.size + o.offsets[component])[:, None] + np.arange(width)


def kernel_problem(operation: Operation, order: "int | str", dtype: np.dtype, run: Callable) -> str | None:
    """What a kernel gets wrong on random numbers, in words, or None.

    run: (links, inputs, outputs), which adds to or overwrites the outputs; links: first rows of the receivers (N + 1),
    senders, pairs and knots of the rows, int64; tensors by their numbers, flat.
    """
    rng, derivative = np.random.default_rng(0), derive(operation, order)
    rows = _made_up(operation, rng)
    targets = [o for o, _, _ in derivative.stores]
    inputs, outputs = (
        {k: x.astype(dtype) for k, x in _random_tensors(operands, rows, rng).items()}
        for operands in (derivative.inputs, targets)
    )
    found = {k: x.copy() for k, x in outputs.items()}
    run([rows.first, *(rows.at[kind] for kind in ("sender", "pair", "knot"))], inputs, found)
    right = interpret(derivative, rows, inputs, outputs)
    for o, component, _ in derivative.stores:
        places = rows.places(o, component)
        error, size = (
            np.abs(found[o.tensor][places] - right[o.tensor][places]).max(),
            np.abs(right[o.tensor][places]).max(),
        )
        if not error <= TOLERANCE[dtype] * max(size, SMALLEST):
            return f"a kernel's values of {o.name} differ by {error:.1e}, where {size:.1e} is the largest"
    return None


def interpret(derivative: Derivative, rows: _Rows, inputs: Tensors, outputs: Tensors) -> Tensors:
    """The outputs in float64, after what was there before."""
    operands, values = {o.name: o for o in derivative.inputs}, {}

    def value(e: Expr) -> np.ndarray:
        if e.op == "const":
            return np.float64(e.args[0])
        if e.op == "in":
            o = operands[e.args[0]]
            return inputs[o.tensor][rows.places(o, e.args[1])].astype(float)
        if e.op in FUNCTIONS:
            return FUNCTIONS[e.op](values[e.args[0].index], *e.args[1:])
        given = [values[a.index] for a in e.args]
        if e.op == "sum":
            return sum(given).sum(axis=1, keepdims=True)
        return sum(given) if e.op == "add" else given[0] * given[1]

    for e in derivative.formula.needed([e for _, _, e in derivative.stores if e is not None]):
        values[e.index] = value(e)
    out = {k: x.astype(float) for k, x in outputs.items()}
    for o, component, e in derivative.stores:
        new = 0.0 if e is None else values[e.index]
        if o.overwrites:
            out[o.tensor][rows.places(o, component)] = new
        elif e is not None:
            np.add.at(out[o.tensor], rows.places(o, component), new)
    return out


def _made_up(operation: Operation, rng: np.random.Generator) -> _Rows:
    n = LANES if operation.rows_are_lanes else ROWS
    first = np.array([0, 3, 3, 5, n]) if operation.edges else np.arange(n + 1)
    at = {kind: rng.integers(0, COUNT[kind], n) for kind in ("sender", "pair", "knot")}
    receivers = np.repeat(np.arange(len(first) - 1), np.diff(first))
    at |= {"row": np.arange(n), "receiver": receivers, "shared": np.zeros(n, int)}
    return _Rows(first, at, operation.channels)


def _random_tensors(operands: list[Operand], rows: _Rows, rng: np.random.Generator) -> Tensors:
    """Random tensors with room for all that the operands reach."""
    lengths: dict[int, int] = {}
    for o in operands:
        reach = (COUNT[o.where] - 1) * o.size + max(o.offsets, default=0) + max(rows.channels, 1)
        lengths[o.tensor] = max(lengths.get(o.tensor, 0), reach)
    return {k: rng.normal(size=n) for k, n in lengths.items()}
