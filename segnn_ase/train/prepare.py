"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

import copy

import numpy as np
import torch

from segnn_ase.base.devices import resolve_device
from segnn_ase.check.doctor import warn_or_refuse
from segnn_ase.check.findings import Sets
from segnn_ase.data.batches import Item, make_item, smallest_distances
from segnn_ase.data.frames import (
    Frame,
    LabelKeys,
    check_labels,
    check_species,
    label_table,
    read_frames,
    species_of,
    split_frames,
)
from segnn_ase.data.references import energy_scale, reference_energies
from segnn_ase.model.elements import parse_species
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.model.settings import model_config
from segnn_ase.structure.graph import collate
from segnn_ase.train.job import Training, refuse_overwriting
from segnn_ase.train.resume import fingerprint
from segnn_ase.train.settings import OptimConfig, TrainConfig


def prepare(
    config: TrainConfig,
    *,
    start: tuple[Potential, dict] | None = None,
    split_seed: int | None = None,
    report=print,
) -> Training:
    """Read the data, show what was found, and build the potential (or shift the one to start from).

    split_seed: of the draw of the validation set; None takes that of the training.
    """
    data, settings = config.data, config.training
    refuse_overwriting(config.out)
    resolve_device(settings.device)  # refuse before reading
    keys = LabelKeys(energy=data.energy_key, forces=data.forces_key, stress=data.stress_key)
    frames = read_frames(list(data.train), keys)
    if data.valid:
        valid = read_frames(list(data.valid), keys)
    else:
        frames, valid = split_frames(frames, data.valid_fraction, settings.seed if split_seed is None else split_seed)
    tests = {path: read_frames(path, keys) for path in data.test}
    check_labels(frames)
    if data.valid:
        check_labels(valid)
    report(f"training set: {len(frames)} frames\n{label_table(frames)}")
    if valid:
        report(f"validation set: {len(valid)} frames")
    species = species_of(frames) if start is None else start[0].species
    for name, others in (("training", frames), ("validation", valid), *((f"test {p}", t) for p, t in tests.items())):
        check_species(others, species, name)
    cutoff = model_config(**config.model).cutoff if start is None else start[0].cutoff
    train_items = [make_item(frame, cutoff) for frame in frames]
    closest = smallest_distances(train_items)
    valid_items = [make_item(frame, cutoff) for frame in valid]
    test_items = {path: [make_item(frame, cutoff) for frame in test] for path, test in tests.items()}
    from_atoms = start is None and data.reference_energies is None and data.isolated_atoms
    isolated = read_frames(data.isolated_atoms, LabelKeys(energy=data.energy_key)) if from_atoms else None
    sets = Sets(frames, valid, [f for test in tests.values() for f in test], isolated)
    warn_or_refuse(sets, report, refuse=data.refuse_flaws)
    if start is None:
        potential, lone_atoms = fresh_potential(config, frames, species, train_items, report)
        potential.set_core(closest)
        before = origin = None
    else:
        before = copy.deepcopy(start[0])
        lone_atoms = before.domain is not None and before.domain.lone_atoms
        potential = start[0].to(getattr(torch, settings.dtype))
        potential.requires_grad_(True)
        potential.domain = potential.uncertainty = None  # measured again at the end
        potential.set_core(closest, keep_smaller=True)
        shift_references(potential, frames, train_items, settings, report)
        origin = {k: v for k, v in start[1].items() if k != "fine_tuned_from"}
    metadata = {"training": config.model_dump(mode="json"), "fine_tuned_from": origin}
    identity = fingerprint(config, [train_items, valid_items], origin)
    return Training(potential, train_items, valid_items, test_items, closest, lone_atoms, before, metadata, identity)


def fresh_potential(
    config: TrainConfig, frames: list[Frame], species: list[int], items: list[Item], report
) -> tuple[Potential, bool]:
    """An untrained potential, and whether its reference energies are those of lone atoms."""
    data, settings = config.data, config.training
    table = None
    if data.reference_energies is not None:
        table = dict(zip(parse_species(list(data.reference_energies)), data.reference_energies.values(), strict=True))
    isolated = None
    if data.isolated_atoms is not None:
        isolated = read_frames(data.isolated_atoms, LabelKeys(energy=data.energy_key))
    references = reference_energies(frames, species, table=table, isolated=isolated)
    report(references.report())
    scale = energy_scale(frames, references.values)
    torch.manual_seed(settings.seed)
    potential = Potential(
        model_config(**config.model),
        species,
        reference_energies=[references.values[z] for z in species],
        scales=[scale] * len(species),
    ).to(getattr(torch, settings.dtype))
    # from the whole set: frames often come sorted by kind, and norms from crystals alone explode in a melt
    potential.calibrate(collate([item.graph for item in items[:: -(-len(items) // 64)]]))
    report(
        f"energy scale {scale:.3f} eV; {sum(p.numel() for p in potential.parameters())} parameters; "
        f"{np.mean([len(item.graph.edge_src) / len(item.graph.numbers) for item in items]):.1f} neighbours per atom"
    )
    return potential, references.of_atoms


def shift_references(potential: Potential, frames: list[Frame], items: list[Item], settings: OptimConfig, report):
    """Move E0 by the mean difference between the new labels and the old model, by composition."""
    differences = []
    potential.eval()
    for frame, item in zip(frames, items, strict=True):
        if frame.energy is not None:
            energy = float(predict(potential, item.graph, forces=False).energy[0])
            differences.append(frame._replace(energy=frame.energy - energy))
    if not differences:
        return
    present = species_of(differences)
    shift = reference_energies(differences, present)
    report(f"shift of {shift.report()}")
    potential.reference_energies = [
        e + shift.values.get(z, 0.0) for z, e in zip(potential.species, potential.reference_energies, strict=True)
    ]
