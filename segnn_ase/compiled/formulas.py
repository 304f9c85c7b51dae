"""The operations of the layers as formulas of one row, term by term; each function returns an `Operation`."""

from dataclasses import replace
from functools import cache

from torch import Tensor

from segnn_ase.compiled.contractions import Ladders, harmonics_in, mixture
from segnn_ase.compiled.derivatives import Operand, Operation
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.compiled.splines import DEGREE, spline_pieces
from segnn_ase.model.cues import Term, reach_of
from segnn_ase.model.irreps import SCALAR


def paths_to(coupling, k: int) -> list[int]:
    """The paths into a kind."""
    return [p for p, path in enumerate(coupling.paths) if path.out == k]


def path_columns(coupling) -> list[list[int]]:
    """For each path, the columns of its left kind's matrix."""
    used = [0] * len(coupling.left)
    columns = []
    for path in coupling.paths:
        width = coupling.out[path.out].dim
        columns.append(list(range(used[path.left], used[path.left] + width)))
        used[path.left] += width
    return columns


def paths_out(name: str, coupling, channels: int, where: str, paths=None) -> tuple[Operand, ...]:
    """Outputs (n, 2l+1, paths, channels), one tensor for each out kind; paths: numbers, None for all."""
    operands = []
    for k, kind in enumerate(coupling.out):
        n = coupling.paths_into(k) if paths is None else sum(coupling.paths[p].out == k for p in paths)
        operands.append(
            Operand(
                f"{name}{k}", k, "V", where, kind.dim * n * channels, tuple(q * channels for q in range(kind.dim * n))
            )
        )
    return tuple(operands)


def _radial(tensor: int, n_paths: int, channels: int, tabulated: bool) -> list[Operand]:
    """Where rho comes from: (pairs, paths, channels), or a table (knots, paths, channels) and places (E, 1)."""
    size = n_paths * channels
    if not tabulated:
        return [Operand("rho", tensor, "V", "pair", size, tuple(p * channels for p in range(n_paths)))]
    # a row of the table and those that follow it
    offsets = tuple(q * size + p * channels for q in range(DEGREE + 1) for p in range(n_paths))
    return [
        Operand("table", tensor, "V", "knot", size, offsets, constant=True),
        Operand("fraction", tensor + 1, "S", "row", 1, (0,)),
    ]


def _rho(f: Formula, x: dict, mixed: Tensor, *, tabulated: bool) -> list[Expr]:
    """What each ladder is weighed with: `mixed` (ladders, paths) of rho, or by the splines of the table."""
    if not tabulated:
        return [
            f.add(*(f.mul(f.const(c), r) for c, r in zip(row, x["rho"], strict=True) if c)) for row in mixed.tolist()
        ]
    weights, n = [], len(mixed)
    for piece in spline_pieces():
        weight = None
        for coefficient in piece[::-1].tolist():  # Horner
            weight = f.add(f.mul(weight, x["fraction"][0]), f.const(coefficient) if abs(coefficient) > 1e-12 else None)
        weights.append(weight)
    return [f.add(*(f.mul(w, x["table"][q * n + p]) for q, w in enumerate(weights))) for p in range(n)]


def _combined(f: Formula, coefficients: list[float], values: list[Expr]) -> Expr:
    return f.add(*(f.mul(f.const(c), v) for c, v in zip(coefficients, values, strict=True) if c))


def strided(count: int, channels: int) -> tuple[int, ...]:
    return tuple(q * channels for q in range(count))


def _told(terms: tuple[Term, ...], tensor: int) -> list[Operand]:
    """Cues of both ends of an edge, where messages are steered by them."""
    width = reach_of(terms)
    ends = ("receiver", "sender") if terms else ()
    return [Operand(f"cues_{end}", tensor, "S", end, width, tuple(range(width)), geometry=True) for end in ends]


def _steering(f: Formula, x: dict, terms: tuple[Term, ...]) -> list[Expr]:
    """Attributes of an edge by its cues, as those by its direction."""
    return [v for term in terms for v in term_of(f, term, x["cues_receiver"], x["cues_sender"])]


def term_of(f: Formula, term: Term, own: list[Expr], other: list[Expr]) -> list[Expr]:
    """`model.cues.steering` by one term."""
    own, other = own[term.columns], other[term.columns]
    if not term.squared:
        return own
    return [
        f.add(
            *(
                f.mul(f.const(c), f.mul(*_ordered(own[a], other[b])))
                for a, row in enumerate(entry)
                for b, c in enumerate(row)
                if abs(c) > 1e-12
            )
        )
        for entry in term.table.permute(2, 0, 1).tolist()
    ]


def _message_inputs(coupling, channels: int, tabulated: bool, terms: tuple[Term, ...]) -> tuple[Operand, ...]:
    inputs, n = [], len(coupling.left)
    for k, kind in enumerate(coupling.left):
        for half, where in enumerate(("receiver", "sender")):
            offsets = tuple((2 * m + half) * channels for m in range(kind.dim))
            inputs.append(Operand(f"{where}{k}", k, "V", where, 2 * kind.dim * channels, offsets))
    inputs += _radial(n, len(coupling.paths), channels, tabulated)
    used, dim = n + 1 + tabulated, harmonics_in(coupling)
    scalar = coupling.left.index(SCALAR)
    mixed = n * sum(row[scalar] > 0 for row in coupling.n_paths)
    return (
        *inputs,
        Operand("harmonics", used, "S", "row", dim, tuple(range(dim))),
        Operand("envelope", used + 1, "S", "row", 1, (0,)),
        Operand("mix", used + 2, "V", "shared", 0, strided(mixed, channels), constant=tabulated),
        Operand("bias", used + 3, "V", "shared", 0, strided(n, channels), constant=tabulated),
        *_told(terms, used + 4),
    )


@cache
def message(
    coupling, channels: int, silu: float, sigmoid: float, *, tabulated: bool = False, terms: tuple[Term, ...] = ()
) -> Operation:
    """The steerable message of `Message` on one block of channels, envelope and sum over neighbours included.

    Inputs: for each kind (N, 2l+1, 2 channels), receiver's part first; rho (pairs, paths, channels); harmonics
    (E, (lmax+1)^2); envelope (E, 1); mix (outputs, scalars, channels); bias (outputs, channels); with terms, cues (N,
    width), which steer the message besides.
    With `tabulated`, for evaluation only, rho is a table of spline coefficients (rows, ladders, channels), of what
    `radial_mixture` makes of rho, and the fraction of the way to the next knot (E, 1), and there are no gradients of
    table, mix and bias. Outputs: for each kind (N, 2l+1, ladders, channels), to be `recombined`.
    """
    n = len(coupling.left)

    def build(f: Formula, x: dict) -> dict:
        ladders = Ladders(f, coupling, x["harmonics"], _steering(f, x, terms))
        rho = _rho(f, x, radial_mixture(coupling), tabulated=tabulated)
        both = [[*map(f.add, x[f"receiver{k}"], x[f"sender{k}"])] for k in range(n)]
        # rho weighs what is at the feet: what climbs from them then adds up to the kind's sum at once
        feet = _weighed(f, rho, ladders.down(both))
        return _sent_out(coupling, ladders, _gated(f, ladders, x, feet, silu, sigmoid))

    inputs = _message_inputs(coupling, channels, tabulated, terms)
    return Operation(channels, inputs, paths_out("out", coupling, channels, "receiver"), build, edges=True)


@cache
def radial_mixture(coupling, *, linear: bool = False) -> Tensor:
    """(ladders, paths): what the ladders of a message's first product are weighed with, from rho of the paths."""
    # of the non-linear one the receiver's and the sender's features are added up: the factor keeps the variance
    return mixture(coupling).T * (1.0 if linear else 0.5**0.5)


def _weighed(f: Formula, rho: list[Expr], feet: list[list]) -> list[list]:
    return [[f.mul(r, v) for v in foot] for r, foot in zip(rho, feet, strict=True)]


def _gated(f: Formula, ladders: Ladders, x: dict, feet: list[list], silu: float, sigmoid: float) -> list:
    """u h of each kind: silu on 0e, the others times a sigmoid, of mixtures of the scalar paths; u: envelope."""
    kinds, (u,) = ladders.coupling.left, x["envelope"]
    scalar = kinds.index(SCALAR)
    scalars = _by_left(f, ladders.coupling, scalar, feet)
    mixed = [
        f.add(x["bias"][o], *(f.mul(x["mix"][o * len(scalars) + s], t) for s, t in enumerate(scalars)))
        for o in range(len(kinds))
    ]
    gates, h = iter(mixed[1:]), []
    for k in range(len(kinds)):
        if k == scalar:
            h.append([f.mul(f.mul(f.const(silu), u), mixed[0], f.sigmoid(mixed[0]))])
            continue
        gate = f.mul(f.mul(f.const(sigmoid), u), f.sigmoid(next(gates)))
        sums = ladders.up(k, [(p, feet[p]) for p in paths_to(ladders.coupling, k)])
        h.append([f.mul(gate, v) for v in sums])
    return h


def _by_left(f: Formula, coupling, scalar: int, feet: list[list]) -> list[Expr]:
    """The paths from each left kind into scalars, added up."""
    groups: dict[int, list[Expr]] = {}
    for p in paths_to(coupling, scalar):
        groups.setdefault(coupling.paths[p].left, []).append(feet[p][0])
    return [f.add(*group) for group in groups.values()]


def _sent_out(coupling, ladders: Ladders, h: list) -> dict:
    """Every ladder apart, for each out kind."""
    feet, out = ladders.down(h), {}
    for k in range(len(coupling.out)):
        climbed = [ladders.up(k, [(p, feet[p])]) for p in paths_to(coupling, k)]
        out[f"out{k}"] = [v for component in zip(*climbed, strict=True) for v in component]
    return out


def recombination(coupling, k: int) -> Tensor:
    """(paths, ladders) into a kind: what `recombined` multiplies with."""
    into = paths_to(coupling, k)
    return mixture(coupling)[into][:, into]


@cache
def recombined(coupling, channels: int) -> Operation:
    """What a message sends out, as paths: inputs and outputs for each kind (n, 2l+1, ladders or paths, channels)."""
    outputs = paths_out("out", coupling, channels, "row")

    def build(f: Formula, x: dict) -> dict:
        out = {}
        for k, kind in enumerate(coupling.out):
            matrix = recombination(coupling, k).tolist()
            components = [x[f"in{k}"][m * len(matrix) : (m + 1) * len(matrix)] for m in range(kind.dim)]
            out[f"out{k}"] = [_combined(f, row, component) for component in components for row in matrix]
        return out

    inputs = tuple(replace(o, name=o.name.replace("out", "in")) for o in outputs)
    return Operation(channels, inputs, outputs, build, edges=False)


@cache
def linear_message(coupling, channels: int, *, tabulated: bool = False, terms: tuple[Term, ...] = ()) -> Operation:
    """The linear message of `Message` on one block: inputs (N, 2l+1, channels) of senders for each kind, rho,
    harmonics, envelope and cues as in `message`; outputs (N, 2l+1, channels) for each kind."""
    n, n_paths = len(coupling.left), len(coupling.paths)
    dim = harmonics_in(coupling)

    def of_kinds(name, where):
        return [
            Operand(f"{name}{k}", k, "V", where, kind.dim * channels, tuple(m * channels for m in range(kind.dim)))
            for k, kind in enumerate(coupling.left)
        ]

    inputs = [
        *of_kinds("sender", "sender"),
        *_radial(n, n_paths, channels, tabulated),
        Operand("harmonics", n + 1 + tabulated, "S", "row", dim, tuple(range(dim))),
        Operand("envelope", n + 2 + tabulated, "S", "row", 1, (0,)),
        *_told(terms, n + 3 + tabulated),
    ]

    def build(f: Formula, x: dict) -> dict:
        ladders, (u,) = Ladders(f, coupling, x["harmonics"], _steering(f, x, terms)), x["envelope"]
        rho = _rho(f, x, radial_mixture(coupling, linear=True), tabulated=tabulated)
        feet = _weighed(f, rho, ladders.down([x[f"sender{k}"] for k in range(n)]))
        sums = [ladders.up(k, [(p, feet[p]) for p in paths_to(coupling, k)]) for k in range(len(coupling.out))]
        return {f"out{k}": [f.mul(u, v) for v in sums[k]] for k in range(len(sums))}

    return Operation(channels, tuple(inputs), tuple(of_kinds("out", "receiver")), build, edges=True)


@cache
def gate(kinds_, channels: int, silu: float, sigmoid: float) -> Operation:
    """`Gate`: inputs (n, 2l+1, channels) for each kind, with the gates of the others beside 0e's own channels."""
    scalar = kinds_.index(SCALAR)
    others = [k for k in range(len(kinds_)) if k != scalar]
    width = len(kinds_) * channels

    def plain(name, k):
        dim = kinds_[k].dim
        return Operand(f"{name}{k}", k, "V", "row", dim * channels, tuple(m * channels for m in range(dim)))

    inputs = [plain("x", k) for k in others]
    inputs.append(Operand("scalars", scalar, "V", "row", width, tuple(q * channels for q in range(len(kinds_)))))

    def build(f: Formula, x: dict) -> dict:
        own, *gates = x["scalars"]
        out = {f"out{scalar}": [f.mul(f.const(silu), own, f.sigmoid(own))]}
        for k, g in zip(others, gates, strict=True):
            opened = f.mul(f.const(sigmoid), f.sigmoid(g))
            out[f"out{k}"] = [f.mul(opened, v) for v in x[f"x{k}"]]
        return out

    outputs = tuple(plain("out", k) for k in range(len(kinds_)))
    return Operation(channels, tuple(inputs), outputs, build, edges=False)


@cache
def opened(dim: int, channels: int, sigmoid: float) -> Operation:
    """One kind of `gate` on its own: inputs (n, dim, channels) and its gates (n, channels)."""
    x = Operand("x", 0, "V", "row", dim * channels, tuple(m * channels for m in range(dim)))

    def build(f: Formula, values: dict) -> dict:
        g = f.mul(f.const(sigmoid), f.sigmoid(values["gate"][0]))
        return {"out": [f.mul(g, v) for v in values["x"]]}

    inputs = (x, Operand("gate", 1, "V", "row", channels, (0,)))
    return Operation(channels, inputs, (replace(x, name="out"),), build, edges=False)


@cache
def activation(channels: int, silu: float) -> Operation:
    """Scaled silu on (n, channels)."""

    def build(f: Formula, x: dict) -> dict:
        return {"y": [f.mul(f.const(silu), x["x"][0], f.sigmoid(x["x"][0]))]}

    one = Operand("x", 0, "V", "row", channels, (0,))
    return Operation(channels, (one,), (replace(one, name="y"),), build, edges=False)


@cache
def self_product(couplings, channels: int, scales, bound: float = 0.0) -> Operation:
    """Powers 2 ... of m with a weight per path: inputs m (n, 2l+1, channels) for each kind, weights (paths, channels)
    for each power; outputs for each power and kind (n, 2l+1, channels)."""
    kinds_ = couplings[0].left
    n = len(kinds_)

    def of_kinds(name, first, where):
        return [
            Operand(
                f"{name}{k}", first + k, "V", where, kind.dim * channels, tuple(m * channels for m in range(kind.dim))
            )
            for k, kind in enumerate(kinds_)
        ]

    inputs = of_kinds("m", 0, "row")
    outputs = []
    for q, coupling in enumerate(couplings):
        size = len(coupling.paths)
        inputs.append(Operand(f"w{q}", n + q, "V", "shared", 0, tuple(p * channels for p in range(size))))
        outputs += of_kinds(f"power{q}_", q * n, "row")

    def build(f: Formula, x: dict) -> dict:
        m = _bounded(f, [x[f"m{k}"] for k in range(n)], bound)
        flat = [v for row in m for v in row]
        current, out = m, {}
        for q, (coupling, scale) in enumerate(zip(couplings, scales, strict=True)):
            columns = path_columns(coupling)
            sums: list[list[list[Expr]]] = [[[] for _ in range(kind.dim)] for kind in kinds_]
            for p, path in enumerate(coupling.paths):
                table = coupling.tables[path.left].table
                weight = f.mul(f.const(scale), x[f"w{q}"][p])
                for mo, column in enumerate(columns[p]):
                    part = table[:, :, column]
                    entries = [(r, c, part[r, c].item()) for r, c in part.nonzero().tolist() if abs(part[r, c]) > 1e-12]
                    terms = [f.mul(f.const(v), f.mul(*_ordered(current[path.left][c], flat[r]))) for r, c, v in entries]
                    sums[path.out][mo].append(f.mul(weight, f.add(*terms)))
            current = [[f.add(*terms) for terms in kind] for kind in sums]
            for k in range(n):
                out[f"power{q}_{k}"] = current[k]
        return out

    return Operation(channels, tuple(inputs), tuple(outputs), build, edges=False)


def _bounded(f: Formula, m: list[list[Expr]], bound: float) -> list[list[Expr]]:
    """`interactions.bounded` of one channel."""
    if not bound:
        return m
    squares = [f.mul(v, v) for kind in m for v in kind]
    mean = f.mul(f.const(1 / (len(squares) * bound**2)), f.add(*squares))
    factor = f.function("reciprocal", f.function("sqrt", f.add(f.const(1.0), mean)))
    return [[f.mul(factor, v) for v in kind] for kind in m]


def _ordered(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    return (a, b) if a.index <= b.index else (b, a)
