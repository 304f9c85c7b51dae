"""A few structures kept in little room: what a potential was trained on, to be looked at when it is fine-tuned."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

MOST = 64  # structures
LARGE = 4  # times the median of their atoms
MOST_ATOMS = 8_000  # in all of them: 13 bytes each, a tenth of the file of a usual model


class StoredStructures(NamedTuple):
    """B structures of N atoms in all, without labels; positions are exact to the digits of single precision."""

    numbers: Tensor  # (N,) uint8, atomic numbers
    positions: Tensor  # (N, 3) Å, float32
    cells: Tensor  # (B, 3, 3) Å, float32
    pbc: Tensor  # (B, 3) bool
    sizes: Tensor  # (B,) int64, atoms of each

    def atoms(self) -> list[Atoms]:
        """The structures, for ASE."""
        parts = zip(
            *(x.split(self.sizes.tolist()) for x in (self.numbers, self.positions)), self.cells, self.pbc, strict=True
        )
        return [
            Atoms(numbers.numpy(), positions.double().numpy(), cell=cell.double().numpy(), pbc=pbc.numpy())
            for numbers, positions, cell, pbc in parts
        ]


def stored(structures: Sequence[Atoms], before: StoredStructures | None = None) -> StoredStructures | None:
    """Some of the structures, evenly from first to last, as files often come sorted by kind; None of none.

    before: of a potential that was fine-tuned: of both as many, where there are too many.
    """
    old, new = [] if before is None else before.atoms(), list(structures)
    half = max(MOST // 2, MOST - len(old))
    kept = _some(new, half, MOST_ATOMS // (2 if old else 1))
    kept = [*_some(old, MOST - len(kept), MOST_ATOMS - sum(map(len, kept))), *kept]
    if not kept:
        return None
    return StoredStructures(
        torch.cat([torch.tensor(a.numbers, dtype=torch.uint8) for a in kept]),
        torch.cat([torch.tensor(a.positions, dtype=torch.float32) for a in kept]),
        torch.stack([torch.tensor(a.cell.array, dtype=torch.float32) for a in kept]),
        torch.stack([torch.tensor(a.pbc) for a in kept]),
        torch.tensor([len(a) for a in kept]),
    )


def evenly(values: Sequence, most: int) -> list:
    """At most so many of the values, from first to last."""
    count = min(most, len(values))
    return [values[(2 * k + 1) * len(values) // (2 * count)] for k in range(count)]


def _some(structures: list[Atoms], most: int, atoms: int) -> list[Atoms]:
    """At most so many of the structures, with at most so many atoms in all, and then without those that are far larger
    than most, which would take the place of the others."""
    fitting = [one for one in structures if len(one) <= atoms]
    kept = evenly(fitting, most)
    if sum(map(len, kept)) > atoms:
        usual = statistics.median_low(map(len, fitting))
        fitting = [one for one in fitting if len(one) <= LARGE * usual]
        kept = evenly(fitting, most)
    while (total := sum(map(len, kept))) > atoms:
        kept = evenly(fitting, min(len(kept) * atoms // total, len(kept) - 1))
    return kept


def parse_stored(values: dict, species: Sequence[int]) -> StoredStructures:
    """The structures of a file. Raises TypeError, ValueError for what is none, and for other elements."""
    found = StoredStructures(**values)
    b, n = len(found.sizes), len(found.numbers)
    shapes = {"numbers": (n,), "positions": (n, 3), "cells": (b, 3, 3), "pbc": (b, 3), "sizes": (b,)}
    kinds = (torch.uint8, torch.float32, torch.float32, torch.bool, torch.int64)
    for tensor, (name, shape), kind in zip(found, shapes.items(), kinds, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != kind or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of the stored structures are {tuple(tensor.shape)}; expected {shape} of {kind}")
    if b == 0 or int(found.sizes.min()) < 1 or int(found.sizes.sum()) != n:
        raise ValueError(f"sizes of the stored structures are {found.sizes.tolist()}; expected {n} atoms in all")
    if not set(found.numbers.tolist()) <= set(species):
        raise ValueError("stored structures have elements that are not of the potential")
    return found
