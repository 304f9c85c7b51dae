"""What processes that train one model do together: each the gradient and the errors of a part of the structures."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base import processes
from segnn_ase.base.errors import ConfigError
from segnn_ase.base.locks import only_writer
from segnn_ase.data.batches import Item, collate_items, edges_of, known_values
from segnn_ase.train.job import Gradient, Measure, Training, TrainingData, output_files
from segnn_ase.train.settings import Looped

SHARED = ("train", "valid", "test", "frames", "isolated")  # of the data: large, and in all processes already
IDLE = 0.15  # part of the processes' time that is told when it passes in waiting for the largest part


def join_for(config: Looped) -> None:
    """Join the processes that are to train this. Raises ConfigError where they are asked for different things."""
    processes.join(config.training.device)
    asked = processes.gathered(repr(config))
    if len(set(asked)) > 1:
        raise ConfigError(
            f"{len(asked)} processes that were started together have different settings; expected the same for all, as "
            "they train one model (trainings of their own are started apart, without RANK and WORLD_SIZE)"
        )


@contextmanager
def only_training(out: str) -> Iterator[None]:
    """Be the only training that writes these files; of several processes the first has the locks.

    Raises OutputError where another one is writing them.
    """
    with ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(only_writer([out, *output_files(out).values()])))
        yield


def begun_by_first(begin: Callable[[], Training], data: TrainingData) -> Training:
    """The training that the first process begins; all have the data already."""
    job = processes.on_first(lambda: _without_data(begin()))
    return job._replace(data=_with(job.data, data))


def widened_by_first(widen: Callable[[], TrainingData], data: TrainingData) -> TrainingData:
    """The data to which the first process adds something beside the frames."""
    return _with(processes.on_first(lambda: _without_frames(widen())), data)


def _without_data(job: Training) -> Training:
    return job._replace(data=_without_frames(job.data))


def _without_frames(data: TrainingData) -> TrainingData:
    return data._replace(**dict.fromkeys(SHARED))


def _with(found: TrainingData, data: TrainingData) -> TrainingData:
    return found._replace(**{name: getattr(data, name) for name in SHARED})


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
            f"{100 * idle:.0f} % of their time: for fewer and larger steps begin a training with a larger batch_size "
            "and max_edges, under another name of out"
        )
