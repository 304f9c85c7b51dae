"""Products with a node's attributes as formulas of one row, see `formulas.py`."""

from functools import cache

from segnn_ase.compiled.derivatives import Operand, Operation
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.compiled.formulas import path_columns, paths_out, paths_to, strided
from segnn_ase.model.irreps import SCALAR


def pairs_of_paths(embedding_, coupling) -> list[tuple[int, int]]:
    """Every path of a coupling with every one of an embedding that makes its left kind."""
    return [(p, e) for p, path in enumerate(coupling.paths) for e in paths_to(embedding_, path.left)]


def climbing(coupling) -> tuple[int, ...]:
    """The paths into kinds with more components: a linear map W of channels is fewer operations before them,
    (W x) (x) a, than behind, W (x (x) a)."""
    return tuple(p for p, (i, _, k) in enumerate(coupling.paths) if coupling.left[i].dim < coupling.out[k].dim)


def not_climbing(coupling) -> tuple[int, ...]:
    """The paths that are not `climbing`."""
    return tuple(sorted({*range(len(coupling.paths))} - {*climbing(coupling)}))


def _coupled(f: Formula, coupling, left: int, right: list[Expr]) -> list[list["Expr | None"]]:
    """Entries (2 l_left + 1, columns) of the matrix of one left kind, from the right factor's components."""
    table = coupling.tables[left].table  # (right dim, 2l+1, columns)
    return [
        [
            f.add(*(f.mul(f.const(c), right[r]) for r, c in enumerate(table[:, m, q].tolist()) if abs(c) > 1e-12))
            for q in range(table.shape[2])
        ]
        for m in range(table.shape[1])
    ]


def _apart(f: Formula, coupling, paths: tuple[int, ...], matrices, x) -> dict:
    """Paths of a product apart, laid out as (2l+1, paths) for each out kind."""
    out, columns = {}, path_columns(coupling)
    for k, kind in enumerate(coupling.out):
        into = [(p, coupling.paths[p].left) for p in paths if coupling.paths[p].out == k]
        out[f"out{k}"] = [
            f.add(*(f.mul(row[columns[p][m]], v) for row, v in zip(matrices[left], x[left], strict=True)))
            for m in range(kind.dim)
            for p, left in into
        ]
    return out


@cache
def product(coupling, channels: int, paths: "tuple[int, ...] | None" = None) -> Operation:
    """f (x) a on nodes, every path apart: inputs (n, 2l+1, channels) for each kind and a (n, dim). paths: the numbers
    of those that are wanted, None for all."""
    n = len(coupling.left)
    inputs = [
        Operand(f"f{k}", k, "V", "row", kind.dim * channels, tuple(m * channels for m in range(kind.dim)))
        for k, kind in enumerate(coupling.left)
    ]
    dim = sum(kind.dim for kind in coupling.right)
    inputs.append(Operand("a", n, "S", "row", dim, tuple(range(dim))))

    def build(f: Formula, x: dict) -> dict:
        matrices = [_coupled(f, coupling, k, x["a"]) for k in range(n)]
        chosen = tuple(range(len(coupling.paths))) if paths is None else paths
        return _apart(f, coupling, chosen, matrices, [x[f"f{k}"] for k in range(n)])

    return Operation(channels, tuple(inputs), paths_out("out", coupling, channels, "row", paths), build, edges=False)


@cache
def summed_product(coupling, channels: int, paths: tuple[int, ...]) -> Operation:
    """Sums of paths of products with a: an input (n, 2l+1, paths, channels) for each left kind that one of these paths
    begins at, each path with channels of its own, and a (n, dim); outputs (n, 2l+1, channels) for each kind."""
    begin: dict[int, list[int]] = {}
    for p in paths:
        begin.setdefault(coupling.paths[p].left, []).append(p)
    inputs = []
    for tensor, (left, group) in enumerate(begin.items()):
        rows, n = coupling.left[left].dim, len(group)
        for q, p in enumerate(group):
            offsets = tuple((m * n + q) * channels for m in range(rows))
            inputs.append(Operand(f"x{p}", tensor, "V", "row", rows * n * channels, offsets))
    dim = sum(kind.dim for kind in coupling.right)
    inputs.append(Operand("a", len(begin), "S", "row", dim, tuple(range(dim))))
    outputs = [
        Operand(f"out{k}", k, "V", "row", kind.dim * channels, strided(kind.dim, channels))
        for k, kind in enumerate(coupling.out)
    ]

    def build(f: Formula, x: dict) -> dict:
        matrices, columns = {i: _coupled(f, coupling, i, x["a"]) for i in begin}, path_columns(coupling)
        out = {}
        for k, kind in enumerate(coupling.out):
            into = [p for p in paths if coupling.paths[p].out == k]
            terms = [[*zip(matrices[coupling.paths[p].left], x[f"x{p}"], strict=True)] for p in into]
            out[f"out{k}"] = [
                f.add(*(f.mul(row[columns[p][m]], v) for p, rows in zip(into, terms, strict=True) for row, v in rows))
                for m in range(kind.dim)
            ]
        return out

    return Operation(channels, tuple(inputs), tuple(outputs), build, edges=False)


@cache
def embedding(coupling, channels: int) -> Operation:
    """Species features (x) a: inputs for each path (species, channels) at the atom's knot, the bias of 0e, a (n, dim);
    outputs (n, 2l+1, channels) for each kind, zero for those that no path reaches."""
    n, dim = len(coupling.paths), sum(kind.dim for kind in coupling.right)
    inputs = [Operand(f"w{p}", p, "V", "knot", channels, (0,), constant=True) for p in range(n)]
    inputs += [
        Operand("bias", n, "V", "shared", 0, (0,), constant=True),
        Operand("a", n + 1, "S", "row", dim, tuple(range(dim))),
    ]
    outputs = tuple(
        Operand(f"out{k}", k, "V", "row", kind.dim * channels, tuple(m * channels for m in range(kind.dim)))
        for k, kind in enumerate(coupling.out)
    )

    def build(f: Formula, x: dict) -> dict:
        (matrix,) = _coupled(f, coupling, 0, x["a"])
        columns = path_columns(coupling)
        out: dict = {}
        for k, kind in enumerate(coupling.out):
            into = paths_to(coupling, k)
            out[f"out{k}"] = [
                f.add(*(f.mul(matrix[columns[p][m]], x[f"w{p}"][0]) for p in into)) for m in range(kind.dim)
            ]
            if kind == SCALAR:
                out[f"out{k}"] = [f.add(out[f"out{k}"][0], x["bias"][0])]
        return out

    return Operation(channels, tuple(inputs), outputs, build, edges=False)


@cache
def embedded_product(embedding_, coupling, channels: int) -> Operation:
    """Sums over paths of f (x) a, for f of an `embedding`, with what each path makes of each of its paths: inputs table
    (species, pairs of paths, channels), bias (paths that begin at scalars, channels), a (n, dim); outputs as there."""
    left, pairs = coupling.left, pairs_of_paths(embedding_, coupling)
    n = max(len(pairs), 1)  # a table without columns is none
    scalars = [p for p, path in enumerate(coupling.paths) if left[path.left] == SCALAR]
    dim = sum(kind.dim for kind in coupling.right)
    inputs = (
        Operand("table", 0, "V", "knot", n * channels, strided(n, channels), constant=True),
        Operand("bias", 1, "V", "shared", 0, strided(len(scalars), channels), constant=True),
        Operand("a", 2, "S", "row", dim, tuple(range(dim))),
    )
    outputs = tuple(
        Operand(f"out{k}", k, "V", "row", kind.dim * channels, strided(kind.dim, channels))
        for k, kind in enumerate(coupling.out)
    )

    def build(f: Formula, x: dict) -> dict:
        (row,) = _coupled(f, embedding_, 0, x["a"])
        features = [[row[q] for q in columns] for columns in path_columns(embedding_)]
        matrices, columns = [_coupled(f, coupling, i, x["a"]) for i in range(len(left))], path_columns(coupling)
        out: dict = {f"out{k}": [None] * kind.dim for k, kind in enumerate(coupling.out)}
        for p, (i, _, k) in enumerate(coupling.paths):
            for m, q in enumerate(columns[p]):
                terms = [f.mul(matrices[i][0][q], x["bias"][scalars.index(p)])] if p in scalars else []
                for e in (e for own, e in pairs if own == p):
                    steered = f.add(*(f.mul(row[q], v) for row, v in zip(matrices[i], features[e], strict=True)))
                    terms.append(f.mul(steered, x["table"][pairs.index((p, e))]))
                out[f"out{k}"][m] = f.add(out[f"out{k}"][m], *terms[::-1])
        return out

    return Operation(channels, inputs, outputs, build, edges=False)
