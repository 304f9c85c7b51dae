"""How good a potential is: its errors on labelled structures, those it expects itself, and what its data covered."""

import math
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase import domain, plot, uncertainty
from segnn_ase.accelerate import accelerate
from segnn_ase.checkpoint import load_committee
from segnn_ase.config import OptimConfig, expect
from segnn_ase.data import LabelKeys, as_paths, check_labels, check_species, read_frames
from segnn_ase.graph import Graph, sum_over_atoms
from segnn_ase.items import Item, collate_items, loss_and_prediction, make_item
from segnn_ase.potential import Potential, Prediction, predict, resolve_device


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


def characterize(
    potential: Potential,
    train: list[Item],
    valid: list[Item],
    closest: dict[tuple[int, int], float],
    *,
    lone_atoms: bool,
    before: Potential | None = None,
) -> None:
    """Store in the potential what its training structures covered, and how far its predictions may be off.

    closest: see `smallest_distances`; lone_atoms: whether E0 are energies of lone atoms; before: the potential that
    was fine-tuned.
    """
    predictions, errors = see(potential, train)
    known = None if before is None else before.uncertainty
    potential.uncertainty = uncertainty.measure(errors, see(potential, valid)[1], known)
    covered = [
        domain.Covered(item.graph, p, _density(item.atoms), potential.uncertainty.leverage(p.features.double()))
        for item, p in zip(train, predictions, strict=True)
    ]
    found, known = domain.measure(potential, covered, closest, lone_atoms=lone_atoms), before and before.domain
    potential.domain = domain.merged(found, known) if found and known else found or known


def see(potential: Potential, items: list[Item]) -> tuple[list[Prediction], list[uncertainty.Residuals]]:
    """What a potential makes of each structure, and its errors."""
    predictions, residuals = [], []
    for item in items:
        p = Prediction(*(to_cpu(x) for x in predict(potential, item.graph.to(potential.device))))
        errors = (p.forces - item.labels.forces).numpy()
        residuals.append(uncertainty.Residuals(p.features, float(p.energy[0] - item.labels.energy[0]), errors))
        predictions.append(p._replace(edge_gradients=None))
    return predictions, residuals


def _density(atoms: Atoms) -> float | None:
    """amu/Å^3, of a structure that is periodic in three directions."""
    return domain.density_of(atoms.numbers, atoms.cell.volume) if atoms.pbc.all() else None


def to_cpu(x):
    return x.cpu() if isinstance(x, Tensor) else x


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


def plot_parities(out: Path, name: str, values: dict[str, np.ndarray]) -> None:
    for quantity, unit in (("energy", "eV/atom"), ("forces", "eV/Å"), ("stress", "eV/Å³")):
        reference = values[f"{quantity}_reference"]
        if len(reference):
            path = out.with_suffix(f".parity_{quantity}_{name}.png")
            plot.plot_parity(path, reference, values[f"{quantity}_predicted"], label=quantity, unit=unit)
            std = values.get(f"{quantity}_std", ())
            if len(std):
                path = out.with_suffix(f".calibration_{quantity}_{name}.png")
                error = values[f"{quantity}_predicted"] - reference
                plot.plot_calibration(path, std, error, label=quantity, unit=unit)


def error_table(errors: dict[str, dict]) -> str:
    """RMSE and MAE of every set, in the units that papers use, and the RMSE that the potential itself expects."""
    columns = [("energy", "meV/atom", 1e3), ("forces", "meV/Å", 1e3), ("stress", "meV/Å³", 1e3)]
    heads = [f"{f'{n} [{u}] rmse':>26s} {'mae':>9s}" for n, u, _ in columns]
    lines = [f"{'set':24s}" + "".join(heads) + f"{'forces: rmse expected':>26s}"]
    for name, values in errors.items():
        cells = []
        for quantity, _, factor in columns:
            rmse, mae = values[f"{quantity}_rmse"], values[f"{quantity}_mae"]
            cells.append(f"{'-':>26s} {'-':>9s}" if rmse is None else f"{factor * rmse:26.3f} {factor * mae:9.3f}")
        expected = values.get("forces_std")
        cells.append(f"{'-':>26s}" if expected is None else f"{1e3 * expected:26.3f}")
        lines.append(f"{Path(name).name[-24:]:24s}" + "".join(cells))
    return "\n".join(lines)
