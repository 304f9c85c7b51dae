"""The layers' operations in compiled code, with first and second derivatives by autograd: for training on a GPU or on
many threads, and for what the compiled networks do not know."""

import torch
from torch import Tensor

from segnn_ase.compiled import formulas, steered_formulas
from segnn_ase.compiled.kernels import Topology, kernel
from segnn_ase.compiled.sorted_edges import SortedEdges, sorted_edges
from segnn_ase.model.cues import reach_of
from segnn_ase.model.interactions import Message, SelfProduct
from segnn_ase.model.irreps import Coupling, Features, Kind
from segnn_ase.model.layers import steered
from segnn_ase.model.network import SEGNN, Operations
from segnn_ase.model.scalars import SIGMOID_SCALE, SILU_SCALE


def fused_edges(
    network: SEGNN,
    vectors: Tensor,
    edge_src: Tensor,
    edge_dst: Tensor,
    n_atoms: int,
    edge_pair: Tensor | None,
    cues: Tensor | None = None,
) -> SortedEdges:
    c = network.config
    basis = {"cutoff": c.cutoff, "lmax": c.lmax_attr, "n_radial": c.n_radial}
    edges = sorted_edges(vectors, edge_src, edge_dst, n_atoms, edge_pair=edge_pair, **basis)
    if not network.message_terms:
        return edges
    return edges._replace(cues=cues[:, : reach_of(network.message_terms)], terms=network.message_terms)


def fused_message(message: Message, pair: Features, edges: SortedEdges) -> list[Features]:
    radial, received = message.factors(edges.radial), []
    for b, coupling in enumerate(message.couplings):
        tensors = [*_pair_block(message, pair, b), radial[b], edges.harmonics, edges.envelope]
        given: dict = {"terms": edges.terms}
        if message.linear:
            operation = formulas.linear_message(coupling, message.blocks.width(b), **given)
        else:
            operation = formulas.message(coupling, message.blocks.width(b), SILU_SCALE, SIGMOID_SCALE, **given)
            tensors += [message.mix[b], message.bias[b]]
        tensors += [] if edges.cues is None else [edges.cues]
        rows = kernel(operation)(edges.topology, *tensors)
        if not message.linear:
            rows = kernel(formulas.recombined(coupling, message.blocks.width(b)))(Topology(edges.topology.n), *rows)
        received.append(_by_component(rows, coupling.out))
    return received


def _pair_block(message: Message, pair: Features, b: int) -> Features:
    """The channels of one block, receiver's and sender's side by side."""
    if len(message.blocks.ranges) == 1:
        return pair
    halves = [pair] if message.linear else zip(*(x.chunk(2, dim=2) for x in pair), strict=True)
    blocks = [message.blocks.split(half)[b] for half in halves]
    return tuple(torch.cat(x, dim=2) for x in zip(*blocks, strict=True))


def fused_product(coupling: Coupling, f: Features, a: Tensor) -> Features:
    if len({x.shape[2] for x in f}) > 1:  # one operation has one number of channels
        return steered(coupling, f, a)
    return _by_component(
        kernel(steered_formulas.product(coupling, f[0].shape[2]))(Topology(len(a)), *f, a), coupling.out
    )


def fused_powers(product: SelfProduct, m: Features) -> list[Features]:
    results = []
    for b, block in enumerate(product.blocks.split(m)):
        operation = formulas.self_product(product.couplings(b), product.blocks.width(b), product.scales, product.bound)
        rows = kernel(operation)(Topology(len(m[0])), *block, *(w[b][0] for w in product.weights))
        results.append(_by_component(rows, product.blocks.kinds_of(b) * (product.order - 1)))
    powers = []
    for q in range(product.order - 1):
        blocks = [
            tuple(r[q * len(members) : (q + 1) * len(members)])
            for r, members in zip(results, product.blocks.members, strict=True)
        ]
        powers.append(product.blocks.join(blocks))
    return powers


def _by_component(rows: tuple[Tensor, ...], kinds_out: tuple[Kind, ...]) -> Features:
    """What an operation writes, (n, (2l+1) c) for each out kind, as (n, 2l+1, c)."""
    return tuple(x.unflatten(1, (kind.dim, x.shape[1] // kind.dim)) for x, kind in zip(rows, kinds_out, strict=True))


FUSED = Operations(fused_edges, fused_message, fused_product, fused_powers)
