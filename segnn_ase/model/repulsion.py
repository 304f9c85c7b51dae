"""Core repulsion: what keeps atoms apart below the shortest distances of the training data.

There the network is blind, and what it makes up may attract: it sees the pairs of a core further apart than they are,
and no difference any more where the repulsion is at its full strength.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.model.coulomb import COULOMB
from segnn_ase.structure.graph import Graph

CORE_MARGIN = 0.95  # of the shortest distance seen: what lies just below it is still learned well
CORE_SWITCH = 0.25  # of the core radius: over this length the repulsion is switched on
CORE_BLUR = 0.1  # of the core radius: over this length the network ceases to see that a pair comes closer


class Core(NamedTuple):
    """The pairs of a graph that are closer than their core radius."""

    edges: Tensor | slice  # all of them on a GPU: a look at their number costs more than to evaluate all
    receivers: Tensor  # (E,), as all that follows of these edges alone
    numbers: tuple[Tensor, Tensor]  # of receivers and senders
    radii: Tensor  # Å


def core_of(graph: Graph, kind: Tensor, vectors: Tensor, radii: Tensor | None) -> Core | None:
    """None without a pair in the core; kind (N,): species; vectors r_ij (E, 3) Å; radii (species, species) Å or None.

    Without radii there is no core.
    """
    if radii is None:
        return None
    limits = radii[kind[graph.edge_dst], kind[graph.edge_src]]
    edges: Tensor | slice = slice(None)
    if vectors.device.type == "cpu":
        edges = (vectors.detach().square().sum(1) < limits.square()).nonzero()[:, 0]
        if not len(edges):
            return None
    receivers = graph.edge_dst[edges]
    return Core(edges, receivers, (graph.numbers[receivers], graph.numbers[graph.edge_src[edges]]), limits[edges])


def core_repulsion(vectors: Tensor, zi: Tensor, zj: Tensor, radii: Tensor) -> Tensor:
    """Repulsion of pairs closer than their core radius, (E,) eV, from r_ij (E, 3), atomic numbers, and radii (E,) Å.

    V = s Z_i Z_j e^2 / (4 pi eps_0 d) phi(d / a), a = 0.46850 Å / (Z_i^0.23 + Z_j^0.23), phi the universal
    screening function (Ziegler, Biersack, Littmark 1985). s goes from 0 at the core radius to 1 at
    `CORE_SWITCH` below it, with two continuous derivatives: y^3 (10 - 15 y + 6 y^2).
    """
    d = _length(vectors)
    zi, zj = zi.to(d), zj.to(d)  # a number times integers would be in single precision
    x = d * (zi**0.23 + zj**0.23) / 0.46850
    terms = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
    phi = sum(c * torch.exp(-b * x) for c, b in terms)
    y = _depth(d, radii, CORE_SWITCH * radii)
    return COULOMB * zi * zj / d * phi * y**3 * (10.0 - 15.0 * y + 6.0 * y**2)


def held_apart(vectors: Tensor, radii: Tensor) -> Tensor:
    """r_ij (E, 3) as the network sees it: along the same line, at a distance D(d) whose slope is 1 - s.

    D = max(d, R - w) + w y^4 (5/2 - 3 y + y^2) for the core radius R and w = `CORE_BLUR` R, three times continuously
    differentiable: d from R on, and R - w / 2 below R - w.
    """
    d, width = _length(vectors), CORE_BLUR * radii
    y = _depth(d, radii, width)
    seen = d.maximum(radii - width) + width * y**4 * (2.5 - 3.0 * y + y**2)
    return vectors * (seen / d)[:, None]


def seen_by_network(vectors: Tensor, core: Core | None) -> Tensor:
    """r_ij (E, 3) of all edges: those in the core `held_apart`, all others as they are."""
    if core is None:
        return vectors
    moved = held_apart(vectors[core.edges], core.radii)
    return moved if isinstance(core.edges, slice) else vectors.index_copy(0, core.edges, moved)


def with_repulsion(energies: Tensor, vectors: Tensor, core: Core | None) -> Tensor:
    """Atomic energies (N,) eV, float64, plus the receivers' halves of the repulsion, differentiable in `vectors`."""
    if core is None:
        return energies
    half = 0.5 * core_repulsion(vectors[core.edges], *core.numbers, core.radii)
    return energies.index_add(0, core.receivers, half.double())


def repelled(energies: Tensor, g: Tensor | None, vectors: Tensor, core: Core | None) -> tuple[Tensor, Tensor | None]:
    """The same where autograd knows nothing of the network: energies, and dE/dr_ij (E, 3) where it is asked for.

    g: the network's gradient with respect to the vectors that it has seen; the result is differentiable in it.
    """
    if core is None:
        return energies, g
    with torch.enable_grad():
        vectors = vectors.detach().requires_grad_()
        added = with_repulsion(torch.zeros_like(energies), vectors, core)
        if g is not None:
            outputs, weights = [added, seen_by_network(vectors, core)], [torch.ones_like(added), g]
            (g,) = torch.autograd.grad(outputs, vectors, weights, create_graph=g.requires_grad)
    return energies + added.detach(), g


def pulled_back(g: Tensor, vectors: Tensor, core: Core | None) -> Tensor:
    """d/dr_ij (E, 3) of what has the gradient g with respect to the vectors that the network has seen."""
    if core is None:
        return g
    with torch.enable_grad():
        vectors = vectors.detach().requires_grad_()
        (found,) = torch.autograd.grad(seen_by_network(vectors, core), vectors, g, create_graph=g.requires_grad)
    return found


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1).clamp_min(1e-12).sqrt()


def _depth(d: Tensor, radii: Tensor, width: Tensor) -> Tensor:
    """From 0 at the core radius to 1 where a pair is closer by `width`, and deeper."""
    return ((radii - d) / width).clamp(0.0, 1.0)
