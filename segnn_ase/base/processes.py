"""Processes that train one model together, as torchrun starts them: what they share. One alone shares nothing.

They exchange what is on the CPU by gloo, and what is on GPUs by NCCL (torch.distributed).
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, DeviceError, ProcessError
from segnn_ase.base.launch import are_several

T = TypeVar("T")
SOON = timedelta(minutes=5)  # in which all have come
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
    for. Raises DeviceError and ConfigError where that cannot be, ProcessError where some do not come.

    Where they have joined already, as by a script of the user's, they are taken as they are.
    """
    if not are_several() or (dist.is_available() and dist.is_initialized()):
        return
    if not dist.is_available():
        raise ProcessError("this PyTorch has no torch.distributed: unset RANK and WORLD_SIZE to train alone")
    backend = "gloo"
    if resolve_device(device).type == "cuda":
        torch.cuda.set_device(own_gpu(device))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, place, size = next(dist.rendezvous("env://", timeout=SOON))
        store.set(f"segnn {place}", "")
        store.wait([f"segnn {n}" for n in range(size)], SOON)
    except RuntimeError as error:
        raise ProcessError(
            f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, but not all of "
            f"{os.environ['WORLD_SIZE']} processes have come within {SOON}; unset them to train alone"
        ) from error
    dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=LONGEST)
    atexit.register(leave)


def leave() -> None:
    """At the end of this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_gpu(device: str) -> int:
    """Of the GPUs that this one sees; the only one where a scheduler shows each its own."""
    if resolve_device(device).index is not None:
        raise ConfigError(
            f"device is {device!r}, for all processes; expected 'cuda', which gives each a GPU of its own"
        )
    place, there = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if there == 1:
        return 0
    if place is None:
        raise ConfigError(
            "LOCAL_RANK is not set; expected the number of this process on its machine, as torchrun sets it"
        )
    if int(place) >= there:
        raise DeviceError(f"process {int(place) + 1} on this machine has no GPU, as there are {there}")
    return int(place)


def on_first(work: Callable[[], T]) -> T:
    """What the first finds, for all; an error is raised by all. Both go as pickles: nothing that is open."""
    if not is_there():
        return work()
    outcome, content = attempt(work) if is_first() else (None, b"")
    box = [content]
    with told_of_gone():
        dist.broadcast_object_list(box)
    found, error = pickle.loads(box[0]) if outcome is None else outcome
    if error is not None:
        error.of_all = True  # see `launch.is_said`
        raise error
    return found


def attempt(work: Callable[[], T]) -> tuple[tuple, bytes]:
    """What is found, or the error, and both for the others."""
    outcome: tuple = None, None
    try:
        outcome = work(), None
        return outcome, pickle.dumps(outcome)
    except (Exception, KeyboardInterrupt) as error:
        outcome = None, error
        try:
            return outcome, pickle.dumps(outcome)
        except Exception:
            return outcome, pickle.dumps((None, ProcessError(f"process 1: {type(error).__name__}: {error}")))


def wait_for_first() -> None:
    """Until it has written what it writes: a launcher ends all soon after one has ended."""
    on_first(lambda: None)


def any_of(*flags: bool) -> list[bool]:
    """Which of them are true in at least one process."""
    if not is_there():
        return [*flags]
    return [count > 0 for count in added_up(torch.tensor(flags, dtype=torch.float64)).tolist()]


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
    if parts == 1:
        return [0, len(costs)]
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
    """Turn what the library says, as a rule when another one has died, into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise ProcessError(f"process {rank() + 1} of {how_many()}: {GONE} ({first_line})") from error
