"""How new the surroundings of atoms are: their fingerprints (`fingerprints.py`) against landmarks of the training.

Newness is the distance to the nearest landmark in units of its width, which says how far the surroundings in other
frames are from it: small in a crystal, large in a melt (a local outlier factor, Breunig, Kriegel, Ng, Sander, SIGMOD
2000). The same is done for mean and spread of the fingerprints of each element in a structure: they tell crystals apart
whose atoms look like those of a melt, and such atoms in a crystal. Besides, bonds are counted where the training tells
them from other pairs, and crowding tells a thin liquid or a cavity. `trust.novelty` measures all this;
`compiled.newness` is the fast way.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.model.edges import distance_of, envelope
from segnn_ase.model.fingerprints import Fingerprints, Groups, coefficients, groups_by_element
from segnn_ase.structure.graph import Graph, edge_vectors, within

NEVER = 2**30, -1  # fewest and most bonds of an element that was never seen
SPREAD, LEAST = 0.1, 0.1  # against means; in whitened units: thermal motion in a crystal


class Landmarks(NamedTuple):
    """Of each element, padded by repetition."""

    points: Tensor  # (S, M, COMPONENTS), of structures twice as wide
    widths: Tensor  # (S, M)


class Bonds(NamedTuple):
    """Pairs of elements whose distances leave a gap in training, between bonds and all that is further apart."""

    gaps: Tensor  # (S, S, 2) Å, the ends of the gap; zero where there is none
    counts: Tensor  # (S, S, 2) int64, fewest and most atoms of the second element bonded to one of the first

    def lengths(self) -> Tensor:
        """(S, S) Å, up to which two atoms are bonded; zero where that is not told apart."""
        return self.gaps.mean(2)

    def limits(self) -> Tensor:
        """(S, S, 2) int64, fewest and most, without limits where bonds are not told apart."""
        return torch.where(self.lengths()[:, :, None] > 0, self.counts, torch.tensor([0, 2**30]))


class Landscape(NamedTuple):
    """Where the fingerprints of the training lie."""

    fingerprints: Fingerprints
    atoms: Landmarks
    structures: Landmarks  # see `mean_and_spread`
    fewest: Tensor  # (S,) atoms of an element in a structure that has it: means of fewer scatter more
    limits: tuple[float, float, float]  # of the newness of any atom, of its mean, of the structure


class KnownSurroundings(NamedTuple):
    """What surrounded the atoms of the training structures."""

    landscape: Landscape
    bonds: Bonds
    crowding: tuple[float, float]  # smallest and largest mean sum of the envelopes of an atom's neighbours


class Newness(NamedTuple):
    """Of one structure."""

    atoms: np.ndarray  # (N,)
    structure: np.ndarray  # (S,), zero for elements that are not there
    bonds: np.ndarray  # (N, S) int64, atoms of each element that are bonded to this one
    largest: float  # of the atoms, and their mean
    mean: float
    most: float  # of the structure
    crowding: float
    broken: float  # numbers of bonds that are others than in training

    def used(self, limits: tuple[float, float, float]) -> tuple[float, float, float]:
        """How much of each limit of a landscape is used."""
        return self.largest / limits[0], self.mean / limits[1], self.most / limits[2]


def newness(of: KnownSurroundings, graph: Graph, kind: Tensor, cutoff: float) -> Newness:
    """Of one structure, in plain PyTorch; kind (N,): its elements."""
    graph = within(graph, cutoff)
    c = coefficients(graph, kind, of.landscape.fingerprints.channels, cutoff)
    groups = groups_by_element(kind)
    atoms, structure = newness_of(of.landscape, of.landscape.fingerprints.of(c, groups), groups)
    crowding = float(crowding_of(graph, cutoff).mean())
    bonds = bonds_of(graph, kind, of.bonds.lengths())
    fewest, most = of.bonds.limits().to(kind.device)[kind].unbind(2)
    broken = int(((bonds < fewest) | (bonds > most)).sum())
    each, of_elements, counts = (x.cpu().numpy() for x in (atoms, structure, bonds))
    return Newness(
        each, of_elements, counts, float(atoms.max()), float(atoms.mean()), float(structure.max()), crowding, broken
    )


def newness_of(of: Landscape, y: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Newness of atoms (N,) and of the structure (S,) from fingerprints y (N, COMPONENTS)."""
    atoms, structure = y.new_zeros(len(y)), y.new_zeros(len(of.fewest))
    for k, own in groups:
        atoms = atoms.index_copy(0, own, _to_nearest(of.atoms, k, y[own]))
        scatter = (of.fewest[k].to(y) / len(own)).clamp_min(1.0).sqrt()
        structure[k] = _to_nearest(of.structures, k, mean_and_spread(y[own])[None])[0] / scatter
    return atoms, structure


def mean_and_spread(y: Tensor) -> Tensor:
    """(2 COMPONENTS,) of the atoms of one element in a structure: the mean of their fingerprints y (n, COMPONENTS), and
    how far these spread, in a scale in which a few odd atoms in a crystal count."""
    spread = (y - y.mean(0)).square().mean(0).sqrt()
    return torch.cat([y.mean(0), SPREAD * torch.log(spread + LEAST)])


def _to_nearest(of: Landmarks, k: int, y: Tensor) -> Tensor:
    # the other mode takes differences of large squares
    d = torch.cdist(y, of.points[k].to(y), compute_mode="donot_use_mm_for_euclid_dist")
    return (d / of.widths[k].to(y)).amin(1)


def crowding_of(graph: Graph, cutoff: float) -> Tensor:
    """sum_j u(d_ij) (N,) of the atoms of a graph within the cutoff: their number of neighbours, smoothly."""
    u = envelope(distance_of(edge_vectors(graph).detach().double()) / cutoff)[:, 0]
    return u.new_zeros(len(graph.numbers)).index_add(0, graph.edge_dst, u)


def bonds_of(graph: Graph, kind: Tensor, lengths: Tensor) -> Tensor:
    """(N, S) int64: how many atoms of each element are closer than these lengths (S, S) Å."""
    d = edge_vectors(graph).detach().norm(dim=1)
    sender = kind[graph.edge_src]
    bonded = d < lengths.to(d)[kind[graph.edge_dst], sender]
    one = torch.zeros(len(d), len(lengths), dtype=torch.long, device=d.device).scatter_(1, sender[:, None], 1)
    return one.new_zeros(len(kind), len(lengths)).index_add(0, graph.edge_dst, one * bonded[:, None])
