"""Formulas of fused operations, their derivatives, and the C code that evaluates them.

An operation is written once, as the formula of one row (an edge or a node) in terms of `Expr`. Its first
and second derivatives are derived from that formula, and all three are printed as C. Channels are the
vector lanes: everything in between stays in registers or on the stack, and no tensor of edges x paths x
channels reaches memory.

Three kinds of values appear in a row: "S" scalars shared by all channels (harmonics, envelope), "V" one
number per channel, and "R" sums over channels still spread over the lanes (gradients of S). The code runs
in three phases: S values, a loop over channels for V, then R values, whose lanes are added up last.
"""

import math
from functools import cache
from importlib.resources import files

import torch

from segnn_ase.compiled.derivatives import Operand, Operation, derive
from segnn_ase.compiled.expressions import Expr

_NUMBERS = {
    torch.float32: {
        "REAL": "float",
        "INT": "int32_t",
        "LIMIT": "80.0",  # exp of it is still finite
        "MAGIC": "12582912.0",  # 1.5 * 2^MANTISSA: adding it rounds to an integer
        "LN2_HIGH": "0.693359375",  # exact times n
        "LN2_LOW": "-2.12194440e-4",  # the rest of ln 2
        "BIAS": "127",
        "MANTISSA": "23",
    },
    torch.float64: {
        "REAL": "double",
        "INT": "int64_t",
        "LIMIT": "700.0",
        "MAGIC": "6755399441055744.0",
        "LN2_HIGH": "6.93147180369123816490e-01",
        "LN2_LOW": "1.90821492927058770002e-10",
        "BIAS": "1023",
        "MANTISSA": "52",
    },
}
_TERMS = {torch.float32: 7, torch.float64: 13}  # of the exponential series: the rest is below the last digit


@cache
def prelude(dtype: torch.dtype) -> str:
    """Vectors of the machine's width for C, and what acts on them."""
    horner = f"((V){{0}} + (T){1.0 / math.factorial(_TERMS[dtype])!r})"
    for n in reversed(range(_TERMS[dtype])):
        horner = f"({horner}) * r + (T){1.0 / math.factorial(n)!r}"
    numbers = {**_NUMBERS[dtype], "EXP_SERIES": horner}
    vectors = files("segnn_ase.compiled").joinpath("vectors.h").read_text(encoding="utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in numbers.items()) + vectors


@cache
def c_source(operation: Operation, order: "int | str", dtype: torch.dtype) -> str:
    """The C code of one derivative of an operation."""
    program = derive(operation, order)
    zero = program.formula.const(0.0)  # rows are written, not added to: a missing gradient is a zero
    stores = [(o, c, zero if e is None and o.overwrites else e) for o, c, e in program.stores]
    live = program.formula.needed([e for _, _, e in stores if e is not None])
    operands = {o.name: o for o in program.inputs}
    index = {"row": "e", "pair": "q", "knot": "k", "receiver": "i", "sender": "j", "shared": "0"}

    def address(array: str, o: Operand, component: int) -> str:
        return f"{array}[{o.tensor}] + {index[o.where]} * {o.size}L + {o.offsets[component]}"

    def name(e: Expr) -> str:
        if e.op == "in" and e.level == "V":  # read wherever it is used: to keep it would be to store it once more
            return f"load({address('in', operands[e.args[0]], e.args[1])} + c, n)"
        return f"((T){e.args[0]!r})" if e.op == "const" else f"{e.level.lower()}{e.index}"

    def value(e: Expr) -> str:
        if e.op == "in":
            return f"*({address('in', operands[e.args[0]], e.args[1])})" if e.level == "S" else name(e)
        a = [name(x) for x in e.args]
        return {"add": " + ", "mul": " * "}[e.op].join(a) if e.op != "sigmoid" else f"sigmoid({a[0]})"

    phases: dict[str, list[str]] = {"S": [], "V": [], "R": []}
    sums = [name(e) for e in live if e.op == "sum"]
    waiting: dict[int, list[tuple[Operand, int]]] = {}
    for o, component, e in stores:
        if e is not None:
            waiting.setdefault(e.index, []).append((o, component))
    late = _late_terms(live, waiting)
    due: dict[int, list[Expr]] = {}  # sums over channels by their last term: stored once, when all can be had
    for e in live:
        if e.op == "sum":
            due.setdefault(max(term.index for term in e.args), []).append(e)

    def write(e: Expr) -> None:
        for o, component in waiting.get(e.index, []):
            where = address("out", o, component)
            if o.level == "V":
                what = f"{name(e)}" if e.level == "V" else f"(V){{0}} + {name(e)}"
                if o.overwrites:
                    phases["V"].append(f"store({where} + c, {what}, n);")
                else:
                    phases["V"].append(f"store({where} + c, load({where} + c, n) + {what}, n);")
            else:
                what = f"lanes({name(e)})" if e.level == "R" else name(e)
                phases["R"].append(f"*({where}) {'=' if o.overwrites else '+='} {what};")

    made: set[int] = set()

    def make(e: Expr) -> None:
        """Print what a V value needs, just before it is needed: few are alive at a time."""
        if e.level == "V" and e.op not in ("const", "in") and e.index not in made:
            made.add(e.index)
            for argument in e.args:
                make(argument)
            phases["V"].append(f"const V {name(e)} = {value(e)};")

    for e in live:
        if e.op not in ("const", "sum") and e.level != "V":
            phases[e.level].append(f"const {'T' if e.level == 'S' else 'V'} {name(e)} = {value(e)};")
        for total in due.get(e.index, ()):
            terms = []
            for term in total.args:
                for needed in term.args if term.index in late else [term]:
                    make(needed)
                terms.append(value(term) if term.index in late else name(term))
            phases["V"].append(f"*p_{name(total)} = {' + '.join([f'*p_{name(total)}', *terms])};")
        if e.index in waiting:
            make(e)
            write(e)

    channels = operation.channels
    scalars = [e for e in live if e.level == "S" and e.op != "const"]
    rows = (
        "for (int64_t e = first[i]; e < first[i + 1]; e++)" if operation.edges else "for (int64_t e = i; e <= i; e++)"
    )
    # indices of an edge: sender, pair, knot; 0 where the operation has no use for one
    used = {o.where for o in (*operation.inputs, *operation.outputs)}
    indices = {"j": ("sender", 1), "q": ("pair", 2), "k": ("knot", 3)}
    places = {n: f"links[{link}][e]" if where in used else "0" for n, (where, link) in indices.items()}
    # the body of the channel loop is printed once and used for full and for partial vectors
    pass_scalars = "".join(f", const T {name(e)}" for e in scalars)
    pass_sums = "".join(f", V *restrict p_{s}" for s in sums)
    call = (
        "channels_body(i, j, e, q, k, in, out, c, WIDTH"
        + "".join(f", {name(e)}" for e in scalars)
        + "".join(f", &{s}" for s in sums)
        + ");"
    )
    newline = "\n  "
    lines = [
        prelude(dtype),
        "INLINE void channels_body(int64_t i, int64_t j, int64_t e, int64_t q, int64_t k, "
        "const T *const *restrict in, T *const *restrict out, "
        f"const int c, const int n{pass_scalars}{pass_sums}) {{",
        "  " + newline.join(phases["V"]),
        "}",
        "void rows(int64_t low, int64_t high, const int64_t *const *links, const T *const *in, T *const *out) {",
        "  const int64_t *first = links[0];",
        f"  for (int64_t i = low; i < high; i++) {rows} {{",
        f"  const int64_t {', '.join(f'{name} = {place}' for name, place in places.items())};",
        "  " + newline.join(phases["S"]),
        "  " + newline.join(f"V {s} = {{0}};" for s in sums),
        "  int c = 0;",
        f'  _Pragma("GCC unroll 1") for (; c + W <= {channels}; c += W) {{ {call.replace("WIDTH", "W")} }}',
        f"  if ({channels} % W) {{ {call.replace('WIDTH', f'{channels} % W')} }}",
        "  " + newline.join(phases["R"]),
        "  }",
        "}",
        "void run(int64_t parts, const int64_t *bounds, const int64_t *const *links, "
        "const T *const *in, T *const *out, int64_t n_out) {",
        "#ifdef _OPENMP",
        "#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)",
        "#endif",
        "  for (int64_t t = 0; t < parts; t++) rows(bounds[t], bounds[t + 1], links, in, out + t * n_out);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _late_terms(live: list[Expr], stored) -> set[int]:
    """Products that are terms of one sum over channels and nothing else: they are made where the sum is stored."""
    uses: dict[int, int] = {}
    for e in live:
        for argument in e.args:
            if isinstance(argument, Expr):
                uses[argument.index] = uses.get(argument.index, 0) + 1
    terms = {term.index: term for e in live if e.op == "sum" for term in e.args}
    return {k for k, term in terms.items() if term.op == "mul" and uses[k] == 1 and k not in stored}
