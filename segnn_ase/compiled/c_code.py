"""Operations and their derivatives printed as C.

Channels are the vector lanes: everything in between stays in registers or on the stack, and no tensor of edges x paths
x channels reaches memory. The code of a row runs in three phases: scalars (level S), a loop over channels (V), then the
sums over channels (R), whose lanes are added up last. Without channels the rows, where they are independent, are the
lanes.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from numpy.polynomial import chebyshev

from segnn_ase.compiled.derivatives import Operand, Operation, derive
from segnn_ase.compiled.expressions import Expr

_NUMBERS = {
    torch.float32: {
        "REAL": "float",
        "LETTER": '"s"',  # of instructions
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
        "LETTER": '"d"',
        "INT": "int64_t",
        "LIMIT": "700.0",
        "MAGIC": "6755399441055744.0",
        "LN2_HIGH": "6.93147180369123816490e-01",
        "LN2_LOW": "1.90821492927058770002e-10",
        "BIAS": "1023",
        "MANTISSA": "52",
    },
}
_DEGREE = {torch.float32: 6, torch.float64: 11}  # of a polynomial for exp(-r): the error is below the last digit


@cache
def prelude(dtype: torch.dtype) -> str:
    """Vectors of the machine's width for C, and what acts on them."""
    *rest, last = _exponential(_DEGREE[dtype])
    horner = f"((V){{0}} + (T){last!r})"
    for coefficient in reversed(rest):
        horner = f"({horner}) * r + (T){coefficient!r}"
    numbers = {**_NUMBERS[dtype], "EXP_SERIES": horner}
    vectors = Path(__file__).with_name("vectors.h").read_text(encoding="utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in numbers.items()) + vectors


def _exponential(degree: int) -> list[float]:
    """Coefficients of a polynomial for exp(-r), |r| <= ln(2)/2: of its Chebyshev series, whose factors are Bessel
    functions I_n(ln(2)/2), as many as there are."""
    half = 0.5 * math.log(2.0)

    def bessel(n: int) -> float:
        return math.fsum((half / 2) ** (n + 2 * m) / (math.factorial(m) * math.factorial(n + m)) for m in range(9))

    series = [bessel(0), *(2 * (-1) ** n * bessel(n) for n in range(1, degree + 1))]
    return [float(c) / half**n for n, c in enumerate(chebyshev.cheb2poly(series))]


@cache
def c_source(operation: Operation, order: "int | str", dtype: torch.dtype) -> str:
    """The C code of one derivative of an operation: the function `rows`, and `run`, which shares it among threads."""
    return prelude(dtype) + rows_in_c(operation, order) + _RUN


def rows_in_c(operation: Operation, order: "int | str", name: str = "rows") -> str:
    """The function that does it for some rows, to stand behind a `prelude`."""
    text = _lanes_in_c(operation, order) if operation.rows_are_lanes else _CPrinter(operation, order).text()
    return text.replace("\nvoid rows(", f"\nvoid {name}(")


_INDEX = {"row": "e", "pair": "q", "knot": "k", "receiver": "i", "sender": "j", "shared": "0"}
_FUNCTIONS = {
    "sigmoid": "sigmoid({})",
    "sqrt": "root({})",
    "reciprocal": "1 / {}",
    "sin": "sine({})",
    "cos": "cosine({})",
    "max": "at_least({}, {})",
    "above": "above({}, {})",
}
_LINKS = {"j": ("sender", 1), "q": ("pair", 2), "k": ("knot", 3)}  # 0 where the operation has no use for one

# the body of the channel loop is printed once and used for full and for partial vectors
_ROWS = """
INLINE void channels_body({parameters}, const int n) {{
  {channels_body}
}}
void rows(int64_t low, int64_t high, const int64_t *const *links, const T *const *in, T *const *out) {{
  const int64_t *first = links[0];
  for (int64_t i = low; i < high; i++) {rows} {{
  const int64_t {indices};
  {places}
  {scalars}
  {sums}
  int64_t c = 0;
  _Pragma("GCC unroll 1") for (; c + W <= {channels}; c += W) {{
    __asm__ volatile("" : "+r"(c)); /* a loop, where the compiler would print its body twice and leave the cache */
    channels_body({given}, W);
  }}
  if ({channels} % W) {{ channels_body({given}, {channels} % W); }}
  {totals}
  }}
}}
"""
_LANES = """
INLINE void lanes_body(const int64_t e, const int64_t *const *links, const T *const *in, T *const *out, const int n) {{
  {body}
}}
void rows(int64_t low, int64_t high, const int64_t *const *links, const T *const *in, T *const *out) {{
  for (; low + W <= high; low += W) lanes_body(low, links, in, out, W);
  if (low < high) lanes_body(low, links, in, out, (int)(high - low));
}}
"""
_RUN = """
void run(int64_t parts, const int64_t *bounds, const int64_t *const *links, const T *const *in, T *const *out,
    int64_t n_out) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
#endif
  for (int64_t t = 0; t < parts; t++) rows(bounds[t], bounds[t + 1], links, in, out + t * n_out);
}
"""


class _CPrinter:
    """Prints the three phases of a row: scalars S, the body of the loop over channels V, and sums over channels R."""

    def __init__(self, operation: Operation, order: "int | str"):
        self.operation, program = operation, derive(operation, order)
        zero = program.formula.const(0.0)  # rows are written, not added to: a missing gradient is a zero
        stores = [(o, c, zero if e is None and o.overwrites else e) for o, c, e in program.stores]
        self.live = program.formula.needed([e for _, _, e in stores if e is not None])
        self.operands = {o.name: o for o in program.inputs}
        self.phases: dict[str, list[str]] = {"S": [], "V": [], "R": []}
        self.waiting: dict[int, list[tuple[Operand, int]]] = {}  # where a value goes
        for o, component, e in stores:
            if e is not None:
                self.waiting.setdefault(e.index, []).append((o, component))
        self.late = _late_terms(self.live, self.waiting)
        self.made: set[int] = set()
        self.places: dict[str, str] = {}  # where the rows of tensors with channels begin
        self.fetched: dict[tuple[str, int], str] = {}  # what the next edge needs of its sender

    def address(self, array: str, o: Operand, component: int) -> str:
        """Of a number; of the tensors with channels from where their rows begin, so that the rest is a constant."""
        row = f"{array}[{o.tensor}] + {_INDEX[o.where]} * {o.size}L"
        if o.level == "V":
            name = f"{array}{o.tensor}_{o.where}"
            self.places[name] = row
            if o.where == "sender":
                self.places[f"{name}_next"] = f"{array}[{o.tensor}] + next * {o.size}L"
                fetch = f"__builtin_prefetch({name}_next + {o.offsets[component]}, {int(array == 'out')});"
                self.fetched[name, component] = fetch
            row = name
        return f"{row} + {o.offsets[component]}"

    def name(self, e: Expr) -> str:
        if e.op == "in" and e.level == "V":  # read wherever it is used: to keep it would be to store it once more
            return f"load({self.address('in', self.operands[e.args[0]], e.args[1])}, n)"
        return f"((T){e.args[0]!r})" if e.op == "const" else f"{e.level.lower()}{e.index}"

    def value(self, e: Expr) -> str:
        if e.op == "in":
            place = self.address("in", self.operands[e.args[0]], e.args[1])
            return f"*({place})" if e.level == "S" else self.name(e)
        return _in_c(e, self.name)

    def write(self, e: Expr) -> None:
        for o, component in self.waiting.get(e.index, []):
            where = self.address("out", o, component)
            if o.level == "V":
                what = self.name(e) if e.level == "V" else f"(V){{0}} + {self.name(e)}"
                what = what if o.overwrites else f"load({where}, n) + {what}"
                self.phases["V"].append(f"store({where}, {what}, n);")
            else:
                what = f"lanes({self.name(e)})" if e.level == "R" else self.name(e)
                self.phases["R"].append(f"*({where}) {'=' if o.overwrites else '+='} {what};")

    def make(self, e: Expr) -> None:
        """Print what a V value needs, just before it is needed: few are alive at a time."""
        if e.level == "V" and e.op not in ("const", "in") and e.index not in self.made:
            self.made.add(e.index)
            for argument in e.given():
                self.make(argument)
            self.phases["V"].append(f"const V {self.name(e)} = {self.value(e)};")

    def add_up(self, total: Expr) -> None:
        """A sum over channels, stored once all its terms can be had."""
        terms = []
        for term in total.args:
            for needed in term.args if term.index in self.late else [term]:
                self.make(needed)
            terms.append(self.value(term) if term.index in self.late else self.name(term))
        to = f"*p_{self.name(total)}"
        self.phases["V"].append(f"{to} = {' + '.join([to, *terms])};")

    def begin(self) -> None:
        """Functions, side by side before all else: in each a step waits for the one before, and others can go on."""
        functions = [e for e in self.live if e.level == "V" and e.op in _FUNCTIONS]
        for needed in (a for e in functions for a in e.given()):
            self.make(needed)
        for e in functions:
            self.make(e)

    def print_phases(self) -> None:
        self.begin()
        due: dict[int, list[Expr]] = {}  # sums over channels by their last term
        for e in self.live:
            if e.op == "sum":
                due.setdefault(max(term.index for term in e.args), []).append(e)
        for e in self.live:
            if e.op not in ("const", "sum") and e.level != "V":
                kind = "T" if e.level == "S" else "V"
                self.phases[e.level].append(f"const {kind} {self.name(e)} = {self.value(e)};")
            for total in due.get(e.index, ()):
                self.add_up(total)
            if e.index in self.waiting:
                self.make(e)
                self.write(e)

    def text(self) -> str:
        self.print_phases()
        operation = self.operation
        scalars = [self.name(e) for e in self.live if e.level == "S" and e.op != "const"]
        sums = [self.name(e) for e in self.live if e.op == "sum"]
        used = {o.where for o in (*operation.inputs, *operation.outputs)}
        places = {n: f"links[{link}][e]" if where in used else "0" for n, (where, link) in _LINKS.items()}
        if self.fetched:
            places["next"] = "links[1][e + 1 < first[high] ? e + 1 : e]"
        one_row = "for (int64_t e = i; e <= i; e++)"
        rows = "for (int64_t e = first[i]; e < first[i + 1]; e++)" if operation.edges else one_row
        kinds = {name: "T *" if name.startswith("out") else "const T *" for name in self.places}
        parameters = [*(f"{kind}{x}" for x, kind in kinds.items()), *(f"const T {x}" for x in scalars)]
        given = ", ".join([*(f"{x} + c" for x in kinds), *scalars, *(f"&{x}" for x in sums)])
        body = {
            "parameters": ", ".join([*parameters, *(f"V *restrict p_{x}" for x in sums)]),
            "places": "\n  ".join(f"{kind}const {x} = {self.places[x]};" for x, kind in kinds.items()),
            "given": given,
            "rows": rows,
            "indices": ", ".join(f"{name} = {place}" for name, place in places.items()),
            "channels": operation.channels,
            "channels_body": "\n  ".join([*self.fetched.values(), *self.phases["V"]]),
            "scalars": "\n  ".join(self.phases["S"]),
            "sums": "\n  ".join(f"V {x} = {{0}};" for x in sums),
            "totals": "\n  ".join(self.phases["R"]),
        }
        return _ROWS.format(**body)


def _in_c(e: Expr, name: Callable[[Expr], str]) -> str:
    """A sum, product or function of values that have names."""
    if e.op in _FUNCTIONS:
        return _FUNCTIONS[e.op].format(*(name(a) if isinstance(a, Expr) else f"(T){a!r}" for a in e.args))
    return {"add": " + ", "mul": " * "}[e.op].join(map(name, e.args))


def _lanes_in_c(operation: Operation, order: "int | str") -> str:
    program, body = derive(operation, order), []
    operands = {o.name: o for o in program.inputs}

    def name(e: Expr) -> str:
        return f"((T){e.args[0]!r})" if e.op == "const" else f"v{e.index}"

    def read(e: Expr) -> str:
        o, component = operands[e.args[0]], e.args[1]
        if o.where == "row":
            return f"gathered(in[{o.tensor}] + e * {o.size}L + {o.offsets[component]}, {o.size}, n)"
        if o.where == "shared":
            return f"(V){{0}} + in[{o.tensor}][{o.offsets[component]}]"
        link = dict(_LINKS.values())[o.where]
        return f"picked(in[{o.tensor}] + {o.offsets[component]}, {o.size}, links[{link}] + e, n)"

    for e in program.formula.needed([e for _, _, e in program.stores if e is not None]):
        if e.op != "const":
            body.append(f"const V {name(e)} = {read(e) if e.op == 'in' else _in_c(e, name)};")
    for o, component, e in program.stores:
        if e is not None or o.overwrites:
            to = f"out[{o.tensor}] + e * {o.size}L + {o.offsets[component]}, {o.size}"
            what = f"(V){{0}} + {name(e)}" if e is not None else "(V){0}"
            body.append(f"scatter({to}, {what if o.overwrites else f'gathered({to}, n) + {what}'}, n);")
    return _LANES.format(body="\n  ".join(body))


def _late_terms(live: list[Expr], stored) -> set[int]:
    """Products that are terms of one sum over channels and nothing else: they are made where the sum is stored."""
    uses: dict[int, int] = {}
    for e in live:
        for argument in e.given():
            uses[argument.index] = uses.get(argument.index, 0) + 1
    terms = {term.index: term for e in live if e.op == "sum" for term in e.args}
    return {k for k, term in terms.items() if term.op == "mul" and uses[k] == 1 and k not in stored}
