"""Ladders of contractions against the Clebsch-Gordan matrices that they replace."""

from dataclasses import replace

import pytest
import torch

from segnn_ase.compiled.contractions import Ladders, mixture
from segnn_ase.compiled.derivatives import derive
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.compiled.steered_formulas import product
from segnn_ase.model.irreps import Coupling, Kind, spherical_harmonics, spherical_kinds

BOTH_PARITIES = tuple(Kind(l, p) for l in range(4) for p in (1, -1))


def values_of(f: Formula, wanted: list[Expr | None], inputs: dict[int, float]) -> list[float]:
    """Of a formula of sums and products."""
    found = dict(inputs)
    for e in f.needed([w for w in wanted if w is not None]):
        if e.op == "const":
            found[e.index] = e.args[0]
        elif e.op != "in":
            a, b = (found[x.index] for x in e.args)
            found[e.index] = a + b if e.op == "add" else a * b
    return [0.0 if w is None else found[w.index] for w in wanted]


@pytest.mark.parametrize("lmax", [2, 3, 6])
def test_ladders_make_every_path(lmax):
    coupling = Coupling(BOTH_PARITIES, spherical_kinds(lmax), BOTH_PARITIES, normalize=True)
    torch.manual_seed(lmax)
    unit = torch.nn.functional.normalize(torch.randn(1, 3, dtype=torch.float64))
    harmonics, x = spherical_harmonics(unit, lmax), [torch.randn(1, k.dim, 1).double() for k in coupling.left]
    expected = [p.flatten() for p in coupling.products(x, coupling.matrices(harmonics))]
    f = Formula()
    y = [f.input("y", n, "S") for n in range(harmonics.shape[1])]
    given = [[f.input(f"x{k}", m, "V") for m in range(kind.dim)] for k, kind in enumerate(coupling.left)]
    inputs = dict(zip((e.index for e in y), harmonics[0].tolist(), strict=True))
    for row, v in zip(given, x, strict=True):
        inputs |= dict(zip((e.index for e in row), v.flatten().tolist(), strict=True))
    ladders, part = Ladders(f, coupling, y), mixture(coupling)
    feet = ladders.down(given)
    climbed = [ladders.up(path.out, [(p, feet[p])]) for p, path in enumerate(coupling.paths)]
    found = [torch.tensor(values_of(f, v, inputs), dtype=torch.float64) for v in climbed]
    used = [0] * len(x)
    for p, path in enumerate(coupling.paths):
        width = coupling.out[path.out].dim
        right = expected[path.left][used[path.left] : used[path.left] + width]
        used[path.left] += width
        mixed = sum(c * found[q] for q, c in enumerate(part[p].tolist()) if c)
        torch.testing.assert_close(mixed, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("lmax", "attr"), [(1, 2), (2, 2), (2, 3), (3, 3), (3, 4)])
def test_ladders_take_fewer_operations_than_matrices(lmax, attr):
    kinds = spherical_kinds(lmax)
    coupling = Coupling(kinds, spherical_kinds(attr), kinds)

    def climbed(f: Formula, x: dict) -> dict:
        ladders, out = Ladders(f, coupling, x["a"]), {f"out{k}": [] for k in range(len(kinds))}
        feet = ladders.down([x[f"f{k}"] for k in range(len(kinds))])
        for p, path in enumerate(coupling.paths):
            out[f"out{path.out}"] += ladders.up(path.out, [(p, feet[p])])
        return out

    matrices = product(coupling, 4)
    for order in (0, 1):
        assert operations(replace(matrices, build=climbed), order) < operations(matrices, order)


def operations(operation, order: int) -> int:
    """On channels."""
    derivative = derive(operation, order)
    live = derivative.formula.needed([e for _, _, e in derivative.stores if e is not None])
    return sum(len(e.args) if e.op == "sum" else e.level == "V" for e in live if e.op not in ("in", "const"))
