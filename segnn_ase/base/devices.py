"""Devices, precisions and threads."""

import os
from functools import cache

import torch

from segnn_ase.base.errors import DeviceError, expect

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(device: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda[:n]" into a device. Raises DeviceError for one that is absent."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if not isinstance(device, str | torch.device) or resolved is None or resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:0'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device is {device!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use device='cpu', or install a CUDA build of PyTorch"
        )
    return resolved


def resolve_dtype(dtype: "str | torch.dtype | None") -> torch.dtype | None:
    """Turn the name of a precision into that of PyTorch. Raises ConfigError for others than float32 and float64."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    known = dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values())
    expect(known, "dtype", dtype, "'float32', 'float64' or None")
    return dtype


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def one_thread_after_fork() -> None:
    """From now on a forked process has one thread: those of OpenMP do not follow, and it would wait for them for ever.

    Done when the first evaluator is made, never at import.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
