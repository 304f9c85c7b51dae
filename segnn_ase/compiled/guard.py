"""Compiled code held against plain PyTorch: how far apart results may be, and the layers of any network compared."""

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from segnn_ase.base.devices import one_thread_after_fork
from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled.layers import FUSED
from segnn_ase.model.network import Operations

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the size of the terms
ROUNDING = 10  # times the error of plain PyTorch in float32 is still rounding: passes cancel otherwise than autograd
SMALL = 1e-3  # of the largest gradient: those of weights below it are compared with its size, not their own

M = TypeVar("M", bound=nn.Module)
Outputs = Callable[[nn.Module, Operations | None], list[Tensor]]  # of a network, by these operations


class Quantity(NamedTuple):
    """Something to compare, and the size of the terms it is a sum of: their rounding errors are what may differ."""

    value: Tensor
    size: float


def difference(
    found: dict[str, Quantity],
    plain: Callable[[], dict[str, Quantity]],
    exact: dict[str, Quantity],
    tolerance: float,
) -> str | None:
    """What is wrong by more than the tolerance and by more than plain PyTorch is, in words, or None.

    plain: evaluated only where something is wrong by more than the tolerance. What cancels in the loss of all gradients
    is in each of them: the worst of plain PyTorch's counts.
    """
    usual = cache(lambda: _errors_by_family(plain(), exact))
    for name, (right, size) in exact.items():
        if name in found and right.numel():
            if found[name].value.shape != right.shape:
                return f"{name} are missing"
            error = _error_of(found[name].value, right, size)
            if not error <= tolerance and not error <= ROUNDING * usual()[_family(name)]:
                beside = f"and {ROUNDING} times what plain PyTorch does, {usual()[_family(name)]:.1e}"
                return f"{name} differ by {error:.1e} of their size, more than {tolerance:.0e} {beside}"
    return None


def _family(name: str) -> str:
    return name.partition(" ")[0]


def _errors_by_family(found: dict[str, Quantity], exact: dict[str, Quantity]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for name, (right, size) in exact.items():
        if name in found and right.numel():
            worst[_family(name)] = max(worst.get(_family(name), 0.0), _error_of(found[name].value, right, size))
    return worst


def _error_of(value: Tensor, right: Tensor, size: float) -> float:
    return float((value - right).detach().abs().max()) / max(size, 1e-300)


def gradients_of_weights(model: nn.Module) -> dict[str, Quantity]:
    """What a backward pass left in the weights that are trained, by their names."""
    trained = {name: w.grad for name, w in model.named_parameters() if w.requires_grad}
    largest = max((float(g.abs().max()) for g in trained.values() if g is not None and g.numel()), default=0.0)
    found = {}
    for name, g in trained.items():
        value = torch.zeros(1) if g is None or not g.numel() else g.double()
        size = 10 * max(float(value.abs().max()), SMALL * largest)
        found[f"gradients of {name}"] = Quantity(value, size)
    return found


def in_float64(model: M) -> M:
    trained = [p.requires_grad for p in model.parameters()]
    twin = copy.deepcopy(model).double()
    for parameter, on in zip(twin.parameters(), trained, strict=True):
        parameter.requires_grad_(on)
    return twin


def choose_layers(model: nn.Module, outputs: Outputs) -> Operations | None:
    """Compiled operations of the layers of a network, where they give what plain PyTorch gives; else None.

    Compared are the outputs and the gradient of the sum of their squares, weight by weight. Warns where they differ.
    """
    if next(model.parameters()).device.type not in ("cpu", "cuda"):
        return None
    one_thread_after_fork()
    dtype = next(model.parameters()).dtype
    exact = _of_outputs(in_float64(model), outputs, None)
    try:
        found = _of_outputs(model, outputs, FUSED)
        problem = difference(found, partial(_of_outputs, model, outputs, None), exact, TOLERANCE[dtype])
    except (AccelerationError, RuntimeError, ValueError) as error:  # also CUDA's
        problem = str(error)
    if problem is None:
        return FUSED
    warnings.warn(f"compiled layers: not used, as {problem}", AccelerationWarning, stacklevel=3)
    return None


def _of_outputs(model: nn.Module, outputs: Outputs, operations: Operations | None) -> dict[str, Quantity]:
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        values = outputs(model, operations)
        found = {f"output {k}": Quantity(v.detach(), float(v.detach().abs().max())) for k, v in enumerate(values)}
        if any(p.requires_grad for p in model.parameters()):
            sum(v.square().mean() for v in values).backward()
            found |= gradients_of_weights(model)
    model.zero_grad(set_to_none=True)
    return found
