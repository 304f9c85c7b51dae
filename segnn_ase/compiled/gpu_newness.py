"""Newness of the surroundings of atoms (`model.newness`) on a GPU, in float32, of fixed sizes: it can be recorded."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from segnn_ase.compiled.derivatives import Operand, Operation
from segnn_ase.compiled.expressions import Formula
from segnn_ase.compiled.kernels import Topology, kernel
from segnn_ase.model.edges import distance_of, envelope
from segnn_ase.model.fingerprints import HARMONICS, LMAX, Groups, groups_of, radial_parts
from segnn_ase.model.irreps import spherical_harmonics
from segnn_ase.model.newness import KnownSurroundings, Newness, newness_of
from segnn_ase.structure.graph import Graph, edge_vectors


class GpuNewness:
    """What `model.newness.newness` gives, within the rounding of float32; pairs sorted by receiver. Raises
    CompilerError."""

    def __init__(self, known: KnownSurroundings, cutoff: float, device: torch.device):
        self.known, self._cutoff = known, cutoff
        self._there = _moved(known, device)
        self._lengths, self._limits = known.bonds.lengths().to(device), known.bonds.limits().to(device)

    def __call__(self, graph: Graph, kind: Tensor) -> Newness:
        return as_newness(self.measured(graph, kind, groups_of(kind)))

    def measured(self, graph: Graph, kind: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        """Newness of atoms (N,) and structure (S,), bonds (N, S), and the five numbers of `Newness`; groups: of the
        atoms that count."""
        c, bonds, crowding = self._sums(graph, kind)
        landscape = self._there.landscape
        atoms, structure = newness_of(landscape, landscape.fingerprints.of(c, groups), groups)
        counted = torch.cat([own for _, own in groups])
        fewest, most = self._limits[kind].unbind(2)
        broken = ((bonds < fewest) | (bonds > most))[counted].sum()
        numbers = [atoms[counted].max(), atoms[counted].mean(), structure.max(), crowding[counted].mean(), broken]
        return atoms, structure, bonds, torch.stack([x.double() for x in numbers])

    def _sums(self, graph: Graph, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over the neighbours of each atom: coefficients, bonds, crowding."""
        vectors = edge_vectors(graph).detach().float()
        d, sender, n_species = distance_of(vectors), kind[graph.edge_src], len(self._lengths)
        bonded = d[:, 0] < self._lengths[kind[graph.edge_dst], sender].float()
        one = torch.zeros(len(d), n_species, device=d.device).scatter_(1, sender[:, None], bonded[:, None].float())
        radial = radial_parts(d / self._cutoff, self._there.landscape.fingerprints.channels.float()[sender])
        parts = torch.cat([radial, one, envelope(d / self._cutoff)], 1)
        n, width = len(kind), parts.shape[1]
        first = torch.searchsorted(graph.edge_dst, torch.arange(n + 1, device=d.device))
        sums = parts.new_zeros(n, HARMONICS, width)
        inputs = [parts, spherical_harmonics(vectors / d, LMAX)]
        kernel(_outer_sums(width)).launch(0, Topology(n, first, graph.edge_src), inputs, [sums])
        c, bonds, crowding = sums.split([radial.shape[1], n_species, 1], 2)
        return c.mT, bonds[:, 0].round().long(), crowding[:, 0, 0]


def as_newness(found: tuple[Tensor, ...]) -> Newness:
    atoms, structure, bonds, numbers = (x.cpu() for x in found)
    return Newness(atoms.numpy(), structure.numpy(), bonds.numpy(), *numbers.tolist())


@cache
def _outer_sums(channels: int) -> Operation:
    """sum_j a_j (x) Y(r_ij) over the neighbours of each atom, (N, HARMONICS, channels)."""
    inputs = (
        Operand("parts", 0, "V", "row", channels, (0,)),
        Operand("harmonics", 1, "S", "row", HARMONICS, tuple(range(HARMONICS))),
    )
    places = tuple(m * channels for m in range(HARMONICS))
    outputs = (Operand("sums", 0, "V", "receiver", HARMONICS * channels, places),)

    def build(f: Formula, x: dict) -> dict:
        (a,) = x["parts"]
        return {"sums": [f.mul(a, y) for y in x["harmonics"]]}

    return Operation(channels, inputs, outputs, build, edges=True)


def _moved(x: Any, device: torch.device) -> Any:
    """A nested tuple of tensors with those on the device."""
    if isinstance(x, Tensor):
        return x.to(device)
    return type(x)(*(_moved(part, device) for part in x)) if hasattr(x, "_fields") else x
