"""Geometry of the edges as formulas: what `model.edges` evaluates in PyTorch, with all derivatives derived from them.

Operations without channels: but for the sums over neighbours, their rows are the vector lanes.
"""

import math
from functools import cache

import torch

from segnn_ase.compiled.derivatives import Operand, Operation
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.compiled.formulas import term_of
from segnn_ase.compiled.splines import RadialTables
from segnn_ase.compiled.steps import Array, RowOperation, Segment, Weight
from segnn_ase.model.cues import Term, update_terms
from segnn_ase.model.edges import CLOSEST
from segnn_ase.model.irreps import raise_degree
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.cues import width_of


def _row(name: str, tensor: int, size: int, *, where: str = "row") -> Operand:
    return Operand(name, tensor, "S", where, size, tuple(range(size)))


def _number(name: str, tensor: int, *, where: str = "shared") -> Operand:
    """The same for every model of its kind, so that they share compiled code."""
    return Operand(name, tensor, "S", where, 1, (0,), constant=True)


def _distance(f: Formula, r: list[Expr]) -> Expr:
    square = f.add(*(f.mul(x, x) for x in r))
    return f.function("sqrt", f.function("max", square, CLOSEST**2))


def _at_most(f: Formula, x: Expr, largest: float) -> Expr:
    return f.mul(f.const(-1.0), f.function("max", f.mul(f.const(-1.0), x), -largest))


def _envelope(f: Formula, x: Expr) -> Expr:
    """For x <= 1."""
    cube = f.mul(x, x, x)
    bracket = f.add(f.const(28.0), f.mul(f.const(-48.0), x), f.mul(f.const(21.0), x, x))
    return f.add(f.const(1.0), f.mul(f.const(-1.0), cube, cube, bracket))


def _harmonics(f: Formula, unit: list[Expr], lmax: int) -> list[Expr]:
    """Y^0 ... Y^lmax, degree by degree as in `model.irreps.spherical_harmonics`."""
    values, level = [f.const(1.0)], [f.mul(f.const(math.sqrt(3.0)), x) for x in unit]
    for l in range(1, lmax + 1):
        values += level
        table = raise_degree(l).table
        outer = [f.mul(y, x) for y in level for x in unit]
        level = [
            f.add(*(f.mul(f.const(c), o) for c, o in zip(column, outer, strict=True) if abs(c) > 1e-12))
            for column in table.T.tolist()
        ]
    return values


@cache
def edge_geometry(lmax: int, *, tabulated: bool) -> Operation:
    """Inputs r_ij (E, 3) Å and 1 / r_c, and with `tabulated` r_c as a number of knots of the radial tables, and the
    numbers of the knots; outputs harmonics (E, (lmax + 1)^2), envelope (E, 1) and, with `tabulated`, the fraction of
    the way to the next knot (E, 1)."""

    def build(f: Formula, x: dict) -> dict:
        d = _distance(f, x["vectors"])
        inverse = f.function("reciprocal", d)
        unit = [f.mul(r, inverse) for r in x["vectors"]]
        part = _at_most(f, f.mul(x["inverse_cutoff"][0], d), 1.0)
        out: dict = {"harmonics": _harmonics(f, unit, lmax), "envelope": [_envelope(f, part)]}
        if tabulated:
            out["fraction"] = [f.add(f.mul(x["knots"][0], part), f.mul(f.const(-1.0), x["knot"][0]))]
        return out

    inputs, outputs = [_row("vectors", 0, 3), _number("inverse_cutoff", 1)], [_row("harmonics", 0, (lmax + 1) ** 2)]
    outputs.append(_row("envelope", 1, 1))
    if tabulated:
        inputs += [_number("knots", 2), _number("knot", 3, where="knot")]
        outputs.append(_row("fraction", 2, 1))
    return Operation(0, tuple(inputs), tuple(outputs), build, edges=False)


@cache
def bessel_functions(n: int) -> Operation:
    """s sin(k w d) / d, k = 1 ... n: inputs r_ij (pairs, 3) Å, w = pi / r_c, s = sqrt(2 / r_c); outputs (pairs, n)."""

    def build(f: Formula, x: dict) -> dict:
        d = _distance(f, x["vectors"])
        angle = f.mul(x["frequency"][0], d)
        scale = f.mul(x["scale"][0], f.function("reciprocal", d))
        first = sine, cosine = f.function("sin", angle), f.function("cos", angle)
        values = []
        for _ in range(n):
            values.append(f.mul(scale, sine))
            sine, cosine = (
                f.add(f.mul(sine, first[1]), f.mul(cosine, first[0])),
                f.add(f.mul(cosine, first[1]), f.mul(f.const(-1.0), sine, first[0])),
            )
        return {"radial": values}

    inputs = (_row("vectors", 0, 3), _number("frequency", 1), _number("scale", 2))
    return Operation(0, inputs, (_row("radial", 0, n),), build, edges=False)


@cache
def neighbor_sums(lmax: int) -> Operation:
    """sum_j u Y: inputs harmonics (E, (lmax + 1)^2) and envelope (E, 1), outputs the sums (N, (lmax + 1)^2), the first
    of which is that of the envelopes."""
    n = (lmax + 1) ** 2

    def build(f: Formula, x: dict) -> dict:
        u = x["envelope"][0]
        return {"sums": [u, *(f.mul(u, y) for y in x["harmonics"][1:])]}

    inputs = (_row("harmonics", 0, n), _row("envelope", 1, 1))
    return Operation(0, inputs, (_row("sums", 0, n, where="receiver"),), build, edges=True)


@cache
def attributes(lmax: int, terms: tuple[Term, ...] = (), width: int = 0) -> Operation:
    """What `model.edges.node_attributes` makes of `neighbor_sums`, smooth: inputs and outputs (N, (lmax + 1)^2); with
    cues (N, width) there are the terms' attributes behind them."""
    n = (lmax + 1) ** 2

    def build(f: Formula, x: dict) -> dict:
        total, *steered = x["sums"]
        inverse = f.function("reciprocal", f.add(f.const(1.0), total))
        told = [v for term in terms for v in term_of(f, term, x["cues"], x["cues"])]
        return {"attributes": [f.const(1.0), *(f.mul(s, inverse) for s in steered), *told]}

    inputs = (_row("sums", 0, n), *([_row("cues", 1, width)] if width else ()))
    size = n + sum(term.out.dim for term in terms)
    return Operation(0, inputs, (_row("attributes", 0, size),), build, edges=False)


class Geometry:
    """Arrays of the geometry, and the steps from the vectors r_ij of edges, and without tables of pairs, to them."""

    def __init__(self, config: ModelConfig, tables: RadialTables | None):
        self._config, self._tables, n_attr = config, tables, (config.lmax_attr + 1) ** 2
        self.vectors, self.harmonics, self.envelope, self.fraction = (_array("edge", n) for n in (3, n_attr, 1, 1))
        self.pair_vectors, self.radial = _array("pair", 3), _array("pair", config.n_radial)
        self._terms, width = update_terms(config.cues), width_of(config.cues)
        told = sum(term.out.dim for term in self._terms)
        self._sums, self.attributes = _array("node", n_attr), _array("node", n_attr + told)
        self.cues = _array("node", width) if width else None

    def segments(self) -> list[Segment]:
        lmax, cutoff = self._config.lmax_attr, self._config.cutoff
        inputs, outputs = [self.vectors, _constants(1.0 / cutoff)], [self.harmonics, self.envelope]
        if self._tables:
            inputs += [_constants(cutoff / self._tables.step), _constants(*range(len(self._tables.coefficients[0])))]
            outputs.append(self.fraction)
        operation = edge_geometry(lmax, tabulated=self._tables is not None)
        summed = RowOperation(neighbor_sums(lmax), (self.harmonics, self.envelope), (self._sums,))
        on_edges = RowOperation(operation, tuple(inputs), tuple(outputs))
        return [Segment("edge", [on_edges]), Segment("edge", [summed])]

    def normalised(self) -> RowOperation:
        """The attributes of the nodes, from their sums over neighbours."""
        operation = attributes(self._config.lmax_attr, self._terms, self.cues.size if self.cues else 0)
        told = () if self.cues is None else (self.cues,)
        return RowOperation(operation, (self._sums, *told), (self.attributes,))

    def radial_functions(self) -> RowOperation:
        """Bessel functions of the pairs."""
        cutoff = self._config.cutoff
        inputs = self.pair_vectors, _constants(math.pi / cutoff), _constants(math.sqrt(2.0 / cutoff))
        return RowOperation(bessel_functions(self._config.n_radial), inputs, (self.radial,))


def _array(where: str, size: int) -> Array:
    return Array(where, size, geometry=True)


def _constants(*values: float) -> Weight:
    return Weight(torch.tensor(values, dtype=torch.float64))
