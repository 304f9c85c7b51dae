"""Labelled structures as tensors, and the loss of a prediction on them."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.base.errors import DataError, StructureError
from segnn_ase.data.frames import Frame
from segnn_ase.data.labels_of_cues import refuse_unknown_units
from segnn_ase.structure.cue_settings import CONJUGATES, FIELD, Cue, names_read
from segnn_ase.structure.cues import field_labels, gradient_of, told
from segnn_ase.structure.graph import collate, edge_vectors, graph_from_atoms, with_pairs
from segnn_ase.structure.told import Told, with_told


class Labels(NamedTuple):
    """Labels of a batch; NaN where a structure has none."""

    energy: Tensor  # (B,) eV
    forces: Tensor  # (N, 3) eV/Å
    stress: Tensor  # (B, 3, 3) eV/Å^3
    cue_gradients: Tensor  # (N, width) dE/dcues, eV; see `model.cues`
    dipole: Tensor  # (B, 3) e Å
    polarizability: Tensor  # (B, 3, 3) e Å^2/V
    born: Tensor  # (N, 3, 3) e, d mu_i / d r_j


class Item(NamedTuple):
    """A structure or a batch of them with its labels."""

    graph: Any  # `Graph`, or that of other bodies
    labels: Any  # `Labels`, or others
    atoms: Atoms | None = None  # of one structure


def make_item(frame: Frame, cutoff: float, cues: tuple[Cue, ...] = ()) -> Item:
    """A frame, `without_pull`, for a potential with this cutoff and cues; DataError for what it cannot be told."""
    n = len(frame.atoms)
    nan, told_of = float("nan"), frame.told or {}
    in_field = told_of if any(cue.name == FIELD for cue in cues) else {}
    labels = Labels(
        energy=torch.tensor([nan if frame.energy is None else frame.energy], dtype=torch.float64),
        forces=torch.full((n, 3), nan, dtype=torch.float64) if frame.forces is None else torch.tensor(frame.forces),
        stress=torch.full((1, 3, 3), nan, dtype=torch.float64)
        if frame.stress is None
        else torch.tensor(frame.stress)[None],
        cue_gradients=torch.zeros(n, 0, dtype=torch.float64),
        **{name: torch.from_numpy(value) for name, value in field_labels({}, n).items()},
    )
    atoms = frame.atoms
    try:
        refuse_unknown_units(told_of, frame.reading, cues)
        of_field = {name: torch.from_numpy(value) for name, value in field_labels(in_field, n).items()}
        labels = labels._replace(**of_field)
        if cues:
            names = names_read(cues)
            atoms = with_told(atoms, {key: value for key, value in told_of.items() if key[1] in names})
            labels = labels._replace(cue_gradients=_gradient_labels(atoms, told_of, cues))
        return Item(told(with_pairs(graph_from_atoms(atoms, cutoff)), atoms, cues), labels, atoms)
    except StructureError as error:
        raise DataError(f"{frame.source}: {error}") from error


def _gradient_labels(atoms: Atoms, told_of: Told, cues: tuple[Cue, ...]) -> Tensor:
    """Labels of the cues' conjugates, NaN where there are none."""
    parts = [np.zeros((len(atoms), 0))]
    for cue in (cue for cue in cues if cue.size):
        own = [value for (_, name), value in told_of.items() if name == CONJUGATES.get(cue.name, (None,))[0]]
        label = own[0] if own else None
        parts.append(np.full((len(atoms), cue.size), np.nan) if label is None else gradient_of(atoms, cue, label))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def collate_items(items: list[Item]) -> Item:
    labels = type(items[0].labels)(*(torch.cat(x) for x in zip(*(item.labels for item in items), strict=True)))
    return Item(collate([item.graph for item in items]), labels)


def known_values(items: list[Item]) -> list[int]:
    """How many numbers each kind of labels has."""
    return [sum(int(x.isfinite().sum()) for x in kind) for kind in zip(*(item.labels for item in items), strict=True)]


def edges_of(items: list[Item]) -> list[int]:
    """Directed pairs within the cutoff in each structure."""
    return [len(item.graph.edge_src) for item in items]


def cheapest(items: list[Item]) -> Item:
    """The structure with the fewest pairs, but some: on which compiled code is tried."""
    return min(items, key=lambda item: len(item.graph.edge_src) or math.inf)


def pack(order: list[int], edges: list[int], most: int, budget: int) -> list[list[int]]:
    """Batches of at most `most` structures and `budget` edges, in order; a structure with more is one of its own."""
    batches: list[list[int]] = []
    total = math.inf
    for n in order:
        if total + edges[n] > budget or len(batches[-1]) == most:
            batches.append([])
            total = 0
        batches[-1].append(n)
        total += edges[n]
    return batches


def smallest_distances(items: list[Item]) -> dict[tuple[int, int], float]:
    """The shortest distance of each pair of elements, Å."""
    smallest: dict[tuple[int, int], float] = {}
    for graph, *_ in items:
        distance = edge_vectors(graph).norm(dim=1)
        pairs = torch.stack([graph.numbers[graph.edge_src], graph.numbers[graph.edge_dst]]).sort(dim=0).values
        for pair in torch.unique(pairs, dim=1).T:
            d = float(distance[(pairs == pair[:, None]).all(dim=0)].min())
            key = tuple(pair.tolist())
            smallest[key] = min(d, smallest.get(key, math.inf))
    return smallest


def asked_for(labels: Labels) -> dict[str, bool]:
    asked = {name: bool(torch.isfinite(getattr(labels, name)).any()) for name in ("forces", "stress", "cue_gradients")}
    return {"forces": asked["forces"] or asked["cue_gradients"], "stress": asked["stress"]}
