"""Formulas of one row, as a graph of sums, products and functions of one value, with their gradients and tangents.

Three levels of values appear in a row: "S" scalars shared by all channels (harmonics, envelope), "V" one number per
channel, and "R" sums over channels (gradients of S).
"""

from typing import NamedTuple


class Expr(NamedTuple):
    """A node of the formula: constant, input, sum, product or function of earlier nodes."""

    index: int
    level: str  # "S", "V" or "R"
    op: str  # "const", "in", "add", "mul", "sum", or one of `SLOPES`
    args: tuple

    def given(self) -> "list[Expr]":
        """The nodes it is made of."""
        return [a for a in self.args if isinstance(a, Expr)]


class Formula:
    """Builds expressions, each distinct one once, in an order in which they can be evaluated."""

    def __init__(self):
        self.nodes: list[Expr] = []
        self._known: dict = {}

    def _node(self, op: str, level: str, *args) -> Expr:
        key = (op, level, *(a.index if isinstance(a, Expr) else ("raw", a) for a in args))
        if key not in self._known:
            self._known[key] = Expr(len(self.nodes), level, op, args)
            self.nodes.append(self._known[key])
        return self._known[key]

    def const(self, value: float) -> Expr:
        return self._node("const", "S", float(value))

    def input(self, operand: str, component: int, level: str) -> Expr:
        return self._node("in", level, operand, component)

    def add(self, *terms: "Expr | None") -> "Expr | None":
        """Sum of the terms; None stands for zero."""
        present = [t for t in terms if t is not None]
        if not present:
            return None
        total = present[0]
        for term in present[1:]:
            total = self._node("add", max(total.level, term.level, key="SVR".index), total, term)
        return total

    def mul(self, *factors: "Expr | None") -> "Expr | None":
        if any(f is None for f in factors):
            return None
        value = 1.0
        rest = []
        for f in factors:
            if f.op == "const":
                value *= f.args[0]
            else:
                rest.append(f)
        if value == 0.0:
            return None
        if not rest:
            return self.const(value)
        product = rest[0]
        for f in rest[1:]:
            product = self._node("mul", max(product.level, f.level, key="SVR".index), product, f)
        return product if value == 1.0 else self._node("mul", product.level, self.const(value), product)

    def function(self, op: str, x: Expr, *numbers: float) -> Expr:
        """One of the functions of `SLOPES`; numbers: what it needs beside x."""
        return self._node(op, x.level, x, *numbers)

    def sigmoid(self, x: Expr) -> Expr:
        return self.function("sigmoid", x)

    def slope(self, node: Expr) -> "Expr | None":
        """Derivative of a function with respect to its argument."""
        return SLOPES[node.op](self, node, *node.args)

    def tangents(self, wanted: list[Expr], seeds: "dict[int, Expr | None]") -> "list[Expr | None]":
        """Derivatives of the wanted nodes along a direction: seeds[index] is the tangent of an input."""
        tangent: dict[int, Expr | None] = {}
        for node in self.needed(wanted):
            if node.op in ("const", "in"):
                d = seeds.get(node.index)
            elif node.op == "add":
                d = self.add(*(tangent[a.index] for a in node.args))
            elif node.op == "mul":
                a, b = node.args
                d = self.add(self.mul(tangent[a.index], b), self.mul(a, tangent[b.index]))
            else:
                inner = tangent[node.args[0].index]
                d = None if inner is None else self.mul(self.slope(node), inner)
            tangent[node.index] = d
        return [tangent[w.index] for w in wanted]

    def gradients(self, outputs: list[tuple[Expr, Expr]], wanted: list[Expr]) -> "list[Expr | None]":
        """Gradient of sum(seed * output) over the pairs (output, seed) with respect to the wanted inputs."""
        order = self.needed([out for out, _ in outputs])
        leads = {w.index for w in wanted}
        for node in order:
            if any(a.index in leads for a in node.given()):
                leads.add(node.index)
        slopes = self._slopes(order, wanted)
        adjoints: dict[int, Expr] = {}  # of V nodes, added up as terms come: few values are alive at a time
        summed: dict[int, list[Expr]] = {}  # V terms of the adjoints of S nodes, to be summed over channels

        def send(node: Expr, term: Expr) -> None:
            if node.index in leads:
                if node.level == "S" and term.level == "V":
                    summed.setdefault(node.index, []).append(term)
                else:
                    adjoints[node.index] = self.add(adjoints.get(node.index), term)

        for out, seed in outputs:
            send(out, seed)
        for node in reversed(order):
            if node.index in summed:
                total = self._node("sum", "R", *summed.pop(node.index))
                adjoints[node.index] = self.add(total, adjoints.get(node.index))
            if node.index not in adjoints:
                continue
            adjoint = adjoints[node.index]
            if node.index in slopes:
                scalar, slope = slopes[node.index]
                send(scalar, self.mul(adjoint, slope))
            elif node.op == "add":
                for argument in node.args:
                    send(argument, adjoint)
            elif node.op == "mul":
                a, b = node.args
                send(a, self.mul(adjoint, b))
                send(b, self.mul(adjoint, a))
            elif node.op in SLOPES and node.args[0].index in leads:
                term = self.mul(adjoint, self.slope(node))
                if term is not None:
                    send(node.args[0], term)
        return [adjoints.get(w.index) for w in wanted]

    def _slopes(self, order: list[Expr], wanted: list[Expr]) -> dict[int, tuple[Expr, Expr]]:
        """Sums V that depend on one wanted scalar alone: with their slope, all of them are one sum over channels; from
        term to term there would be one for each factor S."""
        reached = {w.index: {w} for w in wanted}
        alone: dict[Expr, list[Expr]] = {}
        for node in order:
            reached.setdefault(node.index, set()).update(*(reached[a.index] for a in node.given()))
            if node.op == "add" and node.level == "V" and len(reached[node.index]) == 1:
                (scalar,) = reached[node.index]
                alone.setdefault(scalar, []).append(node)
        found = {}
        for scalar, nodes in alone.items():
            if scalar.level == "S":
                slopes = self.tangents(nodes, {scalar.index: self.const(1.0)})
                found |= {n.index: (scalar, d) for n, d in zip(nodes, slopes, strict=True) if d is not None}
        return found

    def needed(self, wanted: list[Expr]) -> list[Expr]:
        """The nodes that the wanted ones are made of, in order."""
        seen: set[int] = set()
        stack = [w.index for w in wanted]
        while stack:
            index = stack.pop()
            if index not in seen:
                seen.add(index)
                stack.extend(a.index for a in self.nodes[index].given())
        return [self.nodes[i] for i in sorted(seen)]


SLOPES = {  # functions of one value, and their derivatives: (formula, node, argument, numbers)
    "sigmoid": lambda f, y, x: f.add(y, f.mul(f.const(-1.0), y, y)),
    "sqrt": lambda f, y, x: f.mul(f.const(0.5), f.function("reciprocal", y)),
    "reciprocal": lambda f, y, x: f.mul(f.const(-1.0), y, y),
    "sin": lambda f, y, x: f.function("cos", x),
    "cos": lambda f, y, x: f.mul(f.const(-1.0), f.function("sin", x)),
    "max": lambda f, y, x, least: f.function("above", x, least),  # max(x, least)
    "above": lambda f, y, x, least: None,  # 1 where x >= least, else 0
}
