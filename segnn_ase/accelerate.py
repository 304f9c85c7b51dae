"""Fused kernels are used only after they have reproduced plain PyTorch on a structure of the user's own."""

import warnings

import torch
from torch import Tensor

from segnn_ase.config import AccelerationError, AccelerationWarning, ConfigError
from segnn_ase.graph import Graph, edge_vectors, fragment, sum_over_structure_edges
from segnn_ase.kernels import CompilerError
from segnn_ase.potential import Potential, predict

MODES = ("auto", "off", "require")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest value
FRAGMENT = 256  # atoms; plain PyTorch on a large structure takes gigabytes


def accelerate(potential: Potential, graph: Graph, mode: str = "auto", *, training: bool = False) -> bool:
    """Let fused kernels do the work if they give what plain PyTorch gives on this graph; True if they do.

    Compared are energies, forces and virial, on a fragment of a large structure, and with `training` the
    gradient of a loss too. mode "auto" warns when they cannot be used and goes on in plain PyTorch,
    "require" raises AccelerationError, "off" never uses them.
    """
    if mode not in MODES:
        raise ConfigError(f"accelerate is {mode!r}; expected one of {', '.join(MODES)}")
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
    expected = _results(potential, part, training)
    try:
        potential.segnn.accelerate(True)
        problem = _difference(_results(potential, part, training), expected, potential)
    except CompilerError as error:
        problem = str(error)
    if problem is None:
        return True
    potential.segnn.accelerate(False)
    if mode == "require":
        raise AccelerationError(f"fused kernels are not used: {problem}")
    warnings.warn(f"fused kernels are not used, plain PyTorch is: {problem}", AccelerationWarning, stacklevel=3)
    return False


def _results(potential: Potential, graph: Graph, training: bool) -> dict[str, Tensor]:
    was_training = potential.training
    potential.train(training)
    p = predict(potential, graph, forces=True)
    virial = sum_over_structure_edges(edge_vectors(graph)[:, :, None] * p.edge_gradients[:, None], graph)
    results = {"energies": p.energies, "forces": p.forces, "virial": virial}
    if training:
        loss = p.energies.square().mean() + p.forces.square().mean()
        weights = [w for w in potential.parameters() if w.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        results["gradient of the loss"] = torch.cat([g.double().flatten() for g in gradients if g is not None])
    potential.train(was_training)
    return {name: x.detach() for name, x in results.items()}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], potential: Potential) -> str | None:
    """What differs by more than the tolerance, in words, or None."""
    tolerance = TOLERANCE[potential.dtype]
    for name, right in expected.items():
        if not right.numel():
            continue
        # E0 of thousands of eV must not hide an error of the network, nor a perfect crystal's zero forces inflate it
        size = max(max(potential.scales), float(right.abs().max()) if name != "energies" else 0.0)
        error = float((found[name] - right).abs().max()) / size
        if not error <= tolerance:
            return f"{name} differ by {error:.1e} of the largest value, more than {tolerance:.0e}"
    return None
