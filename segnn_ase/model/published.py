"""What only the network as published has: its message, and heads that read out irreps (arXiv 2110.02905)."""

import torch
from torch import Tensor, nn

from segnn_ase.model.edges import Edges
from segnn_ase.model.irreps import SCALAR, Features, Irreps, Layout, kinds, parse_irreps, spherical_kinds
from segnn_ase.model.layers import Gate, Product, SteerableLinear
from segnn_ase.model.settings import ModelConfig


class PublishedMessage(nn.Module):
    """The message of the SEGNN paper (eq. 6): two gated steerable layers on f_i, f_j and d^2, summed over j.

    Further invariants of an edge (products of charges, say) are concatenated to d^2.
    """

    def __init__(self, irreps: Irreps, lmax: int, *, n_edge_scalars: int):
        super().__init__()
        attr = spherical_kinds(lmax)
        self.scalar = kinds(irreps).index(SCALAR)
        doubled = [(2 * mul + (1 + n_edge_scalars) * (k == self.scalar), ir) for k, (mul, ir) in enumerate(irreps)]
        self.gate = Gate(irreps)
        self.first = SteerableLinear(Irreps(doubled), attr, self.gate.irreps_in)
        self.second = SteerableLinear(irreps, attr, self.gate.irreps_in)

    def forward(
        self, f: Features, edges: Edges, edge_scalars: Tensor | None = None, product: Product | None = None
    ) -> Features:
        attributes = edges.harmonics
        extra = [edges.distance.square()] + ([] if edge_scalars is None else [edge_scalars])
        pairs = []
        for k, x in enumerate(f):
            zero = torch.zeros_like(x)
            pair = edges.from_pairs(torch.cat([x, zero], 2), torch.cat([zero, x], 2))
            pairs.append(torch.cat([pair, torch.cat(extra, 1)[:, None]], 2) if k == self.scalar else pair)
        h = self.gate(self.first(tuple(pairs), attributes, product))
        m = self.gate(self.second(h, attributes, product))
        return tuple(edges.sum_neighbors(x * edges.mask[:, :, None]) for x in m)


class SteerableHead(nn.Module):
    """Read irreps out of the last features, for every node or once for a graph (SEGNN paper, section 4).

    TP, gate, (mean over the graph's nodes,) then a linear map per irrep: forward returns
    (N or B, irreps_out.dim) in e3nn's layout of irreps_out as written.
    """

    def __init__(self, config: ModelConfig, irreps_out: "str | Irreps", *, level: str = "node"):
        super().__init__()
        if level not in ("node", "graph"):
            raise ValueError(f"level is {level!r}; expected 'node' or 'graph'")
        hidden, self.level = parse_irreps(config.hidden_irreps), level
        self.layout_out = Layout(irreps_out)
        attr = spherical_kinds(config.lmax_attr)
        self.gate = Gate(hidden)
        self.first = SteerableLinear(hidden, attr, self.gate.irreps_in)
        self.second = SteerableLinear(hidden, attr, self.layout_out.irreps)

    def forward(self, f: Features, node_attr: Tensor, batch: Tensor | None = None, n_graphs: int = 1) -> Tensor:
        out = self.layout_out.join(self.second(self.gate(self.first(f, node_attr)), node_attr))
        if self.level == "node":
            return out
        batch = torch.zeros(len(out), dtype=torch.long, device=out.device) if batch is None else batch
        total = out.new_zeros(n_graphs, out.shape[1]).index_add(0, batch, out)
        count = torch.bincount(batch, minlength=n_graphs).clamp_min(1)
        return total / count[:, None]
