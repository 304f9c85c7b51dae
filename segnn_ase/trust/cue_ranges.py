"""Which charges, moments and fields a potential has seen, and which are beyond."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.structure.cue_settings import FIELD, Cue
from segnn_ase.structure.graph import Graph

BEYOND = 0.5  # of the largest size seen, on either side


class BeyondRange(NamedTuple):
    """A cue that is larger or smaller than any in training."""

    name: str
    here: float
    seen: tuple[float, float]


def cue_ranges(graphs: Sequence[Graph], cues: Sequence[Cue]) -> Tensor:
    """Smallest and largest of each cue in some structures, of vectors their lengths, (cues, 2) in their units."""
    found = [[_values(graph, cues, n) for graph in graphs] for n in range(len(cues))]
    ends = [torch.stack([torch.stack([x.min(), x.max()]) for x in values]) for values in found]
    return torch.stack([torch.stack([x[:, 0].min(), x[:, 1].max()]) for x in ends]).double().cpu()


def _values(graph: Graph, cues: Sequence[Cue], n: int) -> Tensor:
    cue = cues[n]
    if cue.name == FIELD:
        return graph.batch.new_zeros(1).double() if graph.field is None else graph.field.norm(dim=1)
    first = sum(other.size for other in cues[:n])
    rows = graph.cues[:, first : first + cue.size].double() * cue.unit
    return rows.norm(dim=1) if cue.size > 1 else rows[:, 0] + (cue.name == "spin")


def both_ranges(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """What either covers; None where one is not known."""
    if new is None or old is None:
        return None
    return torch.stack([torch.minimum(new[:, 0], old[:, 0]), torch.maximum(new[:, 1], old[:, 1])], dim=1)


def beyond_ranges(graph: Graph, cues: Sequence[Cue], known: Tensor) -> list[BeyondRange]:
    """The cues of one structure that are beyond what is known by more than a margin."""
    found, here = [], cue_ranges([graph], cues)
    for cue, (low, high), (least, most) in zip(cues, known.tolist(), here.tolist(), strict=True):
        margin = BEYOND * max(abs(low), abs(high)) + 1e-9
        value = least if least < low - margin else most
        if not low - margin <= value <= high + margin:
            found.append(BeyondRange(cue.name, value, (low, high)))
    return found
