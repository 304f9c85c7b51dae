"""How good a potential is: its errors on labelled structures, those it expects itself, and what its data covered."""

import math

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import expect
from segnn_ase.compiled.choose import accelerate
from segnn_ase.data.batches import Item, collate_items, make_item
from segnn_ase.data.frames import LabelKeys, as_paths, check_labels, check_species, read_frames
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Prediction
from segnn_ase.store.model_file import load_committee
from segnn_ase.structure.graph import Graph, sum_over_atoms
from segnn_ase.train.loss import loss_and_prediction
from segnn_ase.train.settings import OptimConfig


def speed_up(potential: Potential, items: list[Item], mode: str = "auto") -> None:
    """Let compiled code evaluate a potential whose weights stay; it is checked on the largest structure."""
    largest = max(items, key=lambda item: len(item.graph.edge_src))
    accelerate(potential, largest.graph.to(potential.device), mode, tables=True)


def evaluate(potential: Potential, items: list[Item], settings: OptimConfig) -> dict:
    """Loss and errors on labelled structures: rmse and mae of energy (eV/atom), forces (eV/Å), stress (eV/Å^3)."""
    return errors_of(residuals(potential, items, settings))


def errors_of(collected: dict[str, np.ndarray]) -> dict:
    errors: dict = {"loss": float(np.mean(collected["loss"])) if len(collected["loss"]) else math.nan}
    for name in ("energy", "forces", "stress"):
        delta = collected[f"{name}_predicted"] - collected[f"{name}_reference"]
        errors[f"{name}_rmse"] = float(np.sqrt(np.mean(delta**2))) if len(delta) else None
        errors[f"{name}_mae"] = float(np.mean(np.abs(delta))) if len(delta) else None
    std = collected.get("forces_std", np.zeros(0))
    if len(std) and np.isfinite(std).all():
        errors["forces_std"] = float(np.sqrt(np.mean(std**2)))
    return errors


def residuals(potential: Potential, items: list[Item], settings: OptimConfig) -> dict[str, np.ndarray]:
    """Labels and predictions side by side, flat, energies per atom; entries without a label are left out."""
    potential.eval()
    collected: dict[str, list] = {"loss": []}
    for start in range(0, len(items), settings.batch_size):
        batch = collate_items(items[start : start + settings.batch_size])
        loss, prediction = loss_and_prediction(potential, batch, settings)
        collected["loss"].append([float(loss)] * batch.graph.n_graphs)
        atoms = torch.bincount(batch.graph.batch, minlength=batch.graph.n_graphs)
        for name in ("energy", "forces", "stress"):
            reference, predicted = getattr(batch.labels, name), getattr(prediction, name)
            known = torch.isfinite(reference)
            scale = atoms if name == "energy" else torch.ones(())
            for side, values in (("reference", reference), ("predicted", predicted)):
                flat = (values.cpu() / scale)[known] if known.any() else torch.zeros(0)
                collected.setdefault(f"{name}_{side}", []).append(flat.detach().double().numpy())
        for name, std in predicted_deviations(potential, batch.graph, prediction).items():
            known = torch.isfinite(getattr(batch.labels, name))
            collected.setdefault(f"{name}_std", []).append(std.cpu()[known].numpy())
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in collected.items()}


def predicted_deviations(potential: Potential, graph: Graph, prediction: Prediction) -> dict[str, Tensor]:
    """The potential's own estimate of its errors, where it has one: energies (B,) eV/atom and forces (N, 3) eV/Å."""
    if potential.uncertainty is None:
        return {}
    features = prediction.features.detach().double().cpu()
    u = potential.uncertainty.to(features)
    graph = graph.to("cpu")
    energy = u.energy_std(sum_over_atoms(features, graph)) / torch.bincount(graph.batch, minlength=graph.n_graphs)
    found = {"energy": energy, "forces": u.force_std(u.leverage(features))[:, None].expand(-1, 3)}
    return {name: std for name, std in found.items() if bool(torch.isfinite(std).all())}


def committee_residuals(
    potentials: list[Potential], items: list[Item], settings: OptimConfig, factors: dict[str, float] | None = None
) -> dict[str, np.ndarray]:
    """`residuals` of the mean of the members, with their spread, times its factors, as the estimate of the errors."""
    members = [residuals(potential, items, settings) for potential in potentials]
    values = dict(members[0])
    for name in ("energy", "forces", "stress"):
        stack = np.array([member[f"{name}_predicted"] for member in members])
        values[f"{name}_predicted"] = stack.mean(axis=0)
        values[f"{name}_std"] = (factors or {}).get(name, 1.0) * stack.std(axis=0, ddof=1)
    return values


def spread_factor(values: dict[str, np.ndarray], name: str) -> float:
    """What the spread must be multiplied by to have the size of the errors; 1 where nothing is known."""
    errors, spread = values[f"{name}_predicted"] - values[f"{name}_reference"], values[f"{name}_std"]
    if not len(errors) or not spread.any():
        return 1.0
    return float(np.sqrt(np.mean(errors**2) / np.mean(spread**2)))


def evaluate_files(model: str, paths: list[str], *, keys: LabelKeys | None = None, device: str = "auto") -> dict:
    """Errors of a model or a committee on labelled files, one entry per file, evaluated as by the calculator."""
    paths, device = as_paths(paths), resolve_device(device)
    expect(bool(paths), "paths", paths, "at least one")
    committee = load_committee(model)
    potentials = [p.to(device).eval() for p in committee.potentials]
    errors: dict[str, dict] = {}
    for path in paths:
        frames = read_frames(path, keys)
        check_labels(frames)
        check_species(frames, potentials[0].species, path)
        items = [make_item(f, potentials[0].cutoff) for f in frames]
        if not errors:
            for potential in potentials:
                speed_up(potential, items)
        if len(potentials) > 1:
            values = committee_residuals(potentials, items, OptimConfig(), committee.factors)
            errors[path] = errors_of(values)
        else:
            errors[path] = evaluate(potentials[0], items, OptimConfig())
    return errors
