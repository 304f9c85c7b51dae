"""What processes that train one model do together: each the gradient and the errors of a part of the structures."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base import processes
from segnn_ase.data.batches import Item, collate_items, edges_of, known_values
from segnn_ase.train.job import Gradient, Measure

IDLE = 0.15  # part of the processes' time that is told when it passes in waiting for the largest part


def gradient_of_all(gradient: Gradient, weights: list[Tensor], items: list[Item]) -> float:
    """The loss of a batch; leaves its gradient in the weights of all processes, each of which has computed a part.

    The same as that of one process, but for rounding: means are over what is known in the whole batch.
    """
    if not processes.is_there():
        return gradient(collate_items(items), None)
    mine, whole = items[processes.own_part(edges_of(items))], np.sum([known_values([item]) for item in items], axis=0)
    value = gradient(collate_items(mine), tuple(whole.tolist())) if mine else 0.0
    return add_up(weights, value)


@torch.no_grad()
def add_up(weights: list[Tensor], value: float) -> float:
    """Add up gradients and losses of the processes. A weight of which nobody has a gradient has none then, too."""
    there = [0.0 if weight.grad is None else 1.0 for weight in weights]
    total, *users = processes.added_up(torch.tensor([value, *there], dtype=torch.float64)).tolist()
    used = [weight for weight, count in zip(weights, users, strict=True) if count]
    flat = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in used]
    sums = processes.added_up(torch.cat(flat)).split([w.numel() for w in used]) if used else []
    for weight, found in zip(used, sums, strict=True):
        weight.grad = found.view_as(weight)
    return total


def residuals_of_all(measure: Measure, items: list[Item]) -> dict[str, np.ndarray]:
    """What the measure finds of structures, in their order, each of which one process has evaluated."""
    mine = items[processes.own_part(edges_of(items))]
    parts = processes.gathered(measure.residuals(mine) if mine else {})
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


def tell_of_idle(items: list[Item], batches: list[list[int]], report: Callable) -> None:
    """Say so where batches are such that processes wait for each other for a good part of the time."""
    edges, count = edges_of(items), processes.how_many()
    if count == 1:
        return
    largest = 0
    for batch in batches:
        costs = [edges[n] for n in batch]
        ends = processes.cuts(costs, count)
        largest += max(sum(costs[low:high]) for low, high in pairwise(ends))
    idle = 1.0 - sum(edges) / max(count * largest, 1)
    report(f"{count} processes share each step")
    if idle > IDLE:
        structures = np.mean([len(batch) for batch in batches])
        report(
            f"a step of {structures:.1f} structures cannot be cut into {count} equal parts, and they wait for "
            f"{100 * idle:.0f} % of their time: raise batch_size and max_edges, for fewer and larger steps"
        )
