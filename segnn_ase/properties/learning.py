"""Training of properties, by the loop of all trainings."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.errors import DataError, StructureError, expect
from segnn_ase.base.processes import is_first, on_first
from segnn_ase.check.families import families
from segnn_ase.data.batches import Item
from segnn_ase.data.frames import Frame, but_only_ones, check_geometries, check_species, drawn_from, species_of
from segnn_ase.model.settings import model_config
from segnn_ase.properties.goal import PROPERTY
from segnn_ase.properties.labels import Labelled, check_forms, compositions, read_labelled, table_of, targets_of
from segnn_ase.properties.model import Constants, PropertyModel
from segnn_ase.properties.settings import PropertyTraining
from segnn_ase.properties.targets import UNKNOWN, Target, refuse_unreachable
from segnn_ase.store.tensors import checksum
from segnn_ase.structure.graph import collate, graph_from_atoms, graphs_of_norms, with_pairs
from segnn_ase.train.job import Training, TrainingData, refuse_overwriting
from segnn_ase.train.loop import run_training
from segnn_ase.train.report import printer
from segnn_ase.train.resume import checksum_of_items, decisive_settings, settings_of
from segnn_ase.train.start import deadline_of
from segnn_ase.train.together import join_for, only_training


class Values(tuple[Tensor, ...]):
    """Labels as components of irreps, one tensor for each target: (B, dim), or of atoms (N, dim); NaN is unknown."""

    def __new__(cls, *tensors: Tensor) -> "Values":
        return super().__new__(cls, tensors)

    def __getnewargs__(self) -> tuple:  # of a copy and of a pickle
        return tuple(self)


def train_properties(config: PropertyTraining, *, progress: bool = True) -> dict:
    """Train a model of properties and write it to config.out. Returns errors, {"valid": {"dipole_rmse": …}, …}.

    Errors are those of components, in the unit of the labels. Raises DataError, ConfigError and FileNotFoundError for
    what cannot be trained on, OutOfTime when `max_minutes` are over; the same call goes on.
    """
    expect(isinstance(config, PropertyTraining), "config", config, "a PropertyTraining")
    join_for(config)
    with only_training(config.out):
        progress &= is_first()
        job = on_first(partial(training_of_properties, config, printer(progress)))
        return run_training(config, job, deadline_of(config.training), progress=progress)


def training_of_properties(config: PropertyTraining, report) -> Training:
    """A training of a model with random weights."""
    refuse_overwriting(config.out)
    resolve_device(config.training.device)  # refuse before reading
    model, data = prepared(config, report)
    metadata = {"training": config.model_dump(mode="json")}
    start = [settings_of(model.config), *([*t[:2], list(t.shape), *t[3:]] for t in model.targets)]
    same = {"settings": decisive_settings(config), "data": data.checksum, "start": checksum(start)}
    size = sum(p.numel() for p in model.parameters())
    report(f"{len(data.train)} frames to learn from, {len(data.valid)} for validation; {size} parameters")
    return Training(model, data, PROPERTY, metadata, same)


def prepared(config: PropertyTraining, report) -> tuple[PropertyModel, TrainingData]:
    """The data, and a model with random weights, but with what elements and compositions say."""
    data, settings = config.data, model_config(**config.model)
    frames = read_labelled(data.train, data.target, data.irreps)
    valid = read_labelled(data.valid, data.target, data.irreps) if data.valid else []
    tests = {path: read_labelled([path], data.target, data.irreps, every=False) for path in data.test}
    for some in (frames, valid, *tests.values()):
        check_geometries(some)
    targets = targets_of([*frames, *valid], data.target, data.irreps, data.pooling)
    refuse_unreachable(targets, settings)
    for some in tests.values():
        check_forms(some, targets)
    report(table_of(frames, targets))
    if not valid:
        frames, valid = split(frames, targets, data.valid_fraction, config.training.seed)
    species = species_of(frames)
    for name, others in (("validation", valid), *((f"test {path}", some) for path, some in tests.items())):
        check_species(others, species, name, **UNKNOWN)
    sets = [[item_of(frame, targets, settings.cutoff) for frame in some] for some in (frames, valid, *tests.values())]
    constants = [constants_of(target, frames, species) for target in targets]
    model = PropertyModel(settings, species, targets, constants=constants, seed=config.training.seed)
    model.to(resolve_dtype(config.training.dtype))
    model.calibrate(collate(graphs_of_norms([item.graph for item in sets[0]])))
    test = dict(zip(tests, sets[2:], strict=True))
    return model, TrainingData(sets[0], sets[1], test, checksum_of_items(sets[:2]), [], {})


def split(
    frames: list[Labelled], targets: list[Target], fraction: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """For training and validation, where alike frames stay together; lone atoms, what has no label and the only frames
    of an element are learned. Raises DataError where one side has no label of a target."""
    bare = [Frame(f.atoms, None, None, None, f.source, (None, None, None)) for f in frames]
    together = families(bare, round(fraction * len(frames))) if fraction else None
    lone = {n for n, f in enumerate(frames) if len(f.atoms) == 1}
    drawn = drawn_from([n for n, f in enumerate(frames) if f.labels and n not in lone], fraction, seed, together)
    drawn = but_only_ones(drawn, frames, lone)
    train, valid = [f for n, f in enumerate(frames) if n not in drawn], [frames[n] for n in sorted(drawn)]
    for target in targets:
        counts = [sum(target.name in f.labels for f in some) for some in (train, valid)]
        if not counts[0] or (valid and not counts[1]):
            raise DataError(
                f"target {target.name!r}: {sum(counts)} of {len(frames)} frames have it, of which {counts[1]} were "
                "drawn for validation; give a set for validation as data.valid, or another valid_fraction or seed"
            )
    return train, valid


def item_of(frame: Labelled, targets: list[Target], cutoff: float) -> Item:
    """A frame as tensors. Raises DataError where it has no neighbours to search."""
    labels = []
    for target in targets:
        rows = len(frame.atoms) if target.per == "atom" else 1
        known = frame.labels.get(target.name)
        values = np.full((rows, *target.shape), np.nan) if known is None else known.value
        labels.append(target.components(torch.as_tensor(values, dtype=torch.float64)))
    try:
        return Item(with_pairs(graph_from_atoms(frame.atoms, cutoff)), Values(*labels), frame.atoms)
    except StructureError as error:
        raise DataError(f"{frame.source}: {error}") from error


def constants_of(target: Target, frames: list[Labelled], species: list[int]) -> Constants:
    """References by least squares on the compositions, and the root mean square of what they leave.

    Raises DataError for labels that are all the same, which teach nothing.
    """
    known = [(f.atoms, f.labels[target.name].value) for f in frames if target.name in f.labels]
    y = target.components(torch.as_tensor(np.concatenate([value for _, value in known]))).numpy()
    if target.per == "atom":
        x = np.concatenate([atoms.numbers[:, None] == species for atoms, _ in known]).astype(float)
    else:
        x = compositions([atoms for atoms, _ in known], species)
    atoms = x.sum(axis=1, keepdims=True)  # one where rows are atoms
    x = x / atoms if target.pooling == "mean" else x
    there = np.isfinite(y).all(axis=1)
    x, y = x[there], y[there].copy()
    given = float(np.sqrt(np.mean(y**2)))
    fitted = np.linalg.lstsq(x, y[:, target.scalars], rcond=None)[0]
    y[:, target.scalars] -= x @ fitted
    squares = np.array([np.mean(y[:, np.equal(target.kind_of_component, k)] ** 2) for k in target.kind_of_component])
    size = float(np.sqrt(np.mean(y**2)))
    if not np.isfinite(size):
        raise DataError(f"target {target.name!r} has labels up to {np.abs(y).max():.1e}, whose squares are no numbers")
    if not size > 1e-12 * given:
        raise DataError(
            f"target {target.name!r} is what the elements alone say in all {len(y)} labels: there is nothing to learn"
        )
    per_atom = float(np.sqrt(atoms[there].mean())) if target.pooling == "sum" else 1.0
    scales = np.maximum(np.sqrt(squares), 1e-3 * size) / per_atom
    return Constants(fitted.tolist(), scales.tolist(), size)
