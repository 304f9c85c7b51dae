"""Pictures of steerable features: the function on the sphere that a channel of an atom stands for, around the atom."""

import os
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from torch import Tensor

from segnn_ase.base.errors import expect
from segnn_ase.base.figures import Glyphs, plot_glyphs
from segnn_ase.model.elements import check_elements
from segnn_ase.model.irreps import kinds, parse_irreps, spherical_harmonics
from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import load_potential
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import graph_from_atoms

RESOLUTION = 32  # directions from pole to pole, and twice as many around


def draw_features(
    model: "str | Path | Potential",
    atoms: Atoms,
    path: "str | Path",
    *,
    interaction: int | None = None,
    channel: int | None = None,
) -> int:
    """Draw F_i(r) = sum_lm f_i,lm Y_lm(r) of one channel around each atom: its distance is |F|, its colour the sign.

    Under a rotation of the structure the picture turns, which is what steerable means. interaction: after which, 1 ...;
    the last if None. channel: the one with the largest part that is no sphere, if None; returned is which.
    Irreps that mirrors treat otherwise than spherical harmonics (1e, 2o) are left out. Raises ConfigError for numbers
    out of range and features that are scalars only, StructureError for elements that are unknown.
    """
    potential = model if isinstance(model, Potential) else load_potential(model)
    expect(isinstance(atoms, Atoms) and len(atoms) > 0, "atoms", atoms, "Atoms, at least one")
    expect(isinstance(path, str | os.PathLike), "path", path, "a path")
    check_elements(potential.symbols, potential.species, atoms.numbers)
    last = potential.config.interactions
    interaction = last if interaction is None else interaction
    expect(interaction in range(1, last + 1), "interaction", interaction, f"1 to {last}")
    features = steerable_features(potential, atoms, interaction)
    expect(max(features) > 0, "model", potential.config.hidden_irreps, "hidden_irreps with 1o, 2e, ...")
    channels = min(x.shape[2] for x in features.values())
    if channel is None:
        powers = [x.square().sum((0, 1))[:channels] for l, x in features.items() if l]
        channel = int(torch.stack(powers).sum(0).argmax())
    expect(channel in range(channels), "channel", channel, f"0 to {channels - 1}")
    directions = sphere()
    values = functions_of({l: x[:, :, channel] for l, x in features.items()}, directions)
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.15))
    bonds = [(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True) if a < b]
    plot_glyphs(path, Glyphs(atoms.positions, atoms.get_chemical_symbols(), bonds, directions, values))
    return channel


@torch.no_grad()
def steerable_features(potential: Potential, atoms: Atoms, interaction: int) -> dict[int, Tensor]:
    """Features after an interaction by degree, (N, 2l + 1, channels), of the irreps that are spherical harmonics."""
    graph = told(graph_from_atoms(atoms, potential.cutoff).to(potential.device), atoms, potential.config.cues)
    irreps = kinds(parse_irreps(potential.config.hidden_irreps))
    found = zip(irreps, potential.features(graph)[interaction - 1], strict=True)
    return {ir.l: x.cpu().double() for ir, x in found if ir.p == (-1) ** ir.l}


def sphere() -> np.ndarray:
    """Unit vectors (RESOLUTION, 2 RESOLUTION, 3)."""
    polar, around = np.linspace(0, np.pi, RESOLUTION), np.linspace(0, 2 * np.pi, 2 * RESOLUTION)
    x, y = (np.outer(np.sin(polar), f(around)) for f in (np.cos, np.sin))
    return np.stack([x, y, np.outer(np.cos(polar), np.ones_like(around))], axis=2)


def functions_of(features: dict[int, Tensor], directions: np.ndarray) -> np.ndarray:
    """sum_lm f_lm Y_lm (N, ...) in directions (..., 3), from components (N, 2l + 1) of each degree."""
    harmonics = spherical_harmonics(torch.as_tensor(directions).reshape(-1, 3), max(features))
    total = torch.stack([x @ harmonics[:, l**2 : (l + 1) ** 2].T for l, x in features.items()]).sum(0)
    return total.numpy().reshape(-1, *directions.shape[:-1])
