"""Properties as what is to be learned: the loss, what is measured, what the end of a training tells."""

import re
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.figures import plot_learning_curve, plot_parity
from segnn_ase.compiled.guard import choose_layers
from segnn_ase.data.batches import Item, collate_items, edges_of, pack
from segnn_ase.model.network import Operations
from segnn_ase.properties.files import read_properties, save_properties
from segnn_ase.properties.model import PropertyModel
from segnn_ase.properties.settings import PropertyTraining
from segnn_ase.properties.targets import Target
from segnn_ase.train.job import OF_RUN, Goal, Gradient, Measure, Training, nothing_more, output_files
from segnn_ase.train.report import printer, short_name
from segnn_ase.train.settings import LoopConfig

DISPLACED = 0.1  # Å


def layers_for(model: PropertyModel, example: Item) -> Operations | None:
    """Compiled layers, where they are right on an example, with its atoms displaced: symmetry hides what is wrong."""
    graph = example.graph.to(model.device)
    moved = DISPLACED * np.random.default_rng(0).normal(size=tuple(graph.positions.shape))
    graph = graph._replace(positions=graph.positions + torch.as_tensor(moved).to(graph.positions))

    def outputs(twin: nn.Module, operations: Operations | None) -> list[Tensor]:
        return cast(PropertyModel, twin).of_atoms(graph, operations)

    return choose_layers(model, outputs)


class Errors(NamedTuple):
    """Of one target in a batch: rows of structures or atoms that have a label."""

    predicted: Tensor  # components (n, dim)
    labels: Tensor
    structure: Tensor  # (n,) of each row
    size: float  # of what is to be learned

    def on_cpu(self) -> "Errors":
        return Errors(self.predicted.cpu(), self.labels.cpu(), self.structure.cpu(), self.size)

    @property
    def squares(self) -> Tensor:
        """(n,) in units of what is to be learned."""
        return ((self.predicted - self.labels) / self.size).square().mean(dim=1)


def errors_in(model: PropertyModel, batch: Item, operations: Operations | None) -> list[Errors]:
    graph, found = batch.graph.to(model.device), []
    for n, predicted in enumerate(model(graph, operations)):
        labels = batch.labels[n].to(predicted.device)
        rows = torch.isfinite(labels).all(dim=1)
        structure = graph.batch if model.targets[n].per == "atom" else torch.arange(graph.n_graphs, device=rows.device)
        found.append(Errors(predicted[rows], labels[rows], structure[rows], model.constants[n].size))
    return found


def loss_of_errors(errors: list[Errors], rows: list[int] | None = None) -> Tensor:
    """The mean over targets that have labels, each of its mean over their rows; every weight gets its gradient.

    rows: with labels in the batch of which this is a part.
    """
    rows = [len(one.squares) for one in errors] if rows is None else rows
    means = [one.squares.sum() / max(count, 1) for one, count in zip(errors, rows, strict=True)]
    return torch.stack(means).sum() / max(sum(count > 0 for count in rows), 1)


def gradient_of_errors(model: PropertyModel, example: Item, settings: LoopConfig) -> Gradient:
    operations = layers_for(model, example)

    def gradient(batch: Item, whole: tuple[int, ...] | None = None) -> float:
        widths = [labels.shape[1] for labels in batch.labels]
        rows = None if whole is None else [count // width for count, width in zip(whole, widths, strict=True)]
        loss = loss_of_errors(errors_in(model, batch, operations), rows)
        loss.backward()
        return float(loss.detach())

    return gradient


def measure_of_errors(model: PropertyModel, example: Item, settings: LoopConfig) -> Measure:
    operations = layers_for(model, example)

    @torch.no_grad()
    def loss(batch: Item) -> float:
        return float(loss_of_errors(errors_in(model, batch, operations)))

    return Measure(lambda items: property_residuals(model, items, settings, operations), loss)


@torch.no_grad()
def property_residuals(
    model: PropertyModel, items: list[Item], settings: LoopConfig, operations: Operations | None = None
) -> dict[str, np.ndarray]:
    """The loss of each structure, and labels and predictions of each target, flat, in the form of the labels."""
    found: dict[str, list[np.ndarray]] = {"loss": []}
    for numbers in pack(list(range(len(items))), edges_of(items), settings.batch_size, settings.max_edges):
        batch = collate_items([items[n] for n in numbers])
        total, targets = torch.zeros(2, batch.graph.n_graphs, dtype=torch.float64)
        for target, one in zip(model.targets, errors_in(model, batch, operations), strict=True):
            one = one.on_cpu()
            rows = torch.bincount(one.structure, minlength=len(total))
            sums = torch.zeros_like(total).index_add(0, one.structure, one.squares)
            total, targets = total + sums / rows.clamp_min(1), targets + (rows > 0)
            for name, values in (("reference", one.labels), ("predicted", one.predicted)):
                found.setdefault(f"{target.name}_{name}", []).append(target.labels(values).flatten().numpy())
        found["loss"].append((total / targets.clamp_min(1)).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def errors_of_properties(found: dict[str, np.ndarray]) -> dict:
    """Loss, and rmse and mae of the components of each target, from `property_residuals`; None without labels."""
    errors: dict = {"loss": float(found["loss"].mean())}
    for name in (key.removesuffix("_reference") for key in found if key.endswith("_reference")):
        delta = found[f"{name}_predicted"] - found[f"{name}_reference"]
        errors[f"{name}_rmse"] = float(np.sqrt(np.mean(delta**2))) if len(delta) else None
        errors[f"{name}_mae"] = float(np.mean(np.abs(delta))) if len(delta) else None
    return errors


def without_loss(errors: dict) -> dict:
    return {name: value for name, value in errors.items() if name != "loss"}


def told_in_a_line(row: dict) -> str:
    errors = {k.removeprefix("valid_").removesuffix("_rmse"): v for k, v in row.items() if k.endswith("_rmse")}
    parts = [f"{name} {value:.3g}" for name, value in errors.items() if value is not None]
    return " ".join([f"loss {row['train_loss']:.3g}/{row['valid_loss']:.3g}", *parts])


def finish_properties(config: PropertyTraining, job: Training, history: list[dict], *, progress: bool) -> dict:
    """Measure the kept model on every set, store its errors in the file, draw them, print the table."""
    model, kept = read_properties(config.out)
    model.to(resolve_device(config.training.device))
    operations = layers_for(model, job.data.smallest)
    sets = {name: items for name, items in {"train": job.data.train, "valid": job.data.valid}.items() if items}
    sets |= job.data.test
    found = {name: property_residuals(model, items, config.training, operations) for name, items in sets.items()}
    errors = {name: without_loss(errors_of_properties(values)) for name, values in found.items()}
    metadata = {**job.metadata, **{name: kept[name] for name in OF_RUN}, "errors": errors}
    save_properties(config.out, model.cpu(), metadata=metadata)
    for name in sets.keys() - {"train"}:
        draw(config.out, short_name(name, list(sets)), model.targets, found[name])
    if len(history) > 1:
        losses = [{key: row[key] for key in ("epoch", "train_loss", "valid_loss", "lr")} for row in history]
        plot_learning_curve(output_files(config.out)["curve"], losses)
    told = f"kept is epoch {kept['epoch']} of {history[-1]['epoch']}\nwrote {config.out}"
    printer(progress)(f"{table_of_errors(errors)}\n{told}")
    return errors


def draw(out: str, name: str, targets: list[Target], found: dict[str, np.ndarray]) -> None:
    for target in targets:
        reference, predicted = (found[f"{target.name}_{kind}"] for kind in ("reference", "predicted"))
        if len(reference):
            short = re.sub(r"[^\w-]+", "_", target.name)
            path = Path(out).with_suffix(f".parity_{short}_{name}.png")
            plot_parity(path, reference, predicted, label=target.name, unit="unit of the labels")


def table_of_errors(errors: dict[str, dict]) -> str:
    """RMSE and MAE of each property on each set, in the unit of the labels."""
    names = list(dict.fromkeys(key.removesuffix("_rmse") for of in errors.values() for key in of if "_rmse" in key))
    lines = [f"{'set':24s}" + "".join(f"{f'{name} rmse':>24s} {'mae':>10s}" for name in names)]
    for path, of in errors.items():
        cells = [(of.get(f"{name}_rmse"), of.get(f"{name}_mae")) for name in names]
        row = "".join(f"{number(rmse):>24s} {number(mae):>10s}" for rmse, mae in cells)
        lines.append(f"{Path(path).name[-24:]:24s}{row}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


PROPERTY = Goal(
    gradient_of_errors,
    measure_of_errors,
    errors_of_properties,
    told_in_a_line,
    nothing_more,
    save_properties,
    finish_properties,
)
