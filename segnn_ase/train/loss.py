"""The loss: weighted mean squares of what a prediction misses, over the labels that are there."""

import torch
from torch import Tensor

from segnn_ase.data.batches import Labels
from segnn_ase.model.predict import Prediction
from segnn_ase.model.responses import nearest_branch
from segnn_ase.structure.graph import Graph, sum_over_atoms, volume
from segnn_ase.train.settings import OptimConfig


def loss_of(
    prediction: Prediction, graph: Graph, labels: Labels, settings: OptimConfig, along: Tensor | None = None
) -> Tensor:
    """Weighted mean squares of dE / sqrt(n_atoms), of force components and of virial components / sqrt(n_atoms).

    And of what belongs to cues; of Born charges those along random directions (B, 3), whose mean square is theirs.
    """
    atoms = torch.bincount(graph.batch, minlength=graph.n_graphs).double()
    loss = settings.energy_weight * mean_square(prediction.energy, labels.energy, atoms.rsqrt())
    if prediction.forces is not None:
        loss = loss + settings.forces_weight * mean_square(prediction.forces, labels.forces)
    if prediction.stress is not None:
        scale = volume(graph) * atoms.rsqrt()
        loss = loss + settings.stress_weight * mean_square(prediction.stress, labels.stress, scale[:, None, None])
    if prediction.cue_gradients is not None:
        loss = loss + settings.response_weight * mean_square(prediction.cue_gradients, labels.cue_gradients)
    if prediction.dipole is not None:
        branch = nearest_branch(labels.dipole, prediction.dipole, graph)
        loss = loss + settings.dipole_weight * mean_square(prediction.dipole, branch, atoms.rsqrt()[:, None])
        pair, scale = (prediction.polarizability, labels.polarizability), atoms.rsqrt()[:, None, None]
        loss = loss + settings.polarizability_weight * mean_square(*pair, scale)
    if prediction.born is not None:
        loss = loss + settings.born_weight * mean_square(prediction.born, labels.born)
    if prediction.dipole_slopes is not None and along is not None:
        wanted = torch.einsum("ni,nij->nj", along[graph.batch], labels.born)
        loss = loss + settings.born_weight * mean_square(prediction.dipole_slopes, wanted)
    return loss


def losses_of(prediction: Prediction, graph: Graph, labels: Labels, settings: OptimConfig) -> Tensor:
    """The same of each structure, (B,)."""
    atoms = torch.bincount(graph.batch, minlength=graph.n_graphs).double()
    losses = settings.energy_weight * squares(prediction.energy, labels.energy) / atoms
    if prediction.forces is not None:
        losses = losses + settings.forces_weight * _of_atoms(prediction.forces, labels.forces, graph)
    if prediction.stress is not None:
        squared = squares(prediction.stress, labels.stress).mean(dim=(1, 2))
        losses = losses + settings.stress_weight * squared * volume(graph).square() / atoms
    if prediction.cue_gradients is not None:
        told = _of_atoms(prediction.cue_gradients, labels.cue_gradients, graph)
        losses = losses + settings.response_weight * told
    if prediction.dipole is not None:
        branch = nearest_branch(labels.dipole, prediction.dipole, graph)
        losses = losses + settings.dipole_weight * squares(prediction.dipole, branch).mean(dim=1) / atoms
        squared = squares(prediction.polarizability, labels.polarizability).mean(dim=(1, 2))
        losses = losses + settings.polarizability_weight * squared / atoms
    if prediction.born is not None:
        pair = prediction.born.flatten(1), labels.born.flatten(1)
        losses = losses + settings.born_weight * _of_atoms(*pair, graph)
    return losses


def _of_atoms(prediction: Tensor, label: Tensor, graph: Graph) -> Tensor:
    """Mean squared errors of the components that are known, (B,)."""
    squared, known = squares(prediction, label), torch.isfinite(label).double()
    total, count = (sum_over_atoms(x.sum(dim=1), graph) for x in (squared, known))
    return total / count.clamp_min(1)


def squares(prediction: Tensor, label: Tensor) -> Tensor:
    """Squared errors; zero where there is no label."""
    return torch.where(torch.isfinite(label), prediction - label, 0.0).square()


def mean_square(prediction: Tensor, label: Tensor, scale: "Tensor | float" = 1.0) -> Tensor:
    """Mean of squared, scaled errors over the labels that are there (not NaN); zero when there are none.

    What has no label is cut off before the square: the gradient of NaN squared is NaN even with weight zero.
    """
    known = torch.isfinite(label)
    error = scale * torch.where(known, prediction - label, 0.0)
    return error.square().sum() / known.sum().clamp_min(1)
