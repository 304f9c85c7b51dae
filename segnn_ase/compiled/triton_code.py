"""Fused operations on a GPU: the formulas of `codegen.py` printed for Triton, with the same derivatives.

An edge operation has a program for each receiver (several where there are few receivers), whose lanes are the
channels: it goes through the receiver's edges with everything in registers. A node operation's programs share the
rows. What several programs add to goes there by atomic additions.
"""

from segnn_ase.compiled.derivatives import Operand, Operation, derive
from segnn_ase.compiled.expressions import Expr

_HEADER = """import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def rows({arguments}, ALONE: tl.constexpr):
    c = tl.arange(0, {block})
    zero = tl.zeros(({block},), dtype={dtype}.dtype.element_ty)
"""
_INDEX = {"row": "e", "pair": "q", "knot": "k", "receiver": "i", "sender": "j", "shared": "0"}
_LINKS = {"sender": ("j", "src"), "pair": ("q", "pair"), "knot": ("k", "knot")}


def block_size(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def triton_source(operation: Operation, order: int) -> str:
    """A Python module with the Triton kernel `rows` of an operation (order 0) or of its first or second derivative."""
    program = derive(operation, order)
    formula, channels = program.formula, operation.channels
    nothing = formula.const(0.0)  # rows are written, not added to: a missing gradient is a zero
    stores = [(o, c, nothing if e is None and o.overwrites else e) for o, c, e in program.stores]
    live = formula.needed([e for _, _, e in stores if e is not None])
    operands = {o.name: o for o in program.inputs}
    mask = "" if block_size(channels) == channels else f", mask=c < {channels}"
    n_in = 1 + max(o.tensor for o in program.inputs)
    n_out = {0: operation.n_outputs(), 1: operation.n_inputs(), 2: operation.n_inputs() + operation.n_outputs()}[order]

    def address(array: str, o: Operand, component: int) -> str:
        lanes = " + c" if o.level == "V" else ""
        return f"{array}{o.tensor} + {_INDEX[o.where]} * {o.size} + {o.offsets[component]}{lanes}"

    def name(e: Expr) -> str:
        return f"({e.args[0]!r})" if e.op == "const" else f"{e.level.lower()}{e.index}"

    def loaded(o: Operand, component: int) -> str:
        other = ", other=0.0" if mask and o.level == "V" else ""
        return f"tl.load({address('in', o, component)}{mask if o.level == 'V' else ''}{other})"

    def value(e: Expr) -> str:
        if e.op == "in":
            return loaded(operands[e.args[0]], e.args[1])
        if e.op == "sigmoid":
            return f"1.0 / (1.0 + tl.exp(-{name(e.args[0])}))"
        return {"add": " + ", "mul": " * ", "sum": " + "}[e.op].join(name(a) for a in e.args)

    fixed: list[str] = []  # before the rows
    body: list[str] = []  # for each row
    totals: list[str] = []  # of what is added up over rows
    last: list[str] = []  # after the rows
    kept = ("shared", "receiver") if operation.edges else ("shared",)

    def write(o: Operand, component: int, e: Expr) -> None:
        where, lanes = address("out", o, component), mask if o.level == "V" else ""
        what = name(e)
        if o.level == "V" and e.level == "S":
            what = f"zero + {what}"
        elif o.level == "S" and e.level == "R":
            what = f"tl.sum({what}, axis=0)"
        elif o.level == "S" and e.op == "const":
            what = f"tl.sum(zero, axis=0) + {what}"
        if o.where in kept:
            total = f"t{len(totals)}"
            totals.append(f"{total} = zero")
            body.append(f"{total} += {what}")
            if o.where == "shared":
                last.append(f"tl.atomic_add({where}, {total}{lanes})")
            else:  # no other program writes there, but the other parts of this receiver
                last.append("if ALONE:")
                last.append(f"    tl.store({where}, {total}{lanes})")
                last.append("else:")
                last.append(f"    tl.atomic_add({where}, {total}{lanes})")
        elif o.where != "row":
            body.append(f"tl.atomic_add({where}, {what}{lanes})")
        elif o.added:
            before = f"tl.load({where}{lanes}{', other=0.0' if lanes else ''})"
            body.append(f"tl.store({where}, {before} + {what}{lanes})")
        else:
            body.append(f"tl.store({where}, {what}{lanes})")

    waiting: dict[int, list[tuple[Operand, int]]] = {}
    for o, component, e in stores:
        if e is not None:
            waiting.setdefault(e.index, []).append((o, component))
    for e in live:
        if e.op != "const":
            place = fixed if e.op == "in" and operands[e.args[0]].where in kept else body
            place.append(f"{name(e)} = {value(e)}")
        for o, component in waiting.get(e.index, ()):
            write(o, component, e)

    used = {o.where for o in (*program.inputs, *(o for o, _, _ in stores))}
    links = [f"{index} = tl.load({array} + e)" for where, (index, array) in _LINKS.items() if where in used]
    if operation.edges:
        head = [
            "i = tl.program_id(0).to(tl.int64)",
            "low = tl.load(first + i)",
            "count = tl.load(first + i + 1) - low",
            "begin = low + count * tl.program_id(1) // tl.num_programs(1)",
            "end = low + count * (tl.program_id(1) + 1) // tl.num_programs(1)",
        ]
        loop = ["for e in range(begin, end):", *(f"    {link}" for link in links)]
    else:
        head = []
        loop = [
            "for e in range(tl.program_id(0).to(tl.int64), n, tl.num_programs(0)):",
            *(f"    {link}" for link in links),
        ]
    arguments = ["n", "first", "src", "pair", "knot"]
    arguments += [f"in{k}" for k in range(n_in)] + [f"out{k}" for k in range(n_out)]
    lines = [*head, *fixed, *totals, *loop, *(f"    {line}" for line in body), *last]
    dtype = f"in{program.inputs[0].tensor}"
    text = _HEADER.format(arguments=", ".join(arguments), block=block_size(channels), dtype=dtype)
    return text + "".join(f"    {line}\n" for line in lines)
