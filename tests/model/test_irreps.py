"""Irreps, Clebsch-Gordan tables and harmonics against e3nn and brute-force contractions."""

import itertools
import re

import pytest
import torch
from e3nn import o3
from helpers.systems import float64_default, join_irreps, rotation, split_irreps, wigner

from segnn_ase.model.irreps import (
    Constant,
    Coupling,
    Irreps,
    Kind,
    clebsch_gordan,
    kinds,
    multiplicities,
    parse_irreps,
    spherical_harmonics,
    spherical_kinds,
)

DEGREES = [(l1, l2, l3) for l1 in range(5) for l2 in range(5) for l3 in range(abs(l1 - l2), min(l1 + l2, 5) + 1)]
BOTH_PARITIES = (Kind(0, 1), Kind(0, -1), Kind(1, 1), Kind(1, -1), Kind(2, 1))


def unit_vectors(n: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=1, keepdim=True)


def random_features(kinds, channels: int, n: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, k.dim, channels, dtype=torch.float64, generator=generator) for k in kinds)


@pytest.mark.parametrize("lmax", range(9))
def test_spherical_harmonics_equal_e3nn(lmax):
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    unit = torch.cat([unit_vectors(200), axes])
    expected = o3.spherical_harmonics(list(range(lmax + 1)), unit, normalize=False, normalization="component")
    torch.testing.assert_close(spherical_harmonics(unit, lmax), expected, rtol=0, atol=1e-12)


def test_spherical_harmonics_have_component_normalisation():
    harmonics = spherical_harmonics(unit_vectors(20), 4).split([1, 3, 5, 7, 9], dim=1)
    for l, y in enumerate(harmonics):
        torch.testing.assert_close(y.square().sum(1), torch.full((20,), 2.0 * l + 1, dtype=torch.float64))


def test_spherical_harmonics_in_float32_keep_the_dtype():
    unit = unit_vectors(50)
    y = spherical_harmonics(unit.float(), 3)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), spherical_harmonics(unit, 3), rtol=0, atol=3e-6)


def test_clebsch_gordan_equals_e3nn():
    for l1, l2 in itertools.product(range(9), repeat=2):
        for l3 in range(abs(l1 - l2), min(l1 + l2, 8) + 1):
            expected = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * (2 * l3 + 1) ** 0.5
            torch.testing.assert_close(clebsch_gordan(l1, l2, l3), expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize(("l1", "l2", "l3"), DEGREES)
def test_clebsch_gordan_is_orthonormal(l1, l2, l3):
    c = clebsch_gordan(l1, l2, l3)
    gram = torch.einsum("abm,abn->mn", c, c)
    torch.testing.assert_close(gram, torch.eye(2 * l3 + 1, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("l1", "l2", "l3"), DEGREES)
def test_clebsch_gordan_is_equivariant(l1, l2, l3):
    c = clebsch_gordan(l1, l2, l3)
    d1, d2, d3 = (wigner(l, 1, rotation(0)) for l in (l1, l2, l3))
    rotated_factors = torch.einsum("xa,yb,xym->abm", d1, d2, c)
    torch.testing.assert_close(rotated_factors, torch.einsum("mn,abn->abm", d3, c), rtol=0, atol=1e-12)


def test_clebsch_gordan_of_two_vectors_are_dot_and_cross_product():
    a, b = unit_vectors(2)
    dot, cross = (torch.einsum("a,b,abm->m", a, b, clebsch_gordan(1, 1, l)) for l in (0, 1))
    torch.testing.assert_close(dot.abs(), (a @ b).abs()[None] / 3**0.5)
    torch.testing.assert_close(cross.abs(), torch.linalg.cross(a, b).abs() / 2**0.5)


def brute_product(coupling, path, left, right):
    """One path by plain einsum over the Clebsch-Gordan table."""
    a, b, c = coupling.left[path.left], coupling.right[path.right], coupling.out[path.out]
    table = clebsch_gordan(a.l, b.l, c.l)
    return torch.einsum("nxc,nyc,xym->nmc", left[path.left], right[path.right], table)


def expected_sums(coupling, left, right, weights, normalize: bool):
    """Weighted sum over all paths into each out kind, or None where no path leads."""
    out = [None] * len(coupling.out)
    for number, path in enumerate(coupling.paths):
        term = brute_product(coupling, path, left, right) * weights[:, number, None]
        if normalize:
            term = term / sum(p.out == path.out for p in coupling.paths) ** 0.5
        out[path.out] = term if out[path.out] is None else out[path.out] + term
    return out


def assert_paths_equal(weighed, expected):
    for parts, total in zip(weighed, expected, strict=True):
        assert bool(parts) == (total is not None)
        if parts:
            torch.testing.assert_close(sum(parts), total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("left", [spherical_kinds(2), BOTH_PARITIES])
def test_coupling_with_a_vector_equals_brute_einsum(left, normalize):
    coupling = Coupling(left, spherical_kinds(3), left, normalize=normalize)
    f, right = random_features(left, 3), random_features(spherical_kinds(3), 1, seed=1)
    weights = torch.randn(4, len(coupling.paths), 3, dtype=torch.float64)
    products = coupling.products(f, coupling.matrices(torch.cat(right, dim=1)[:, :, 0]))
    right = tuple(x.expand(-1, -1, 3) for x in right)
    assert_paths_equal(coupling.weigh_paths(products, weights), expected_sums(coupling, f, right, weights, normalize))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kinds", [spherical_kinds(2), BOTH_PARITIES])
def test_channelwise_coupling_equals_brute_einsum(kinds, symmetric):
    coupling = Coupling(kinds, kinds, kinds, symmetric=symmetric)
    f = random_features(kinds, 3)
    weights = torch.randn(1, len(coupling.paths), 3, dtype=torch.float64)
    products = coupling.channelwise(f, torch.cat(f, dim=1))
    assert_paths_equal(coupling.weigh_paths(products, weights), expected_sums(coupling, f, f, weights, False))


@pytest.mark.parametrize("kinds", [spherical_kinds(3), BOTH_PARITIES])
def test_symmetric_coupling_drops_only_what_is_redundant(kinds):
    f = random_features(kinds, 2)
    full, symmetric = Coupling(kinds, kinds, kinds), Coupling(kinds, kinds, kinds, symmetric=True)
    for path in set(full.paths) - set(symmetric.paths):
        dropped = brute_product(full, path, f, f)
        mirrored = path._replace(left=path.right, right=path.left)
        if path.left == path.right:
            assert dropped.abs().max() < 1e-14
        else:
            assert mirrored in symmetric.paths
            torch.testing.assert_close(dropped.abs(), brute_product(full, mirrored, f, f).abs(), rtol=0, atol=1e-12)
    for path in symmetric.paths:
        assert brute_product(full, path, f, f).abs().max() > 1e-3


def test_coupling_lists_every_allowed_path_once():
    coupling = Coupling(BOTH_PARITIES, spherical_kinds(3), BOTH_PARITIES)
    allowed = {
        (i, j, k)
        for i, a in enumerate(coupling.left)
        for j, b in enumerate(coupling.right)
        for k, c in enumerate(coupling.out)
        if o3.Irrep(c.l, c.p) in list(o3.Irrep(a.l, a.p) * o3.Irrep(b.l, b.p))
    }
    assert set(map(tuple, coupling.paths)) == allowed
    assert len(coupling.paths) == len(allowed)


@pytest.mark.parametrize("irreps", ["3x0e+2x1o+4x2e", "2x0o+3x0e+1x1o+2x1e"])
def test_split_and_join_are_inverse_and_rotate_as_e3nn_says(irreps):
    irreps = parse_irreps(irreps)
    x = torch.randn(5, irreps.dim, dtype=torch.float64)
    matrix = rotation(3, improper=True)
    torch.testing.assert_close(join_irreps(split_irreps(x, irreps)), x, rtol=0, atol=0)
    blocks = split_irreps(x, irreps)
    assert [b.shape[1:] for b in blocks] == [
        (k.dim, m) for k, m in zip(kinds(irreps), multiplicities(irreps), strict=True)
    ]
    rotated = [
        torch.einsum("xy,nyc->nxc", wigner(ir.l, ir.p, matrix), b) for b, (_, ir) in zip(blocks, irreps, strict=True)
    ]
    with float64_default():
        expected = x @ o3.Irreps(irreps).D_from_matrix(torch.from_numpy(matrix)).T
    torch.testing.assert_close(join_irreps(tuple(rotated)), expected, rtol=0, atol=1e-12)


def test_parse_irreps_merges_equal_kinds_and_names_what_is_wrong():
    assert parse_irreps("1x0e+3x0e+2x1o") == Irreps("4x0e+2x1o")
    for wrong in ("banana", "32x0q", "-1x0e", "2x", "1x0e+", "1.5x0e", 32, [(1, 0)], [(1, "0e", 2)]):
        with pytest.raises(ValueError, match=re.escape(f"irreps is {wrong!r}; expected")):
            parse_irreps(wrong)


@pytest.mark.parametrize(
    "irreps", ["", "0e", "2x1o+1x0e", " 3 x 0e + 1o ", "1x1e+2x1o+0x2e+1x0o+4x1e", "5x2y+1x3y", "10x0o+10x10e", "0x0e"]
)
def test_irreps_are_read_and_written_as_in_e3nn(irreps):
    ours, theirs = Irreps(irreps), o3.Irreps(irreps)
    assert str(ours) == str(theirs) and ours.dim == theirs.dim
    assert [(mul, ir.l, ir.p, ir.dim) for mul, ir in ours] == [(mul, ir.l, ir.p, ir.dim) for mul, ir in theirs]
    assert Irreps(theirs) == ours and o3.Irreps(ours) == theirs
    assert str(parse_irreps(irreps)) == str(theirs.regroup()) == str(parse_irreps(theirs))


def test_constant_is_not_rounded_by_a_detour_through_float32():
    table = torch.tensor([1 / 3], dtype=torch.float64)
    constant = Constant(table)
    assert constant.like(torch.zeros(1)).dtype == torch.float32
    assert torch.equal(constant.like(torch.zeros(1, dtype=torch.float64)), table)


def test_kind_is_written_as_e3nn_writes_irreps():
    assert [str(k) for k in spherical_kinds(2)] == ["0e", "1o", "2e"]
