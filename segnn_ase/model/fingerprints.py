"""Fingerprints of what surrounds an atom, from geometry alone: what a network has learned to ignore it cannot miss.

Around atom i, over its neighbours j of each element s

    c_snlm = sum_j u(d_ij / r_c) T_n(2 d_ij / r_c - 1) Y_lm(r_ij)

with Chebyshev polynomials T_n. For each l the few mixtures of (s, n) that vary most (Goscinski, Musil, Pozdnyakov,
Nigam, Ceriotti, J. Chem. Phys. 155, 104106 (2021)) give the power spectrum p_lkk' = sum_m c_klm c_k'lm / (2l + 1)
(Bartok, Kondor, Csanyi, Phys. Rev. B 87, 184115 (2013)), whose principal components are the fingerprint. Invariant,
smooth, and the same for every network.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.model.edges import distance_of, envelope
from segnn_ase.model.irreps import spherical_harmonics
from segnn_ase.structure.graph import Graph, edge_vectors

RADIAL, LMAX = 6, 3
CHANNELS = 4  # for neighbours' elements; more elements are mixed into as many
MIXED, COMPONENTS = 8, 32
HARMONICS = (LMAX + 1) ** 2
RIDGE = 1e-4  # of the mean variance of the components: what varies less is no more than noise
STILL = 1e-4  # of the spectrum, likewise
SPECTRUM = MIXED + (LMAX + 1) * MIXED**2


Groups = list[tuple[int, Tensor]]  # elements and the atoms (n,) of each


class Fingerprints(NamedTuple):
    """How fingerprints are made, for each of S elements in the middle; C channels of elements around it."""

    channels: Tensor  # (S, C) of an element around it
    mixing: Tensor  # (S, LMAX + 1, C * RADIAL, MIXED)
    mean: Tensor  # (S, SPECTRUM)
    axes: Tensor  # (S, SPECTRUM, COMPONENTS)

    def of(self, c: Tensor, groups: Groups) -> Tensor:
        """(N, COMPONENTS) of atoms from their `coefficients`, and their elements."""
        out = c.new_zeros(len(c), COMPONENTS)
        for k, atoms in groups:
            p = power_spectra(c[atoms], self.mixing[k].to(c))
            out = out.index_copy(0, atoms, (p - self.mean[k].to(c)) @ self.axes[k].to(c))
        return out


def groups_of(kind: Tensor) -> Groups:
    """Of atoms whose elements are kind (N,)."""
    return [(k, (kind == k).nonzero()[:, 0]) for k in kind.unique().tolist()]


def element_channels(n_species: int) -> Tensor:
    """(S, C): one each, or where there are many, random directions, always the same."""
    if n_species <= CHANNELS:
        return torch.eye(n_species, dtype=torch.float64)
    rows = np.random.default_rng(0).normal(size=(n_species, CHANNELS))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def coefficients(graph: Graph, kind: Tensor, channels: Tensor, cutoff: float) -> Tensor:
    """c (N, C * RADIAL, HARMONICS) of the atoms of a graph, all of whose pairs are within the cutoff."""
    vectors = edge_vectors(graph).detach().double()
    d = distance_of(vectors)
    of_edges = radial_parts(d / cutoff, channels.to(vectors)[kind[graph.edge_src]])
    products = of_edges[:, :, None] * spherical_harmonics(vectors / d, LMAX)[:, None]
    return vectors.new_zeros(len(kind), *products.shape[1:]).index_add(0, graph.edge_dst, products)


def radial_parts(x: Tensor, channels: Tensor) -> Tensor:
    """(E, C * RADIAL) of pairs at x = d / cutoff (E, 1), for their senders' channels (E, C); zero beyond the cutoff."""
    chebyshev = [torch.ones_like(x), 2.0 * x - 1.0]
    while len(chebyshev) < RADIAL:
        chebyshev.append((4.0 * x - 2.0) * chebyshev[-1] - chebyshev[-2])
    radial = envelope(x) * torch.cat(chebyshev, 1)
    return (channels[:, :, None] * radial[:, None]).flatten(1)


def power_spectra(c: Tensor, mixing: Tensor) -> Tensor:
    """(n, SPECTRUM) of atoms of one element, from c (n, C * RADIAL, HARMONICS) and its mixing, see `Fingerprints`."""
    parts = [c[:, :, l * l : (l + 1) ** 2].transpose(1, 2) @ mixing[l] for l in range(LMAX + 1)]  # (n, 2l + 1, MIXED)
    squares = [(part.mT @ part).flatten(1) / (2 * l + 1) for l, part in enumerate(parts)]
    return torch.cat([parts[0][:, 0], *squares], 1)


def measure_fingerprints(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixing, mean and axes of one element, from c (n, C * RADIAL, HARMONICS) of atoms of it."""
    mixing = []
    for l in range(LMAX + 1):
        part = c[:, :, l * l : (l + 1) ** 2]
        _, vectors = torch.linalg.eigh(torch.einsum("ncm,ndm->cd", part, part))
        mixing.append(_last_columns(vectors, MIXED))
    mixed = torch.stack(mixing)
    p = power_spectra(c, mixed)
    mean = p.mean(0)
    variances, axes = torch.linalg.eigh((p - mean).T @ (p - mean) / max(len(p) - 1, 1))
    least = RIDGE * variances.sum() / COMPONENTS + STILL**2 * mean.square().sum()
    scale = (variances.clamp_min(0.0) + least).clamp_min(1e-300).rsqrt()
    return mixed, mean, _last_columns(axes * scale, COMPONENTS)


def _last_columns(x: Tensor, n: int) -> Tensor:
    """(rows, n), those that are not there zero."""
    return torch.nn.functional.pad(x[:, -n:], (max(0, n - x.shape[1]), 0))
