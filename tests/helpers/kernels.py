"""Comparisons of compiled code with its slow twins."""

import copy

import torch

from segnn_ase.compiled.layers import fused_message
from segnn_ase.compiled.sorted_edges import sorted_edges
from segnn_ase.compiled.splines import DEGREE, radial_tables, spline_pieces
from segnn_ase.model.edges import make_edges
from segnn_ase.model.interactions import Message
from segnn_ase.model.irreps import parse_irreps, spherical_kinds
from segnn_ase.model.network import PLAIN, plain_edges
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator, predict
from segnn_ase.structure.graph import Graph

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
IRREPS = ["16x0e+16x1o", "5x0e+5x1o+5x2e", "7x0e+4x1o+2x2e+1x3o", "20x0e+3x0o+4x1e+6x1o", "33x0e"]


def everything(potential, graph: Graph, operations=None) -> dict[str, torch.Tensor]:
    """Energies, forces, stress and the gradient of a loss on all of them with respect to every weight."""
    potential.train()
    potential.requires_grad_(True)
    p = predict(potential, graph, forces=True, stress=True, operations=operations)
    loss = p.energies.square().sum() + p.forces.square().sum() + p.stress.nan_to_num().square().sum()
    gradients = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
    return {
        "energies": p.energies.detach(),
        "forces": p.forces.detach(),
        "stress": p.stress.detach().nan_to_num(),
        "gradient": torch.cat([g.flatten().double() for g in gradients if g is not None]),
    }


def assert_close(found, expected, tolerance: float) -> None:
    for name, right in expected.items():
        size = float(right.abs().max()) if right.numel() else 0.0
        assert float((found[name] - right).abs().max()) <= tolerance * max(size, 1e-3), name


def random_edges(n_atoms: int, n_edges: int, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_atoms + n_edges)
    vectors = torch.randn(n_edges, 3, generator=generator, dtype=torch.float64).to(dtype)
    ends = torch.randint(0, max(n_atoms, 1), (2, n_edges), generator=generator)
    return vectors, ends[0], ends[1]


def assert_fused_message_is_the_slow_one(irreps: str, n_atoms: int, n_edges: int, *, linear=False, device="cpu"):
    torch.manual_seed(0)
    layer = (
        Message(parse_irreps(irreps), spherical_kinds(2), linear=linear, n_radial=4, hidden=(8,)).double().to(device)
    )
    vectors, src, dst = (x.to(device) for x in random_edges(n_atoms, n_edges))
    f = tuple(torch.randn(n_atoms, ir.dim, m, dtype=torch.float64, device=device) for m, ir in parse_irreps(irreps))
    basis = {"cutoff": 4.0, "lmax": 2, "n_radial": 4}
    slow = layer(f, make_edges(vectors, src, dst, n_atoms, **basis))
    fast = layer(f, sorted_edges(vectors, src, dst, n_atoms, **basis), fused_message)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class SplineRadial(torch.nn.Module):
    """The splines of `compiled.splines` in plain PyTorch, of distances (n, 1) Å."""

    def __init__(self, coefficients: torch.Tensor, step: float, cutoff: float):
        super().__init__()
        self.coefficients, self.step, self.cutoff = coefficients, step, cutoff

    def forward(self, d: torch.Tensor) -> torch.Tensor:
        t = d.clamp_max(self.cutoff) / self.step
        knot = t.detach().long().clamp(0, len(self.coefficients) - DEGREE - 1)
        powers = torch.cat([(t - knot) ** n for n in range(DEGREE + 1)], 1)
        weights = powers @ torch.from_numpy(spline_pieces()).T.to(d)
        return sum(weights[:, q, None] * self.coefficients.to(d)[knot[:, 0] + q] for q in range(DEGREE + 1))


def tabulated_twin(potential: Potential) -> PlainEvaluator:
    """Plain PyTorch with the radial tables that compiled evaluation uses."""
    twin, tables = copy.deepcopy(potential), radial_tables(potential)

    def edges(*given):
        made = plain_edges(*given)
        return made._replace(radial=made.distance)

    for message, coefficients in zip(twin.segnn.messages, tables.coefficients, strict=True):
        message.radial = SplineRadial(coefficients, tables.step, potential.cutoff)
    return PlainEvaluator(twin, PLAIN._replace(edges=edges))
