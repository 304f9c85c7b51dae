"""The fastest evaluator that agrees with plain PyTorch on a structure of the user's own: one list, one guard.

Plain PyTorch is the oracle. Compared are energies, forces and virial, in training the gradient of a loss
weight by weight, on the user's structure (a fragment of a large one) and on the same with its atoms displaced, as a
perfect crystal hides every path that is odd; and, with random weights instead of learned ones, which may have closed a
path, on a few atoms of the potential's elements thrown together, as a dimer hides what needs a plane.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import one_thread_after_fork
from segnn_ase.base.errors import AccelerationError, AccelerationWarning, ConfigError
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.cpu_training import CpuLossGradient
from segnn_ase.compiled.gpu_evaluation import GpuEvaluator
from segnn_ase.compiled.gpu_recording import RecordingEvaluator
from segnn_ase.compiled.gpu_training import GpuLossGradient
from segnn_ase.compiled.guard import TOLERANCE, Quantity, difference, gradients_of_weights, in_float64
from segnn_ase.compiled.layers import FUSED
from segnn_ase.compiled.network_steps import supported
from segnn_ase.model.network import Operations
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, LossGradient, PlainEvaluator, PlainLossGradient, Prediction
from segnn_ase.structure.cues import width_of
from segnn_ase.structure.graph import Graph, edge_vectors, fragment, graph_from_arrays, sum_over_structure_edges, within
from segnn_ase.structure.neighbors import neighbor_list

LAYERS = "compiled layers"
MODES = ("auto", "off", "require")
TABLE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
CERTAIN = 1 - 1e-9  # of the cutoff: pairs at it may be rounded to either side
FRAGMENT = 64  # atoms; plain PyTorch on a large structure takes gigabytes
DISPLACED = (0.1, 0.05, 0.025, 0.0125)  # Å: so far, or less where forces there are
WILD = 100.0  # times those of the structure itself
THROWN = 8  # atoms
LEEWAY = 10  # for structures that are far from all that the network has learned: its terms cancel worse there


class Backend(NamedTuple):
    """A kind of evaluator: for which potentials it is, how it is made, and how far it may be off."""

    fits: Callable[[Potential, bool], bool]  # (potential, whether radial functions may come from tables)
    make: Callable[[Potential, bool], Evaluator]  # (potential, whether failures later must raise)
    tolerance: dict[torch.dtype, float]


BACKENDS = (  # the fastest first
    Backend(
        lambda p, tables: tables and p.device.type == "cuda" and supported(p),
        lambda p, require: RecordingEvaluator(p, require=require) if p.charges is None else GpuEvaluator(p),
        TABLE_TOLERANCE,
    ),
    Backend(
        lambda p, tables: tables and p.device.type == "cpu" and supported(p),
        lambda p, require: CpuEvaluator(p),
        TABLE_TOLERANCE,
    ),
    Backend(
        lambda p, tables: p.device.type in ("cpu", "cuda"),
        lambda p, require: PlainEvaluator(p, FUSED, name=LAYERS),
        TOLERANCE,
    ),
)


def choose_evaluator(potential: Potential, graph: Graph, mode: str = "auto", *, tables: bool = True) -> Evaluator:
    """The fastest evaluator of a potential, with its present weights, that gives what plain PyTorch gives.

    graph: a structure of those to come, with pairs. tables: whether radial functions may come from splines. mode
    "auto" warns where something cannot be used and goes on with the next, "require" raises AccelerationError, "off"
    takes plain PyTorch. Neither the potential nor any global state is changed.
    """
    _check_mode(mode)
    if mode == "off":
        return PlainEvaluator(potential)
    for backend in BACKENDS:
        if not backend.fits(potential, tables):
            continue
        try:
            evaluator = backend.make(potential, mode == "require")
            problem = _problem_of(evaluator, backend, potential, graph)
        except (CompilerError, ValueError) as error:
            evaluator, problem = None, str(error)
        if problem is None:
            return evaluator
        _refuse(f"{evaluator.name if evaluator else 'compiled code'}: not used, as {problem}", mode)
    if mode == "require" and potential.device.type not in ("cpu", "cuda"):
        raise AccelerationError(f"accelerate='require', but there is no compiled code for {potential.device}")
    return PlainEvaluator(potential)


def choose_operations(potential: Potential, graph: Graph, mode: str = "auto") -> Operations | None:
    """Compiled operations of the layers, where they give what plain PyTorch gives: for weights that go on changing."""
    chosen = choose_evaluator(potential, graph, mode, tables=False)
    return FUSED if chosen.name == LAYERS else None


def choose_loss_gradient(potential: Potential, graph: Graph, mode: str = "auto") -> LossGradient:
    """The fastest way to the gradient of a loss that gives what plain PyTorch gives; see `choose_evaluator`."""
    _check_mode(mode)
    plain = PlainLossGradient(potential)
    if mode == "off" or potential.device.type not in ("cpu", "cuda"):
        return plain
    by_passes: Callable[[Potential], LossGradient] = CpuLossGradient
    if potential.device.type == "cuda":
        by_passes = partial(GpuLossGradient, require=mode == "require")
    for make in (by_passes, _by_layers) if supported(potential) else (_by_layers,):
        try:
            problem = _training_problem(make, potential, graph)
        except (RuntimeError, ValueError) as error:  # also CUDA's
            problem = str(error)
        if problem is None:
            return make(potential)
        _refuse(f"compiled code is not used for the gradient of the loss: {problem}", mode)
    return plain


def _by_layers(potential: Potential) -> LossGradient:
    return PlainLossGradient(potential, FUSED, name=LAYERS)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"accelerate is {mode!r}; expected one of {', '.join(MODES)}")
    one_thread_after_fork()


def _refuse(message: str, mode: str) -> None:
    if mode == "require":
        raise AccelerationError(message)
    warnings.warn(message, AccelerationWarning, stacklevel=4)


class Sample(NamedTuple):
    """What evaluators are compared on, and times how much they may differ."""

    potential: Potential
    graph: Graph
    leeway: float


def samples(potential: Potential, graph: Graph) -> list[Sample]:
    """The user's structure, the same displaced, and other weights on atoms thrown together."""
    part, rng = fragment(graph, FRAGMENT), np.random.default_rng(0)
    if potential.charges is not None and len(part.numbers) < len(graph.numbers):  # a part of a slab may be charged
        part = part._replace(periodic=torch.zeros_like(part.periodic))
    moved = torch.as_tensor(rng.normal(size=tuple(part.positions.shape))).to(part.positions.device)
    limit = CERTAIN * potential.cutoff
    thrown = within(thrown_together(potential, rng), limit)
    return [
        Sample(potential, within(part, limit), 1),
        Sample(potential, _moved_along(potential, part, moved, limit), LEEWAY),
        Sample(_with_random_weights(potential, thrown), thrown, LEEWAY),
    ]


def _moved_along(potential: Potential, graph: Graph, moved: Tensor, limit: float) -> Graph:
    """The graph moved along so far that its forces are others, but not where they explode, as far from all training
    data they may: there, rounding decides."""
    exact = PlainEvaluator(in_float64(potential)).without_core()

    def pushed(graph: Graph) -> float:
        forces = exact(graph).forces
        return max([max(potential.scales), *forces.abs().flatten().tolist()])

    usual = pushed(within(graph, limit))
    for distance in DISPLACED:
        found = within(graph._replace(positions=graph.positions + distance * moved), limit)
        if pushed(found) < WILD * usual:
            break
    return found


def _with_random_weights(potential: Potential, graph: Graph) -> Potential:
    """The same network, to which every path matters on this graph."""
    other = Potential(potential.config, potential.species, seed=1).to(potential.device, potential.dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for weight in other.parameters():
            if not bool(weight.any()):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    other.calibrate(graph)
    for mine, its in zip(potential.parameters(), other.parameters(), strict=True):
        its.requires_grad_(mine.requires_grad)
    return other.train(potential.training)


def thrown_together(potential: Potential, rng: np.random.Generator) -> Graph:
    """Atoms of all elements in a ball in which each sees all others, none much closer than they need be."""
    n = max(THROWN, len(potential.species))
    places = np.zeros((0, 3))
    while len(places) < n:  # the best of some random places for each
        tried = rng.uniform(-1, 1, size=(50, 3))
        tried = tried[np.linalg.norm(tried, axis=1) < 1]
        apart = np.linalg.norm(tried[:, None] - places, axis=2).min(axis=1, initial=np.inf)
        places = np.vstack([places, tried[np.argmax(apart)]])
    places *= 0.49 * potential.cutoff
    numbers, width = np.resize(potential.species, n), width_of(potential.config.cues)
    neighbors = neighbor_list(places, np.zeros((3, 3)), False, potential.cutoff)
    graph = graph_from_arrays(numbers, places, np.zeros((3, 3)), False, neighbors)
    told = torch.from_numpy(rng.normal(size=(n, width))) if width else None
    field = torch.from_numpy(rng.normal(size=(1, 3))) if potential.config.in_field else None
    return graph._replace(cues=told, field=field).to(potential.device)


def _problem_of(evaluator: Evaluator, backend: Backend, potential: Potential, graph: Graph) -> str | None:
    """What an evaluator of a backend gets wrong, or None."""
    other = None
    for sample in samples(potential, graph):
        if sample.potential is not other:  # the evaluators of the first potential serve for its next samples, too
            other = sample.potential
            tried = evaluator if other is potential else backend.make(other, False)
            # in float32 plain PyTorch is not exact either: both are held against float64
            exact = PlainEvaluator(other if potential.dtype is torch.float64 else in_float64(other))
        found, right = (_quantities_of(e, sample) for e in (tried, exact))
        usual = partial(_quantities_in_plain_pytorch, sample)
        problem = difference(found, usual, right, sample.leeway * backend.tolerance[potential.dtype])
        if problem is not None:
            return problem if other is potential else f"with random weights {problem}"
    return None


def _quantities_of(evaluator: Evaluator, sample: Sample) -> dict[str, Quantity]:
    return _quantities(evaluator.without_core()(sample.graph, along=_some_direction(sample)), evaluator, sample)


def _some_direction(sample: Sample) -> Tensor | None:
    """Some direction, for a potential that knows dipoles."""
    if not sample.potential.config.in_field:
        return None
    direction = torch.tensor([[0.48, 0.6, 0.64]], dtype=torch.float64, device=sample.potential.device)
    return direction.expand(sample.graph.n_graphs, 3)


def _quantities_in_plain_pytorch(sample: Sample) -> dict[str, Quantity]:
    return _quantities_of(PlainEvaluator(sample.potential), sample)


def _quantities(p: Prediction, evaluator: Evaluator, sample: Sample) -> dict[str, Quantity]:
    scale, elements = max(sample.potential.scales), evaluator.elements
    network = p.energies.detach() - elements.reference[elements.index[sample.graph.numbers]]
    push = max(
        (float(x.detach().abs().max()) for x in (p.forces, p.edge_gradients) if x is not None and len(x)), default=0
    )
    push = max(scale, push)
    found = {"energies": Quantity(p.energies, max(scale, float(network.abs().max())))}  # E0 of thousands hide nothing
    found["forces"] = Quantity(p.forces, push)
    for name in ("dipole", "polarizability", "charges", "dipole_slopes"):
        if (values := getattr(p, name)) is not None:
            found[name] = Quantity(values, max(1e-3, float(values.abs().max())))
    if p.cue_gradients is not None:
        found["gradients of the cues"] = Quantity(p.cue_gradients, max(scale, float(p.cue_gradients.abs().max())))
    if p.edge_gradients is not None and len(p.edge_gradients):  # of either direction of a pair: their sum is defined
        r, g = edge_vectors(sample.graph), p.edge_gradients.detach()
        virial = sum_over_structure_edges(r[:, :, None] * g[:, None], sample.graph)
        terms = float((r.norm(dim=1) * g.norm(dim=1)).sum())  # all of which are off alike in a perfect crystal
        found["virial"] = Quantity(virial, max(terms, push * sample.potential.cutoff * len(g) ** 0.5))
    return found


def _training_problem(make: Callable[[Potential], LossGradient], potential: Potential, graph: Graph) -> str | None:
    compared = samples(_twin(potential), graph)
    if potential.device.type == "cuda":
        compared[2:2] = 2 * compared[:1]  # what is run the second time is recorded, and then replayed
    made: dict[Potential, LossGradient] = {}
    for sample in compared:
        twin, exact = sample.potential, in_float64(sample.potential)
        if twin not in made:
            made[twin] = make(twin)
        pairs = ((made[twin], twin), (PlainLossGradient(exact), exact))
        found, right = (_gradients(one, owner, sample) for one, owner in pairs)
        usual = partial(_gradients, PlainLossGradient(twin), twin, sample)
        problem = difference(found, usual, right, sample.leeway * TOLERANCE[potential.dtype])
        if problem is not None:
            return problem
    return None


def _gradients(gradient: LossGradient, potential: Potential, sample: Sample) -> dict[str, Quantity]:
    """Gradients of a loss by the names of the weights, and the loss's energies and forces."""
    seen: dict[str, Quantity] = {}
    scale, graph = max(potential.scales), sample.graph

    def loss(p: Prediction) -> Tensor:
        others = [getattr(p, name) for name in ("cue_gradients", "dipole", "polarizability", "dipole_slopes")]
        told = sum(x.square().mean() for x in others if x is not None)
        energies = p.energies - potential.elements(torch.zeros(1)).reference[potential.species_index[graph.numbers]]
        seen["energies"] = Quantity(p.energies.detach(), max(scale, float(energies.detach().abs().max())))
        push = p.edge_gradients.detach().abs().max() if len(graph.edge_src) else torch.zeros(())
        seen["forces"] = Quantity(p.forces.detach(), max(scale, float(push)))
        return energies.square().mean() + p.forces.square().mean() + told

    potential.zero_grad(set_to_none=True)
    gradient(graph, loss, forces=True, stress=False, along=_some_direction(sample))
    seen |= gradients_of_weights(potential)
    potential.zero_grad(set_to_none=True)
    return seen


def _twin(potential: Potential) -> Potential:
    """A copy without core repulsion, which is the same code on every path and whose forces would hide what differs."""
    twin = copy.deepcopy(potential)
    twin.config = potential.config.model_copy(update={"core_repulsion": False})
    return twin
