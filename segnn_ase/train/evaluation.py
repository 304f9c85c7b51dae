"""Errors of potentials and committees on labelled structures, against what they expect themselves."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import expect
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.compiled.choose import choose_evaluator
from segnn_ase.data.batches import Item, asked_for, collate_items, edges_of, make_item, pack
from segnn_ase.data.dispersed import without_dispersion
from segnn_ase.data.frames import (
    as_paths,
    changes_of,
    check_labels,
    check_species,
    read_frames,
    refuse_wires,
    rivals_of,
)
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.pulled import without_pull
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction, with_born
from segnn_ase.model.responses import nearest_branch
from segnn_ase.store.model_file import load_committee
from segnn_ase.structure.cue_settings import names_read
from segnn_ase.structure.graph import Graph, sum_over_atoms
from segnn_ase.train.loss import losses_of
from segnn_ase.train.settings import OptimConfig
from segnn_ase.trust.uncertainty import Uncertainty

QUANTITIES = ("energy", "forces", "stress")
Evaluate = Callable[..., Prediction]  # (graph, *, forces, stress), all on the CPU


def evaluator_of(potential: Potential, items: list[Item], mode: str = "auto") -> Evaluate:
    """The fastest way to evaluate a potential with its present weights that is right on the largest of structures."""
    largest = max(items, key=lambda item: len(item.graph.edge_src))
    return on_cpu(choose_evaluator(potential, largest.graph.to(potential.device), mode), potential.device)


def on_cpu(evaluator: Evaluator, device: torch.device) -> Evaluate:
    """Evaluate on a device what comes from the CPU and goes back there."""

    def evaluate(graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None) -> Prediction:
        along = None if along is None else along.to(device)
        found = evaluator(graph.to(device), forces=forces, stress=stress, along=along)
        found = found._replace(edge_gradients=None)  # large, and nothing that is measured
        return Prediction(*(x.cpu() if isinstance(x, Tensor) else x for x in found))

    return evaluate


def residuals(
    evaluate: Evaluate, items: list[Item], settings: OptimConfig, uncertainty: Uncertainty | None = None
) -> dict[str, np.ndarray]:
    """Labels and predictions side by side, flat, energies per atom; entries without a label are left out.

    And the loss of each structure.
    """
    collected: dict[str, list] = {"loss": []}
    for numbers in pack(list(range(len(items))), edges_of(items), settings.batch_size, settings.max_edges):
        batch = collate_items([items[n] for n in numbers])
        prediction = predicted(evaluate, batch)
        collected["loss"].append(losses_of(prediction, batch.graph, batch.labels, settings).detach().double().numpy())
        for name, values in labels_and_predictions(batch, prediction, uncertainty).items():
            collected.setdefault(name, []).append(values.double().numpy())
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in collected.items()}


def predicted(evaluate: Evaluate, batch: Item) -> Prediction:
    """What the labels of a batch ask for."""
    born = bool(batch.labels.born.isfinite().any())
    return (partial(with_born, evaluate) if born else evaluate)(batch.graph, **asked_for(batch.labels))


def labels_and_predictions(batch: Item, prediction: Prediction, uncertainty: Uncertainty | None) -> dict[str, Tensor]:
    atoms = torch.bincount(batch.graph.batch, minlength=batch.graph.n_graphs)
    expected = {} if uncertainty is None else predicted_deviations(uncertainty, batch.graph, prediction)
    found = {}
    for name in QUANTITIES:
        reference, predicted = getattr(batch.labels, name), getattr(prediction, name)
        known = torch.isfinite(reference)
        scale = atoms if name == "energy" else 1
        found[f"{name}_reference"] = (reference / scale)[known]
        found[f"{name}_predicted"] = (predicted / scale)[known] if known.any() else torch.zeros(0)
        if name in expected:
            found[f"{name}_std"] = expected[name][known]
    for name, (label, value) in responses_to_compare(batch, prediction).items():
        known = torch.isfinite(label)
        found |= {f"{name}_reference": label[known], f"{name}_predicted": value[known]}
    return found


def responses_to_compare(batch: Item, p: Prediction) -> dict[str, tuple[Tensor, Tensor]]:
    """Labels and predictions of what belongs to cues."""
    names = ("cue_gradients", "dipole", "polarizability", "born")
    found = {name: (getattr(batch.labels, name), getattr(p, name)) for name in names if getattr(p, name) is not None}
    if "dipole" in found:
        label, value = found["dipole"]
        found["dipole"] = nearest_branch(label, value, batch.graph), value
    return found


def predicted_deviations(uncertainty: Uncertainty, graph: Graph, prediction: Prediction) -> dict[str, Tensor]:
    """A potential's own estimate of its errors, where it has one: energies (B,) eV/atom and forces (N, 3) eV/Å."""
    features = prediction.features.double()
    u = uncertainty.to(features)
    energy = u.energy_std(sum_over_atoms(features, graph)) / torch.bincount(graph.batch, minlength=graph.n_graphs)
    found = {"energy": energy, "forces": u.force_std(u.leverage(features))[:, None].expand(-1, 3)}
    return {name: std for name, std in found.items() if bool(torch.isfinite(std).all())}


def committee_residuals(
    evaluators: list[Evaluate], items: list[Item], settings: OptimConfig, factors: dict[str, float] | None = None
) -> dict[str, np.ndarray]:
    """`residuals` of the mean of the members, with their spread, times its factors, as the estimate of the errors."""
    members = [residuals(evaluate, items, settings) for evaluate in evaluators]
    values = dict(members[0])
    for name in (key.removesuffix("_predicted") for key in members[0] if key.endswith("_predicted")):
        stack = np.array([member[f"{name}_predicted"] for member in members])
        values[f"{name}_predicted"] = stack.mean(axis=0)
        if name in QUANTITIES:
            values[f"{name}_std"] = (factors or {}).get(name, 1.0) * stack.std(axis=0, ddof=1)
    return values


def errors_of(collected: dict[str, np.ndarray]) -> dict:
    """Loss and errors from `residuals`: rmse and mae of energy (eV/atom), forces (eV/Å), stress (eV/Å^3)."""
    errors: dict = {"loss": float(np.mean(collected["loss"])) if len(collected["loss"]) else math.nan}
    for name in (*QUANTITIES, "cue_gradients", "dipole", "polarizability", "born"):
        if not len(collected.get(f"{name}_predicted", ())) and name not in QUANTITIES:
            continue
        delta = collected[f"{name}_predicted"] - collected[f"{name}_reference"]
        errors[f"{name}_rmse"] = float(np.sqrt(np.mean(delta**2))) if len(delta) else None
        errors[f"{name}_mae"] = float(np.mean(np.abs(delta))) if len(delta) else None
    std = collected.get("forces_std", np.zeros(0))
    if len(std) and np.isfinite(std).all():
        errors["forces_std"] = float(np.sqrt(np.mean(std**2)))
    return errors


def evaluate_files(
    model: str, paths: list[str], *, keys: LabelKeys | None = None, device: str = "auto", report: Callable | None = None
) -> dict:
    """Errors of a model or a committee on labelled files, one entry per file, evaluated as by the calculator.

    Where frames are outside what the (first) potential was trained on, "outside" is their number, "outside_ways" how
    many are so in each way; "forces_std", the rmse that the potential expects, leaves them out.

    report: a function of text, told where labels are in two places, converted or left out.
    """
    paths, device = as_paths(paths), resolve_device(device)
    expect(bool(paths), "paths", paths, "at least one")
    committee = load_committee(model)
    first, settings = committee.potentials[0], OptimConfig()
    sets = {path: labelled_items(path, keys, first, report) for path in paths}
    evaluators = [evaluator_of(p.to(device), sets[paths[0]]) for p in committee.potentials]

    def measured(items: list[Item]) -> dict[str, np.ndarray]:
        if len(evaluators) > 1:
            return committee_residuals(evaluators, items, settings, committee.factors)
        return residuals(evaluators[0], items, settings, first.uncertainty)

    calculator = SEGNNCalculator(first, domain="ignore", device=str(device))
    return {path: _errors_apart(items, calculator, measured) for path, items in sets.items()}


def _errors_apart(items: list[Item], calculator: SEGNNCalculator, measured: Callable) -> dict:
    """Errors of all frames, and how many are outside, in which ways; what is expected is that of those inside."""
    ways = [r.get("outside_domain", []) for r in calculator.evaluate([item.atoms for item in items])]
    groups = [[item for item, found in zip(items, ways, strict=True) if bool(found) == out] for out in (False, True)]
    inside, outside = (measured(group) if group else {} for group in groups)
    names = dict.fromkeys((*inside, *outside))
    both = {name: np.concatenate([one[name] for one in (inside, outside) if name in one]) for name in names}
    errors = errors_of(both)
    if groups[1]:
        errors |= {"forces_std": errors_of(inside).get("forces_std") if inside else None, "outside": len(groups[1])}
        errors["outside_ways"] = dict(Counter(kind for found in ways for kind in {way.kind for way in found}))
        errors["forces_rmse_outside"] = errors_of(outside)["forces_rmse"]
    return errors


def labelled_items(
    path: str, keys: LabelKeys | None, potential: Potential, report: Callable | None = None
) -> list[Item]:
    """The frames of a file, for a potential that knows their elements; without the dispersion that it never saw."""
    cues = potential.config.cues
    inputs = names_read(cues)
    expect(keys is None or isinstance(keys, LabelKeys), "keys", keys, "LabelKeys")
    frames = read_frames(path, (keys or LabelKeys()).model_copy(update={"inputs": tuple(inputs)}))
    check_labels(frames)
    for line in (*rivals_of(frames), *changes_of(frames)) if report else ():
        report(f"{path}: {line}")
    check_species(frames, potential.species, path)
    if potential.charges is not None:
        refuse_wires(frames, cues, potential.config.electrostatics)
    frames = without_pull(without_dispersion(frames, potential.dispersion), cues)
    return [make_item(frame, potential.cutoff, cues) for frame in frames]
