"""Processes that train one model together, as torchrun starts them: what they share. One alone shares nothing.

They exchange what is on the CPU by gloo, and what is on GPUs by NCCL (torch.distributed).
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import DeviceError, ProcessError, SEGNNError
from segnn_ase.base.launch import are_several

T = TypeVar("T")
LONGEST = timedelta(days=2)  # that one waits for others, as for the first while it reads; who dies is noticed at once
GONE = "another process of this training has ended, as it or its launcher says; "
GONE += "the same command goes on from what was saved last"


def is_there() -> bool:
    """Whether others have joined this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def how_many() -> int:
    return dist.get_world_size() if is_there() else 1


def rank() -> int:
    return dist.get_rank() if is_there() else 0


def is_first() -> bool:
    """Whether this is the one that reads, prints and writes."""
    return rank() == 0


def join(device: str) -> None:
    """Join those that torchrun started with this one, until it ends; each on a GPU of its own, where these are asked
    for. Raises DeviceError where there are too few.

    Where they have joined already, also by a script of the user's, nothing is done.
    """
    if not are_several() or not dist.is_available() or dist.is_initialized():
        return
    backend = "gloo"
    if resolve_device(device).type == "cuda":
        torch.cuda.set_device(own_gpu(device))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=LONGEST)
    atexit.register(dist.destroy_process_group)


def own_gpu(device: str) -> int:
    place, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if resolve_device(device).index is not None:
        raise DeviceError(
            f"device is {device!r}, for all processes; expected 'cuda', which gives each a GPU of its own"
        )
    if place >= there:
        raise DeviceError(
            f"process {place + 1} on this machine has no GPU, as there are {there}; start {there} of them"
        )
    return place


def on_first(work: Callable[[], T]) -> T:
    """What the first finds, for all; an error is raised by all. In pickles: nothing that is open."""
    if not is_there():
        return work()
    found: list = [None, None]
    if is_first():
        try:
            found[0] = work()
        except (SEGNNError, OSError, KeyboardInterrupt) as error:
            found[1] = error
    with told_of_gone():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        found[1].of_all = True  # see `launch.is_said`
        raise found[1]
    return found[0]


def any_of(*flags: bool) -> list[bool]:
    """Which of them are true in at least one process."""
    return (
        [count > 0 for count in added_up(torch.tensor(flags, dtype=torch.float64)).tolist()] if is_there() else [*flags]
    )


def added_up(values: Tensor) -> Tensor:
    """The sums over processes, in place; the same bits in all."""
    if is_there():
        with told_of_gone():
            dist.all_reduce(values)
    return values


def gathered(part: T) -> list[T]:
    """What each has, in their order."""
    if not is_there():
        return [part]
    parts: list = [None] * how_many()
    with told_of_gone():
        dist.all_gather_object(parts, part)
    return parts


def own_part(costs: list[int]) -> slice:
    """Which of things in a row are for this process: as many neighbours as make its part of all that they cost."""
    ends = cuts(costs, how_many())
    return slice(ends[rank()], ends[rank() + 1])


def cuts(costs: list[int], parts: int) -> list[int]:
    """Where to cut a row of things into parts that cost alike: `parts` + 1 places.

    The cheapest bound on a part that so many parts can keep, each of them filled up to it.
    """
    low, high = max([*costs, 1]), max(sum(costs), 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(costs, middle)) <= parts else (middle + 1, high)
    ends = filled(costs, low)
    return [0, *ends, *[len(costs)] * (parts - len(ends))]


def filled(costs: list[int], most: int) -> list[int]:
    """The ends of parts that cost no more."""
    ends, total = [], 0
    for n, cost in enumerate(costs):
        if total + cost > most:
            ends.append(n)
            total = 0
        total += cost
    return [*ends, len(costs)]


@contextmanager
def told_of_gone() -> Iterator[None]:
    """Turn what the library says when another one has died into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(f"process {rank() + 1} of {how_many()}: {GONE}") from error
