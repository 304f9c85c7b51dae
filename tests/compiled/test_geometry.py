"""Geometry as formulas against PyTorch: values and two derivatives, from distance zero to beyond the cutoff."""

import math

import pytest
import torch

from segnn_ase.compiled import geometry
from segnn_ase.compiled.kernels import Topology, kernel
from segnn_ase.model import edges
from segnn_ase.model.irreps import spherical_harmonics

CUTOFF, KNOTS = 4.0, 64


def vectors() -> torch.Tensor:
    """Lengths from 0 to beyond the cutoff, more than fill some vectors of the machine."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(37, 3, dtype=torch.float64, generator=generator)
    lengths = torch.linspace(0.3, 1.2 * CUTOFF, len(r), dtype=torch.float64)
    r *= (lengths / r.norm(dim=1))[:, None]
    r[0] = 0.0  # two atoms on one spot
    return r.requires_grad_()


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def assert_same(found, expected, r: torch.Tensor) -> None:
    """Also the gradient of a sum with weights, and the gradient of its product with a direction."""
    generator = torch.Generator().manual_seed(1)
    derived = []
    for tensors in (found, expected):
        generator.manual_seed(1)
        total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in tensors)
        (g,) = torch.autograd.grad(total, r, create_graph=True)
        direction = torch.randn(g.shape, dtype=g.dtype, generator=generator)
        (second,) = torch.autograd.grad((g[1:] * direction[1:]).sum(), r, retain_graph=True)
        derived.append([*(x.detach() for x in tensors), g.detach(), second])
    for a, b in zip(*derived, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize("lmax", range(4))
def test_edges(lmax, tabulated):
    r = vectors()
    distance = edges.distance_of(r)
    expected = [spherical_harmonics(r / distance, lmax), edges.envelope(distance / CUTOFF)]
    given, knot = [r, number(1 / CUTOFF)], None
    if tabulated:
        scaled = distance.clamp_max(CUTOFF) * (KNOTS / CUTOFF)
        knot = scaled[:, 0].detach().long().clamp_max(KNOTS - 1)
        expected.append(scaled - knot[:, None])
        given += [number(KNOTS), torch.arange(KNOTS, dtype=torch.float64)]
    operation = geometry.edge_geometry(lmax, tabulated=tabulated)
    assert_same(kernel(operation)(Topology(len(r), knot=knot), *given), expected, r)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_radial_functions(n):
    r = vectors()
    expected = [edges.bessel(edges.distance_of(r), n, CUTOFF)]
    given = r, number(math.pi / CUTOFF), number(math.sqrt(2 / CUTOFF))
    assert_same(kernel(geometry.bessel_functions(n))(Topology(len(r)), *given), expected, r)


@pytest.mark.parametrize("lmax", range(4))
def test_attributes(lmax):
    """An atom without neighbours between others."""
    r, n = vectors(), 5
    receiver = torch.arange(len(r)).mul(n).div(len(r), rounding_mode="floor")
    receiver[receiver == 2] = 3
    first = torch.bincount(receiver, minlength=n).cumsum(0)
    topology = Topology(n, torch.cat([torch.zeros(1, dtype=torch.long), first]), torch.zeros_like(receiver))
    distance = edges.distance_of(r)
    harmonics, u = spherical_harmonics(r / distance, lmax), edges.envelope(distance / CUTOFF)

    class Sorted:
        envelope = u

        @staticmethod
        def sum_neighbors(x):
            return x.new_zeros(n, *x.shape[1:]).index_add(0, receiver, x)

    Sorted.harmonics = harmonics
    expected = [edges.node_attributes(Sorted, smooth=True)]
    (sums,) = kernel(geometry.neighbor_sums(lmax))(topology, harmonics, u)
    if lmax == 0:  # nothing moves
        torch.testing.assert_close(kernel(geometry.attributes(0))(Topology(n), sums)[0], expected[0])
    else:
        assert_same(kernel(geometry.attributes(lmax))(Topology(n), sums), expected, r)
