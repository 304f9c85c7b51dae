"""Fused kernels are used only after they have reproduced plain PyTorch on a structure of the user's own."""

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.config import AccelerationError, AccelerationWarning, ConfigError
from segnn_ase.graph import Graph, edge_vectors, fragment, sum_over_structure_edges
from segnn_ase.kernels import CompilerError
from segnn_ase.potential import Potential, predict

MODES = ("auto", "off", "require")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the size of the terms
TABLE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
ROUNDING = 3  # times the error of plain PyTorch in float32 is still rounding
FRAGMENT = 64  # atoms; plain PyTorch on a large structure takes gigabytes


def accelerate(
    potential: Potential, graph: Graph, mode: str = "auto", *, training: bool = False, tables: bool = False
) -> bool:
    """Let fused kernels do the work if they give what plain PyTorch gives on this graph; True if they do.

    Compared are energies, forces and virial, on a fragment of a large structure, and with `training` the
    gradient of a loss too. With `tables`, for evaluation, the radial functions are then taken from tables, if
    the results stay the same within `TABLE_TOLERANCE`; the weights must not change afterwards.
    mode "auto" warns when they cannot be used and goes on in plain PyTorch, "require" raises AccelerationError,
    "off" never uses them.
    """
    if mode not in MODES:
        raise ConfigError(f"accelerate is {mode!r}; expected one of {', '.join(MODES)}")
    potential.compile_network(False)
    potential.segnn.accelerate(False)
    if mode == "off":
        return False
    if potential.device.type != "cpu":
        if mode == "require":
            raise AccelerationError(
                f"accelerate='require', but fused kernels run on the CPU, not on {potential.device}"
            )
        return False
    part = fragment(graph, FRAGMENT)
    plain = _results(potential, part, training)
    # in float32 plain PyTorch is not exact either: both are held against float64
    exact = plain if potential.dtype is torch.float64 else _results(_in_float64(potential), part, training)

    def problem_of(tolerance: float) -> str | None:
        return _difference(_results(potential, part, training), plain, exact, tolerance)

    try:
        potential.segnn.accelerate(True)
        problem = problem_of(TOLERANCE[potential.dtype])
        if problem is None and tables:
            potential.segnn.tabulate()
            potential.compile_network()
            problem = problem_of(TABLE_TOLERANCE[potential.dtype])
    except (CompilerError, ValueError) as error:
        problem = str(error)
    if problem is None:
        return True
    potential.compile_network(False)
    potential.segnn.accelerate(False)
    if mode == "require":
        raise AccelerationError(f"fused kernels are not used: {problem}")
    warnings.warn(f"fused kernels are not used, plain PyTorch is: {problem}", AccelerationWarning, stacklevel=3)
    return False


class Quantity(NamedTuple):
    """Something to compare, and the size of the terms it is a sum of: their rounding errors are what may differ."""

    value: Tensor
    size: float


def _results(potential: Potential, graph: Graph, training: bool) -> dict[str, Quantity]:
    was_training = potential.training
    potential.train(training)
    p = predict(potential, graph, forces=True)
    network = p.energies.detach() - torch.tensor(potential.reference_energies)[potential.species_index[graph.numbers]]
    virial = sum_over_structure_edges(edge_vectors(graph)[:, :, None] * p.edge_gradients[:, None], graph)
    scale = max(potential.scales)
    push = max(scale, float(p.edge_gradients.detach().abs().max())) if len(graph.edge_src) else scale
    results = {
        "energies": Quantity(p.energies, max(scale, float(network.abs().max()))),  # E0 of thousands of eV hide nothing
        "forces": Quantity(p.forces, push),
        "virial": Quantity(virial, push * potential.cutoff * max(len(graph.edge_src), 1) ** 0.5),
    }
    if training:
        loss = p.energies.square().mean() + p.forces.square().mean()
        weights = [w for w in potential.parameters() if w.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        flat = torch.cat([g.double().flatten() for g in gradients if g is not None])
        results["gradient of the loss"] = Quantity(flat, 10 * float(flat.abs().max()))
    potential.train(was_training)
    return results


def _in_float64(potential: Potential) -> Potential:
    twin = copy.deepcopy(potential)
    trained = [p.requires_grad for p in potential.parameters()]
    for parameter, on in zip(twin.double().parameters(), trained, strict=True):
        parameter.requires_grad_(on)
    return twin


def _difference(
    found: dict[str, Quantity], plain: dict[str, Quantity], exact: dict[str, Quantity], tolerance: float
) -> str | None:
    """What is wrong by more than the tolerance and by more than plain PyTorch is, in words, or None."""
    for name, (right, size) in exact.items():
        if right.numel():
            error, usual = (
                float((x[name].value - right).detach().abs().max()) / max(size, 1e-300) for x in (found, plain)
            )
            if not error <= max(tolerance, ROUNDING * usual):
                return f"{name} differ by {error:.1e} of their size, more than {tolerance:.0e}"
    return None
