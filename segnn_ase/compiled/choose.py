"""Compiled code is used only after it has reproduced plain PyTorch on a structure of the user's own."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.base.errors import AccelerationError, AccelerationWarning, ConfigError
from segnn_ase.compiled.build import CompilerError
from segnn_ase.compiled.cpu_training import TrainingEngine
from segnn_ase.compiled.passes import supported
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import assemble, predict
from segnn_ase.structure.graph import Graph, edge_vectors, fragment, sum_over_structure_edges, within

MODES = ("auto", "off", "require")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the size of the terms
TABLE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
ROUNDING = 3  # times the error of plain PyTorch in float32 is still rounding
CERTAIN = 1 - 1e-9  # of the cutoff: pairs at it may be rounded to either side
FRAGMENT = 64  # atoms; plain PyTorch on a large structure takes gigabytes


def accelerate(
    potential: Potential, graph: Graph, mode: str = "auto", *, training: bool = False, tables: bool = False
) -> bool:
    """Let compiled code do the work if it gives what plain PyTorch gives on this graph; True if it does.

    First the layers (`kernels.py`): compared are energies, forces and virial, on a fragment of a large structure, and
    with `training` the gradient of a loss too. With `tables`, for evaluation, then the whole network with radial
    functions from tables (`engine.py`, on a GPU `device_engine.py`), which must keep to `TABLE_TOLERANCE`; the
    weights must not change afterwards.
    mode "auto" warns when something cannot be used and goes on with what can, "require" raises AccelerationError,
    "off" never uses them.
    """
    if mode not in MODES:
        raise ConfigError(f"accelerate is {mode!r}; expected one of {', '.join(MODES)}")
    potential.compile_network(False)
    potential.segnn.accelerate(False)
    if mode == "off":
        return False
    if potential.device.type not in ("cpu", "cuda"):
        if mode == "require":
            raise AccelerationError(f"accelerate='require', but there is no compiled code for {potential.device}")
        return False
    part = within(fragment(graph, FRAGMENT), CERTAIN * potential.cutoff)
    with _without_core(potential):
        plain = _results(potential, part, training)
        # in float32 plain PyTorch is not exact either: both are held against float64
        exact = plain if potential.dtype is torch.float64 else _results(_in_float64(potential), part, training)

        def problem_of(tolerance: float) -> str | None:
            return _difference(_results(potential, part, training), plain, exact, tolerance)

        try:
            potential.segnn.accelerate(True)
            problem = problem_of(TOLERANCE[potential.dtype])
        except CompilerError as error:
            problem = str(error)
        if problem is not None:
            potential.segnn.accelerate(False)
            _refuse(f"compiled code is not used, plain PyTorch is: {problem}", mode)
            return False
        if not tables:
            return True
        try:
            potential.segnn.tabulate()
            potential.compile_network()
            problem = problem_of(TABLE_TOLERANCE[potential.dtype])
        except (CompilerError, ValueError) as error:
            problem = str(error)
        if problem is not None:
            potential.compile_network(False)
            potential.segnn.tabulate(False)
            _refuse(f"the network is evaluated layer by layer: {problem}", mode)
    return True


def _refuse(message: str, mode: str) -> None:
    if mode == "require":
        raise AccelerationError(message)
    warnings.warn(message, AccelerationWarning, stacklevel=4)


@contextmanager
def _without_core(potential: Potential) -> Iterator[None]:
    """The repulsion is the same code on every path; the large forces of a contact would hide what differs."""
    config = potential.config
    potential.config = config.model_copy(update={"core_repulsion": False})
    try:
        yield
    finally:
        potential.config = config


def accelerate_training(potential: Potential, graph: Graph, mode: str = "auto") -> TrainingEngine | None:
    """Compiled code for training: layers, and where it knows the network the engine that gives a loss's gradient.

    Both are used only if energies, forces and that gradient are those of plain PyTorch, as in `accelerate`; the engine
    runs on one thread, and is left out where PyTorch has more than two.
    """
    if not accelerate(potential, graph, mode, training=True):
        return None
    on_cpu = potential.device.type == "cpu"
    if not on_cpu or not supported(potential) or torch.get_num_threads() > 2 or not len(graph.edge_src):
        return None
    part = within(fragment(graph, FRAGMENT), CERTAIN * potential.cutoff)
    try:
        with _without_core(potential):
            engine = TrainingEngine(potential)
            found = _engine_results(engine, part)
            potential.segnn.accelerate(False)
            plain = _results(potential, part, True)
            exact = plain if potential.dtype is torch.float64 else _results(_in_float64(potential), part, True)
        problem = _difference(found, plain, exact, TOLERANCE[potential.dtype])
    except (CompilerError, ValueError) as error:
        problem = str(error)
    finally:
        potential.segnn.accelerate(True)
    if problem is None:
        return engine
    _refuse(f"the loss's gradient is evaluated layer by layer: {problem}", mode)
    return None


class Quantity(NamedTuple):
    """Something to compare, and the size of the terms it is a sum of: their rounding errors are what may differ."""

    value: Tensor
    size: float


def _results(potential: Potential, graph: Graph, training: bool) -> dict[str, Quantity]:
    was_training = potential.training
    potential.train(training)
    p = predict(potential, graph, forces=True)
    network = p.energies.detach() - potential.per_species(potential.species_index[graph.numbers])[0]
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


def _engine_results(engine: TrainingEngine, graph: Graph) -> dict[str, Quantity]:
    """What `_results` has, by the engine; the sizes of the terms are those found there."""
    seen = {}

    def loss(energies: Tensor, g: Tensor) -> Tensor:
        p = assemble(graph, edge_vectors(graph), energies, g, None, forces=True, stress=False)
        seen["energies"], seen["forces"] = p.energies.detach(), p.forces.detach()
        return p.energies.square().mean() + p.forces.square().mean()

    engine.step(graph, loss)
    weights = [w for w in engine.potential.parameters() if w.requires_grad and w.grad is not None]
    seen["gradient of the loss"] = torch.cat([w.grad.double().flatten() for w in weights])
    engine.potential.zero_grad(set_to_none=True)
    return {name: Quantity(value, 1.0) for name, value in seen.items()}


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
        if name in found and right.numel():
            error, usual = (
                float((x[name].value - right).detach().abs().max()) / max(size, 1e-300) for x in (found, plain)
            )
            if not error <= max(tolerance, ROUNDING * usual):
                return f"{name} differ by {error:.1e} of their size, more than {tolerance:.0e}"
    return None
