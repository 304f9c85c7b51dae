"""Operations on rows and their derivatives.

An operation is written once, as the formula of one row (an edge or a node); its derivatives are derived from that
formula, and printed as C (`c_code.py`) or for Triton (`triton_code.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from segnn_ase.compiled.expressions import Expr, Formula


@dataclass(frozen=True)
class Operand:
    """How a row reads or writes one tensor.

    where: "row" (this row), "receiver" or "sender" (the atoms of an edge), "pair" (common to both directions of an
    edge), "knot" (place in a radial table) or "shared" (the same for all).
    offsets: place of each component within the entry that belongs to that index, `size` numbers long.
    Two operands may be parts of one tensor. With `constant` there is no gradient with respect to it. With `added`
    its gradient is added to what is there; rows are written otherwise, and gradients for other places always added.
    """

    name: str
    tensor: int
    level: str
    where: str
    size: int
    offsets: tuple[int, ...]
    constant: bool = False
    added: bool = False
    weight: bool = False
    geometry: bool = False

    @property
    def overwrites(self) -> bool:
        return self.where == "row" and not self.added


@dataclass(frozen=True)
class Operation:
    """A row formula: operands in and out, and the function that builds the outputs' expressions. Without channels (0)
    all operands are scalars."""

    channels: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    build: Callable  # (Formula, {name: [Expr]}) -> {name: [Expr | None]}
    edges: bool  # rows are edges, sorted by receiver; otherwise rows are independent

    @property
    def name(self) -> str:
        """Of the function that makes the formula, for profiles."""
        return self.build.__qualname__.split(".")[0].lstrip("_")

    @property
    def rows_are_lanes(self) -> bool:
        return not (self.channels or self.edges)

    def n_inputs(self) -> int:
        return 1 + max(o.tensor for o in self.inputs)

    def n_outputs(self) -> int:
        return 1 + max(o.tensor for o in self.outputs)


def relaid(operation: Operation, **changes: dict) -> Operation:
    """The same operation with other fields for some operands: {name: {field: value}}."""

    def moved(operands):
        return tuple(replace(o, **changes.get(o.name, {})) for o in operands)

    return replace(operation, inputs=moved(operation.inputs), outputs=moved(operation.outputs))


class Derivative(NamedTuple):
    """One derivative of an operation: nodes to be evaluated and where they go."""

    formula: Formula
    inputs: list[Operand]
    stores: list[tuple[Operand, int, "Expr | None"]]  # operand, component, value


@cache
def derive(operation: Operation, order: "int | str") -> Derivative:
    """order 0: outputs. 1: gradients with respect to the inputs. 2: gradients of <v, order 1>.

    Tensors are numbered on: inputs, then gradients G of the outputs, then cotangents v of the inputs;
    order 2 writes gradients with respect to the inputs, then with respect to G.
    order "tangent": inputs, then their tangents v, give the outputs' tangents. "dual": inputs, v, then L and M for the
    outputs, give the gradients of <M, outputs> + <L, tangents of the outputs> with respect to the inputs. Weights have
    no tangent, and geometry has no gradient there.
    """
    formula = Formula()
    x = {o.name: [formula.input(o.name, c, o.level) for c in range(len(o.offsets))] for o in operation.inputs}
    y = operation.build(formula, x)
    if order == 0:
        stores = [(o, c, y[o.name][c]) for o in operation.outputs for c in range(len(o.offsets))]
        return Derivative(formula, list(operation.inputs), stores)
    n_in, n_out = operation.n_inputs(), operation.n_outputs()
    if order in ("tangent", "dual"):
        return _along(operation, order, formula, x, y)
    given = [_renamed(o, "G_" + o.name, n_in) for o in operation.outputs]
    seeds = {
        o.name: [formula.input("G_" + o.name, c, o.level) for c in range(len(o.offsets))] for o in operation.outputs
    }
    variable = [o for o in operation.inputs if not o.constant]
    flat = [(o, c, x[o.name][c]) for o in variable for c in range(len(o.offsets))]
    outputs = [(y[o.name][c], seeds[o.name][c]) for o in operation.outputs for c in range(len(o.offsets))]
    outputs = [(out, seed) for out, seed in outputs if out is not None]
    wanted = [e for _, _, e in flat]
    if order == 1:
        gradients = formula.gradients(outputs, wanted)
        return Derivative(
            formula,
            [*operation.inputs, *given],
            [(o, c, g) for (o, c, _), g in zip(flat, gradients, strict=True)],
        )
    directions = [_renamed(o, "v_" + o.name, n_in + n_out) for o in variable]
    along = {e.index: formula.input("v_" + o.name, c, o.level) for o, c, e in flat}
    tangents = formula.tangents([out for out, _ in outputs], along)
    dual = [(t, seed) for t, (_, seed) in zip(tangents, outputs, strict=True) if t is not None]
    gradients = formula.gradients(dual, wanted)
    stores = [(o, c, g) for (o, c, _), g in zip(flat, gradients, strict=True)]
    by_output = {out.index: t for (out, _), t in zip(outputs, tangents, strict=True)}
    for o in operation.outputs:
        target = _renamed(o, o.name, n_in)
        stores += [(target, c, None if e is None else by_output[e.index]) for c, e in enumerate(y[o.name])]
    return Derivative(formula, [*operation.inputs, *given, *directions], stores)


def _along(operation: Operation, order: str, formula: Formula, x: dict, y: dict) -> Derivative:
    n_in, n_out = operation.n_inputs(), operation.n_outputs()
    moving = [o for o in operation.inputs if not (o.constant or o.weight)]
    directions = [_renamed(o, "v_" + o.name, n_in) for o in moving]
    along: dict[int, Expr | None] = {
        x[o.name][c].index: formula.input("v_" + o.name, c, o.level) for o in moving for c in range(len(o.offsets))
    }
    flat = [(o, c, y[o.name][c]) for o in operation.outputs for c in range(len(o.offsets))]
    present = [e for _, _, e in flat if e is not None]
    tangents = dict(zip((e.index for e in present), formula.tangents(present, along), strict=True))
    if order == "tangent":
        stores = [(o, c, None if e is None else tangents[e.index]) for o, c, e in flat]
        return Derivative(formula, [*operation.inputs, *directions], stores)
    seeds = []
    outputs = []
    for name, shift in (("L_", 2 * n_in), ("M_", 2 * n_in + n_out)):
        seeds += [_renamed(o, name + o.name, shift) for o in operation.outputs]
        for o, c, e in flat:
            value = e if name == "M_" or e is None else tangents[e.index]
            if value is not None:
                outputs.append((value, formula.input(name + o.name, c, o.level)))
    trained = [
        (o, c, x[o.name][c]) for o in operation.inputs if not (o.constant or o.geometry) for c in range(len(o.offsets))
    ]
    gradients = formula.gradients(outputs, [e for _, _, e in trained])
    stores = [(o, c, g) for (o, c, _), g in zip(trained, gradients, strict=True)]
    return Derivative(formula, [*operation.inputs, *directions, *seeds], stores)


def _renamed(operand: Operand, name: str, shift: int) -> Operand:
    return replace(operand, name=name, tensor=operand.tensor + shift)
