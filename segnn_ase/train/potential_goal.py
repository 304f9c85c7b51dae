"""Potentials as what is to be learned: energies, forces and stresses, rollouts, and what makes a result trustworthy."""

import torch
from torch import Tensor

from segnn_ase.base import figures
from segnn_ase.base.devices import resolve_device
from segnn_ase.compiled.choose import choose_loss_gradient, choose_operations
from segnn_ase.data.batches import Item, Labels, asked_for, known_values
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.structure.graph import sum_over_atoms
from segnn_ase.train.characterize import characterize
from segnn_ase.train.evaluation import Evaluate, errors_of, evaluator_of, on_cpu, predicted, residuals
from segnn_ase.train.job import OF_RUN, Goal, Gradient, Measure, Training, output_files
from segnn_ase.train.loss import loss_of
from segnn_ase.train.old_frames import errors_before, told_of_drift
from segnn_ase.train.report import error_table, measure_sets, printer, summary
from segnn_ase.train.rollouts import rollouts
from segnn_ase.train.settings import OptimConfig, TrainConfig

WEIGHTS = {"cue_gradients": "response_weight"}  # settings of kinds of labels, where they have other names


def gradient_of_loss(potential: Potential, example: Item, settings: OptimConfig) -> Gradient:
    """By the fastest code that is right on an example."""
    device = potential.device
    loss_gradient = choose_loss_gradient(potential, example.graph.to(device), settings.accelerate)

    def gradient(batch: Item, whole: tuple[int, ...] | None = None) -> float:
        graph, labels = batch.graph.to(device), Labels(*(x.to(device) for x in batch.labels))
        asked, along = asked_for(batch.labels), some_directions(potential, batch)
        along = None if along is None else along.to(device)
        weights = settings if whole is None else weights_of_part(settings, batch, whole)
        return float(loss_gradient(graph, lambda p: loss_of(p, graph, labels, weights, along), **asked, along=along))

    return gradient


def weights_of_part(settings: OptimConfig, part: Item, whole: tuple[int, ...]) -> OptimConfig:
    """The settings by which the losses of the parts of a batch add up to its loss."""
    known = zip(Labels._fields, known_values([part]), whole, strict=True)
    names = {name: WEIGHTS.get(name, f"{name}_weight") for name in Labels._fields}
    parts = {
        names[name]: getattr(settings, names[name]) * own / max(all_of_them, 1) for name, own, all_of_them in known
    }
    return settings.model_copy(update=parts)


def some_directions(potential: Potential, batch: Item) -> Tensor | None:
    """Unit vectors (B, 3) along which Born charges are learned in a step, others in every step: where there are some.

    Drawn by the weights, which any step changes and a training that goes on has again, and by the structure.
    """
    if not bool(batch.labels.born.isfinite().any()):
        return None
    weights = hash(tuple(w.detach().double().sum().item() for w in potential.parameters() if w.requires_grad))
    places = sum_over_atoms(batch.graph.positions.double().norm(dim=1), batch.graph).tolist()
    seeds = [torch.Generator().manual_seed(hash((weights, place)) % 2**63) for place in places]
    drawn = torch.stack([torch.randn(3, dtype=torch.float64, generator=seed) for seed in seeds])
    return torch.nn.functional.normalize(drawn, dim=1)


def measure_of(potential: Potential, example: Item, settings: OptimConfig) -> Measure:
    """By layers, as the weights change all the time."""
    device = potential.device
    operations = choose_operations(potential, example.graph.to(device), settings.accelerate)

    def evaluate() -> Evaluate:
        return on_cpu(PlainEvaluator(potential, operations), device)  # a snapshot of the present weights

    def loss(batch: Item) -> float:
        return float(loss_of(predicted(evaluate(), batch), batch.graph, batch.labels, settings))

    return Measure(lambda items: residuals(evaluate(), items, settings), loss)


def finish(config: TrainConfig, job: Training, history: list[dict], *, progress: bool) -> dict:
    """Evaluate the kept model on every set, store its errors in the file, write plots, print the table."""
    settings, data = config.training, job.data
    potential, kept = load_with_metadata(config.out)
    evaluate = evaluator_of(potential.to(resolve_device(settings.device)), data.train, settings.accelerate)
    kept_old = job.before if any(some.replayed for some in data.beside) else None  # what is not learned is not claimed
    known = {"closest": data.closest, "lone_atoms": job.lone_atoms, "before": kept_old}
    characterize(potential, data.train, data.valid, **known, evaluate=evaluate)
    sets = {"train": data.train, "valid": data.valid, **data.test, **{some.name: some.held for some in data.beside}}
    errors = measure_sets(config.out, sets, lambda items: residuals(evaluate, items, settings, potential.uncertainty))
    if job.began is not None:
        start = evaluator_of(job.began.to(potential.device), data.train, settings.accelerate)
        errors = errors_before(errors, sets, lambda items: errors_of(residuals(start, items, settings)))
    save_potential(
        config.out, potential, metadata={**job.metadata, **{name: kept[name] for name in OF_RUN}, "errors": errors}
    )
    if len(history) > 1:
        figures.plot_learning_curve(output_files(config.out)["curve"], history)
    epoch = f"kept is epoch {kept['epoch']} of {history[-1]['epoch']}"
    told = [error_table(errors), *(told_of_drift(some, errors) for some in data.beside), epoch, f"wrote {config.out}"]
    printer(progress)("\n".join(line for line in told if line))
    return errors


POTENTIAL = Goal(gradient_of_loss, measure_of, errors_of, summary, rollouts, save_potential, finish)
