"""Core repulsion: what keeps atoms apart below the shortest distances of the training data."""

import torch
from torch import Tensor

from segnn_ase.structure.graph import Graph

_COULOMB = 14.399645478425668  # e^2 / (4 pi eps_0) in eV Å, CODATA 2018
CORE_MARGIN = 0.95  # of the shortest distance seen: what lies just below it is still learned well
CORE_SWITCH = 0.25  # of the core radius: over this length the repulsion is switched on


def core_repulsion(vectors: Tensor, zi: Tensor, zj: Tensor, radii: Tensor) -> Tensor:
    """Repulsion of pairs closer than their core radius, (E,) eV, from r_ij (E, 3), atomic numbers, and radii (E,) Å.

    V = s Z_i Z_j e^2 / (4 pi eps_0 d) phi(d / a), a = 0.46850 Å / (Z_i^0.23 + Z_j^0.23), phi the universal
    screening function (Ziegler, Biersack, Littmark 1985). s goes from 0 at the core radius to 1 at
    `CORE_SWITCH` below it, with two continuous derivatives: y^3 (10 - 15 y + 6 y^2).
    """
    d = vectors.square().sum(1).clamp_min(1e-12).sqrt()
    x = d * (zi.to(d) ** 0.23 + zj.to(d) ** 0.23) / 0.46850
    terms = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
    phi = sum(c * torch.exp(-b * x) for c, b in terms)
    y = ((radii - d) / (CORE_SWITCH * radii)).clamp(0.0, 1.0)
    return _COULOMB * zi * zj / d * phi * y**3 * (10.0 - 15.0 * y + 6.0 * y**2)


def with_repulsion(energies: Tensor, graph: Graph, kind: Tensor, vectors: Tensor, radii: Tensor | None) -> Tensor:
    """Atomic energies (N,) eV, float64, plus the receivers' halves of the repulsion, differentiable in `vectors`.

    kind (N,): species of the atoms; vectors r_ij (E, 3) Å; radii (species, species) Å, None for no repulsion.
    """
    close = None if radii is None else _close_pairs(graph, kind, vectors, radii)
    if close is None:
        return energies
    receivers, senders = graph.edge_dst[close], graph.edge_src[close]
    ends = graph.numbers[receivers], graph.numbers[senders]
    half = 0.5 * core_repulsion(vectors[close], *ends, radii[kind[receivers], kind[senders]])
    return energies.index_add(0, receivers, half.double())


def repelled(
    energies: Tensor, g: Tensor | None, graph: Graph, kind: Tensor, vectors: Tensor, radii: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same for results that autograd knows nothing of: energies, and g = dE/dr_ij (E, 3) where it is asked for."""
    with torch.enable_grad():
        vectors = vectors.detach().requires_grad_()
        none = torch.zeros_like(energies)
        added = with_repulsion(none, graph, kind, vectors, radii)
        if added is none:
            return energies, g
        slope = None if g is None else torch.autograd.grad(added.sum(), vectors)[0]
    return energies + added.detach(), slope if g is None else g + slope


def _close_pairs(graph: Graph, kind: Tensor, vectors: Tensor, radii: Tensor) -> "Tensor | slice | None":
    """Edges that are shorter than their core radius; None without any."""
    if vectors.device.type != "cpu":
        return slice(None)  # on a GPU a look at their number costs more than to evaluate all
    squares = radii[kind[graph.edge_dst], kind[graph.edge_src]].square()
    close = (vectors.detach().square().sum(1) < squares).nonzero()[:, 0]
    return close if len(close) else None
