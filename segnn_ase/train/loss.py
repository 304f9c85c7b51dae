"""The loss: weighted mean squares of what a prediction misses, over the labels that are there."""

from collections.abc import Callable

import torch
from torch import Tensor

from segnn_ase.data.batches import Item, Labels, asked_for
from segnn_ase.model.predict import Prediction
from segnn_ase.structure.graph import Graph, volume
from segnn_ase.train.settings import OptimConfig


def loss_and_prediction(evaluate: Callable, batch: Item, settings: OptimConfig) -> tuple[Tensor, Prediction]:
    """evaluate: see `evaluation.Evaluate`."""
    prediction = evaluate(batch.graph, **asked_for(batch.labels))
    return loss_of(prediction, batch.graph, batch.labels, settings), prediction


def loss_of(prediction: Prediction, graph: Graph, labels: Labels, settings: OptimConfig) -> Tensor:
    """Weighted mean squares of dE / sqrt(n_atoms), of force components and of virial components / sqrt(n_atoms)."""
    atoms = torch.bincount(graph.batch, minlength=graph.n_graphs).double()
    loss = settings.energy_weight * mean_square(prediction.energy, labels.energy, atoms.rsqrt())
    if prediction.forces is not None:
        loss = loss + settings.forces_weight * mean_square(prediction.forces, labels.forces)
    if prediction.stress is not None:
        scale = volume(graph) * atoms.rsqrt()
        loss = loss + settings.stress_weight * mean_square(prediction.stress, labels.stress, scale[:, None, None])
    return loss


def mean_square(prediction: Tensor, label: Tensor, scale: "Tensor | float" = 1.0) -> Tensor:
    """Mean of squared, scaled errors over the labels that are there (not NaN); zero when there are none.

    What has no label is cut off before the square: the gradient of NaN squared is NaN even with weight zero.
    """
    known = torch.isfinite(label)
    error = scale * torch.where(known, prediction - label, 0.0)
    return error.square().sum() / known.sum().clamp_min(1)
