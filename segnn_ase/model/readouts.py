"""What is read out of the features of atoms besides their energy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segnn_ase.model.irreps import Features, Kind, kinds, multiplicities, parse_irreps
from segnn_ase.model.scalars import Dense
from segnn_ase.model.settings import ModelConfig


class Readout(nn.Module):
    """One channel of some kinds of irreps from the features after every interaction: linear, (N, sum of 2l+1)."""

    def __init__(self, config: ModelConfig, read: tuple[Kind, ...]):
        super().__init__()
        irreps = parse_irreps(config.hidden_irreps)
        self.places = {kind: kinds(irreps).index(kind) for kind in read}
        widths = {kind: multiplicities(irreps)[k] for kind, k in self.places.items()}
        depth = range(config.interactions)
        self.layers = nn.ModuleList(nn.ModuleList(Dense(widths[kind], 1) for kind in read) for _ in depth)

    def forward(self, history: list[Features]) -> Tensor:
        rows = [
            torch.cat([dense(f[k])[:, :, 0] for dense, k in zip(layers, self.places.values(), strict=True)], dim=1)
            for layers, f in zip(self.layers, history, strict=True)
        ]
        return torch.stack(rows).sum(dim=0)


def columns_read(values: Tensor | None, sizes: Sequence[int]) -> "list[Tensor | None]":
    """What is read out (N, sum of sizes) by kinds of irreps."""
    return [None] * len(sizes) if values is None else [*values.split(list(sizes), dim=1)]
