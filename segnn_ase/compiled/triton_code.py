"""Fused operations on a GPU: the formulas of `formulas.py` printed for Triton, with the same derivatives.

An edge operation has a program for each receiver (several where there are few receivers), whose lanes are the
channels: it goes through the receiver's edges with everything in registers. A node operation's programs share the
rows. What several programs add to goes there by atomic additions. Without channels the rows, where they are
independent, are the lanes.
"""

from segnn_ase.compiled.derivatives import Operand, Operation, derive
from segnn_ase.compiled.expressions import Expr

_HEADER = """import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def {name}({arguments}):
    c = tl.arange(0, {block})
    zero = tl.zeros(({block},), dtype={dtype}.dtype.element_ty)
"""
_INDEX = {"row": "e", "pair": "q", "knot": "k", "receiver": "i", "sender": "j", "shared": "0"}
_EDGES = (
    "i = tl.program_id(0).to(tl.int64)",
    "low = tl.load(first + i)",
    "count = tl.load(first + i + 1) - low",
    "begin = low + count * tl.program_id(1) // tl.num_programs(1)",
    "end = low + count * (tl.program_id(1) + 1) // tl.num_programs(1)",
)
_LINKS = {"sender": ("j", "src"), "pair": ("q", "pair"), "knot": ("k", "knot")}


_FUNCTIONS = {
    "sigmoid": "1.0 / (1.0 + tl.exp(-{}))",
    "sqrt": "tl.sqrt({})",
    "reciprocal": "1.0 / {}",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "max": "tl.where({0} < {1}, {1}, {0})",  # NaN stays NaN
    "above": "tl.where({} < {}, 0.0, 1.0)",
}
ROWS = 128  # of a program where they are the lanes


def lanes_of(operation: Operation) -> int:
    """Of a program."""
    return ROWS if operation.rows_are_lanes else max(16, 1 << (operation.channels - 1).bit_length())


def triton_source(operation: Operation, order: "int | str") -> str:
    """A Python module with the kernel `KERNEL` of an operation or of a derivative, see `derivatives.derive`."""
    return _lanes_in_triton(operation, order) if operation.rows_are_lanes else _TritonPrinter(operation, order).text()


class _TritonPrinter:
    """Prints what happens before the rows, for each row, and behind them."""

    def __init__(self, operation: Operation, order: "int | str"):
        self.operation, self.order, program = operation, order, derive(operation, order)
        formula, channels = program.formula, operation.channels
        nothing = formula.const(0.0)  # rows are written, not added to: a missing gradient is a zero
        self.stores = [(o, c, nothing if e is None and o.overwrites else e) for o, c, e in program.stores]
        self.live = formula.needed([e for _, _, e in self.stores if e is not None])
        self.inputs, self.operands = program.inputs, {o.name: o for o in program.inputs}
        self.mask = "" if lanes_of(operation) == channels else f", mask=c < {channels}"
        self.fixed: list[str] = []  # before the rows
        self.body: list[str] = []  # for each row
        self.totals: list[str] = []  # of what is added up over rows
        self.last: list[str] = []  # after the rows
        self.kept = ("shared", "receiver") if operation.edges else ("shared",)

    def address(self, array: str, o: Operand, component: int) -> str:
        lanes = " + c" if o.level == "V" else ""
        return f"{array}{o.tensor} + {_INDEX[o.where]} * {o.size} + {o.offsets[component]}{lanes}"

    def loaded(self, place: str, level: str) -> str:
        other = ", other=0.0" if self.mask and level == "V" else ""
        return f"tl.load({place}{self.mask if level == 'V' else ''}{other})"

    def value(self, e: Expr) -> str:
        if e.op == "in":
            o = self.operands[e.args[0]]
            return self.loaded(self.address("in", o, e.args[1]), o.level)
        return _in_triton(e)

    def write(self, o: Operand, component: int, e: Expr) -> None:
        where, lanes, what = self.address("out", o, component), self.mask if o.level == "V" else "", _name(e)
        if o.level == "V" and e.level == "S":
            what = f"zero + {what}"
        elif o.level == "S" and e.level == "R":
            what = f"tl.sum({what}, axis=0)"
        elif o.level == "S" and e.op == "const":
            what = f"tl.sum(zero, axis=0) + {what}"
        if o.where in self.kept:
            self.add_up(o, where, what, lanes)
        elif o.where != "row":
            self.body.append(_added(where, what, lanes))
        else:
            before = f"{self.loaded(where, o.level)} + " if o.added else ""
            self.body.append(f"tl.store({where}, {before}{what}{lanes})")

    def add_up(self, o: Operand, where: str, what: str, lanes: str) -> None:
        total = f"t{len(self.totals)}"
        self.totals.append(f"{total} = zero")
        self.body.append(f"{total} += {what}")
        if o.level == "S":
            total = f"tl.max({total}, axis=0)"  # all lanes are equal
        if o.where == "shared" or self.also_sent(o):
            self.last.append(_added(where, total, lanes))
        else:  # no other program writes there, but the other parts of this receiver
            self.last += ["if tl.num_programs(1) == 1:", f"    tl.store({where}, {total}{lanes})"]
            self.last += ["else:", f"    {_added(where, total, lanes)}"]

    def also_sent(self, o: Operand) -> bool:
        """Whether senders write to the same numbers as this receiver, and other operations may have done so."""
        others = (x for x, _, _ in self.stores if x.where == "sender" and x.tensor == o.tensor)
        return any(not {*x.offsets}.isdisjoint(o.offsets) for x in others)

    def print_rows(self) -> None:
        waiting: dict[int, list[tuple[Operand, int]]] = {}
        for o, component, e in self.stores:
            if e is not None:
                waiting.setdefault(e.index, []).append((o, component))
        for e in self.live:
            if e.op != "const":
                outside = e.op == "in" and self.operands[e.args[0]].where in self.kept
                (self.fixed if outside else self.body).append(f"{_name(e)} = {self.value(e)}")
            for o, component in waiting.get(e.index, ()):
                self.write(o, component, e)

    def loop(self) -> list[str]:
        used = {o.where for o in (*self.inputs, *(o for o, _, _ in self.stores))}
        links = [f"    {index} = tl.load({array} + e)" for where, (index, array) in _LINKS.items() if where in used]
        if self.operation.edges:
            return ["for e in range(begin, end):", *links]
        return ["for e in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):", *links]

    def text(self) -> str:
        self.print_rows()
        operation = self.operation
        body = [*self.loop(), *(f"    {line}" for line in self.body)]
        lines = [*(_EDGES if operation.edges else ()), *self.fixed, *self.totals, *body, *self.last]
        return _source(operation, self.order, self.inputs, lanes_of(operation), lines)


def _source(operation: Operation, order: "int | str", inputs: list[Operand], block: int, lines: list[str]) -> str:
    n, m = operation.n_inputs(), operation.n_outputs()
    n_in = {0: n, 1: n + m, 2: 2 * n + m, "tangent": 2 * n, "dual": 2 * (n + m)}[order]
    n_out = {0: m, 1: n, 2: n + m, "tangent": m, "dual": n}[order]
    arguments = ["n", "first", "src", "pair", "knot"]
    arguments += [f"in{k}" for k in range(n_in)] + [f"out{k}" for k in range(n_out)]
    name = f"{operation.name}_{order}"
    head = _HEADER.format(name=name, arguments=", ".join(arguments), block=block, dtype=f"in{inputs[0].tensor}")
    return head + "".join(f"    {line}\n" for line in lines) + f"\n\nKERNEL = {name}\n"


def _lanes_in_triton(operation: Operation, order: "int | str") -> str:
    program = derive(operation, order)
    operands = {o.name: o for o in program.inputs}
    lines = [f"e = tl.program_id(0).to(tl.int64) * {ROWS} + c", "there = e < n"]
    lines += [
        f"{index} = tl.load({array} + e, mask=there, other=0)"
        for where, (index, array) in _LINKS.items()
        if any(o.where == where for o in program.inputs)
    ]
    for e in program.formula.needed([e for _, _, e in program.stores if e is not None]):
        if e.op == "in":
            o = operands[e.args[0]]
            place = f"in{o.tensor} + {_INDEX[o.where]} * {o.size} + {o.offsets[e.args[1]]}"
            mask = "" if o.where == "shared" else ", mask=there, other=1.0"
            lines.append(f"{_name(e)} = tl.load({place}{mask})")
        elif e.op != "const":
            lines.append(f"{_name(e)} = {_in_triton(e)}")
    for o, component, e in program.stores:
        if e is not None or o.overwrites:
            to = f"out{o.tensor} + e * {o.size} + {o.offsets[component]}"
            before = "zero" if o.overwrites else f"tl.load({to}, mask=there)"
            what = f"{before} + {_name(e)}" if e is not None else before
            lines.append(f"tl.store({to}, {what}, mask=there)")
    return _source(operation, order, program.inputs, ROWS, lines)


def _added(where: str, what: str, mask: str) -> str:
    # nothing reads it before the kernel's end; Triton's default is a fence each, which also empties the L1 cache
    return f'tl.atomic_add({where}, {what}{mask}, sem="relaxed")'


def _in_triton(e: Expr) -> str:
    """A sum, product or function of values that have names."""
    if e.op in _FUNCTIONS:
        return _FUNCTIONS[e.op].format(*(_name(a) if isinstance(a, Expr) else f"({a!r})" for a in e.args))
    return {"add": " + ", "mul": " * ", "sum": " + "}[e.op].join(_name(a) for a in e.args)


def _name(e: Expr) -> str:
    return f"({e.args[0]!r})" if e.op == "const" else f"{e.level.lower()}{e.index}"
