"""E(n) equivariant graph network with an update of the coordinates (Satorras et al., ICML 2021, arXiv 2102.09844)."""

import torch
from torch import Tensor, nn

from segnn_ase.model.scalars import MLP, Dense, sigmoid, silu

FIRST = 0.01  # of the usual size of weights: coordinates and features hardly move at first, where they would explode


class CoordinateUpdate(nn.Module):
    """One layer: m_ij = phi_e(h_i, h_j, d^2, a_ij) times a gate (eqs. 3, 8), x_i + mean_j r_ij phi_x(m_ij) +
    phi_v(h_i) v_i (eqs. 4, 7).

    With features h_i + phi_h(h_i, sum_j m_ij) is the next h (eqs. 5, 6), else h stays as it is.
    """

    def __init__(self, width: int, pair_scalars: int, *, features: bool):
        super().__init__()
        self.edge = MLP(2 * width + pair_scalars, width, width)
        self.gate = Dense(width, 1, bias=True)
        self.shift = MLP(width, width, 1)
        self.speed = MLP(width, width, 1)
        self.node = MLP(2 * width, width, width) if features else None
        for network in (self.shift, self.speed, self.node):
            if network is not None:
                network.last.weight.data.mul_(FIRST)

    def forward(
        self, h: Tensor, x: Tensor, v: Tensor, edge_src: Tensor, edge_dst: Tensor, scalars: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h (N, width); x, v (N, 3); edge_src, edge_dst (E,); scalars (E, n) besides the squared distance."""
        apart = x[edge_dst] - x[edge_src]
        squared = apart.square().sum(1, keepdim=True)
        m = silu(self.edge(torch.cat([h[edge_dst], h[edge_src], squared, scalars], dim=1)))
        m = m * sigmoid(self.gate(m))
        neighbors = torch.bincount(edge_dst, minlength=len(x)).clamp_min(1)[:, None]
        moved = torch.zeros_like(x).index_add(0, edge_dst, apart * self.shift(m)) / neighbors
        x = x + moved + self.speed(h) * v
        if self.node is not None:
            received = torch.zeros_like(h).index_add(0, edge_dst, m)
            h = h + self.node(torch.cat([h, received], dim=1))
        return h, x


class EGNN(nn.Module):
    """Positions later, from positions, velocities and invariants of bodies and pairs."""

    def __init__(self, width: int, layers: int, node_scalars: int, pair_scalars: int, *, features: bool):
        super().__init__()
        self.embedding = Dense(node_scalars, width, bias=True)
        self.layers = nn.ModuleList(
            CoordinateUpdate(width, 1 + pair_scalars, features=features and n < layers - 1) for n in range(layers)
        )

    def forward(
        self, nodes: Tensor, x: Tensor, v: Tensor, edge_src: Tensor, edge_dst: Tensor, scalars: Tensor
    ) -> Tensor:
        """nodes (N, node_scalars), scalars (E, pair_scalars)."""
        h = self.embedding(nodes)
        for layer in self.layers:
            h, x = layer(h, x, v, edge_src, edge_dst, scalars)
        return x
