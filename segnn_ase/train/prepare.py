"""Before the first step: frames are read, checked and shown, and a potential is made; `tuning` takes one to go on."""

import math

import numpy as np
import torch

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.errors import DataError
from segnn_ase.check.doctor import seconds_of_check, warn_or_refuse
from segnn_ase.check.families import families
from segnn_ase.check.findings import Sets
from segnn_ase.data.batches import Item, make_item, smallest_distances
from segnn_ase.data.dispersed import taken_off, without_dispersion
from segnn_ase.data.frames import (
    Frame,
    check_geometries,
    check_labels,
    check_species,
    is_isolated_atom,
    label_table,
    nearest_image,
    read_frames,
    refuse_wires,
    species_of,
    split_frames,
    told_alone,
    with_isolated_atoms,
)
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.pulled import without_pull
from segnn_ase.data.references import (
    energies_of_isolated_atoms,
    energy_scale,
    reference_energies,
    told_of_atom,
    without_some_atoms,
)
from segnn_ase.model.elements import parse_species
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.structure.cue_settings import Cue, names_read
from segnn_ase.structure.dispersion import require_dispersion
from segnn_ase.structure.graph import collate, edge_vectors, graphs_of_norms
from segnn_ase.train.job import Training, TrainingData, refuse_overwriting
from segnn_ase.train.potential_goal import POTENTIAL
from segnn_ase.train.resume import checksum_of_items, fingerprint
from segnn_ase.train.settings import USUAL_MINUTES, DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.teacher import with_teacher

CHEAP = 0.05  # part of a training's time that all checks of its frames may take
SHORT, IMAGES = 0.8, 7.0  # of the cutoff, and Å: nearest neighbours are nearer in crystals of all elements
# a pair of neighbours and epoch, at least, in compiled code: measured 1.2e-5 (preset fast) to 2.9e-5 (default) on one
# core for molecules, crystals and liquids. That of a GPU is assumed. No clock is read, so that the same command is
# always checked alike
SECONDS = {"cpu": 1.2e-5, "cuda": 1.2e-6}


def prepare(config: TrainConfig, *, report=print) -> Training:
    """Read the data, show what was found, and build the potential."""
    refuse_overwriting(config.out)
    return from_scratch(config, read_data(config, report), report)


def read_data(config: TrainConfig, report, known: Potential | None = None) -> TrainingData:
    """What the members of a committee have in common; known: the potential to start from."""
    resolve_device(config.training.device)  # refuse before reading
    dispersion = config.data.dispersion
    if dispersion is not None:
        require_dispersion(dispersion, [])
    model = model_config(**config.model) if known is None else known.config
    cutoff, cues = model.cutoff, model.cues
    as_read = frames, valid, tests, isolated = read_sets(config.data, config.training.seed, cutoff, cues)
    report(f"training set: {len(frames)} frames\n{label_table(frames)}")
    if valid:
        report(f"validation set: {len(valid)} frames")
    elif config.data.valid_fraction:
        report("validation set: none, as frames are too few, copies of one another or the only ones of an element")
    species = species_of(frames) + ([] if known is None else known.species)  # those of the frames are added
    for name, others in (("training", frames), ("validation", valid), *((f"test {p}", t) for p, t in tests.items())):
        check_species(others, species, name)
    if dispersion is not None:
        require_dispersion(dispersion, species)
    frames, valid, tests, isolated = learned_part(*as_read, dispersion, cues)
    if dispersion is not None:
        report(taken_off(as_read[0], frames, dispersion))
    names = [cue.name for cue in cues]
    if known is None and config.data.reference_energies is None and isolated is None:
        frames, valid = without_lone_atoms(frames, valid, names, report)
    if model.electrostatics != "none":
        refuse_wires(
            [*frames, *valid, *(frame for some in tests.values() for frame in some)], cues, model.electrostatics
        )
    train, held_out = ([make_item(frame, cutoff, cues) for frame in some] for some in (frames, valid))
    test = {path: [make_item(frame, cutoff, cues) for frame in some] for path, some in tests.items()}
    if model.in_field:
        report(what_teaches_dipoles(train))
    if known is None:
        tell_of_short_cutoff(train, cutoff, report)
    for name, some in (("training", frames), ("validation", valid)):
        refuse_labels_without_weight(name, some, config.training)
    energies_of_isolated_atoms([*frames, *(isolated or ())], names=names)  # refuse before they are judged
    sets = as_files_have_them(*as_read, cues, for_e0=config.data.reference_energies is None)
    sets = sets if known is None else sets._replace(known=known.species)
    thorough = seconds_of_check(sets.all) < CHEAP * seconds_of_training(train, config.training)
    warn_or_refuse(sets, report, refuse=config.data.refuse_flaws, thorough=thorough)
    references = scale = None
    if known is None:
        table = config.data.reference_energies
        table = table and dict(zip(parse_species(list(table)), table.values(), strict=True))
        references = reference_energies(frames, species, table=table, isolated=isolated, names=names)
        scale = energy_scale(frames, references.values)
        report(references.report())
        if ions := sum(bool(told_of_atom(frame, names)) for frame in isolated or ()):
            report(f"{config.data.isolated_atoms}: {ions} atoms are ions or the like, which only training frames teach")
    closest, checksum = smallest_distances(train), checksum_of_items([train, held_out])
    found = TrainingData(train, held_out, test, checksum, frames, closest, isolated, references, scale)
    return with_teacher(found, config, cutoff, report)


def without_lone_atoms(frames, valid, names: list[str], report) -> tuple[list[Frame], list[Frame]]:
    """The sets without isolated atoms, where E0 are fitted as there is none of some element, which is told."""
    kept = without_some_atoms(frames, names)
    if len(kept) == len(frames):
        return frames, valid
    symbols = ", ".join(sorted({str(f.atoms.symbols) for f in frames} - {str(f.atoms.symbols) for f in kept}))
    report(
        f"warning: {len(frames) - len(kept)} isolated atoms ({symbols}) are left out, as there are none of other "
        "elements, so that E0 are fitted: add one of each"
    )
    return kept, [f for f in valid if not is_isolated_atom(f)] or valid


def tell_of_short_cutoff(items: list[Item], cutoff: float, report) -> None:
    """Warn where the nearest neighbours of most periodic atoms, or the next images of a single one, are near the cutoff
    or beyond, where nothing is learned of them."""
    periodic = [item for item in items if item.atoms.pbc.any()]
    alone = [
        near for item in periodic if len(item.atoms) == 1 and cutoff < (near := nearest_image(item.atoms)) < IMAGES
    ]
    if alone:
        report(
            f"warning: {len(alone)} periodic frames of one atom count as isolated atoms, as their images are "
            f"{min(alone):.1f} Å away or more: raise the cutoff ({cutoff:g} Å) if these are crystals"
        )
    distances = [nearest_distances(item) for item in periodic if len(item.atoms) > 1 or len(item.graph.edge_src)]
    if distances and (middle := float(np.median(np.concatenate(distances)))) > SHORT * cutoff:
        told = f"{middle:.1f} Å away" if math.isfinite(middle) else "farther away"
        report(
            f"warning: the nearest neighbours of half of the atoms are {told}, and the cutoff is {cutoff:g} Å: raise "
            "it to take in more than these (--cutoff)"
        )


def nearest_distances(item: Item) -> np.ndarray:
    """(N,) Å, infinite of atoms without a neighbour within the cutoff."""
    found = np.full(len(item.atoms), np.inf)
    np.minimum.at(found, item.graph.edge_dst.numpy(), edge_vectors(item.graph).norm(dim=1).numpy())
    return found


def refuse_labels_without_weight(name: str, frames: list[Frame], settings: OptimConfig) -> None:
    """Raise DataError where nothing that has a weight is known of any frame: the loss would be zero from the start."""
    kinds = ("energy", "forces", "stress")
    weights = {kind: getattr(settings, f"{kind}_weight") for kind in kinds}
    if frames and not any(weights[kind] and getattr(f, kind) is not None for f in frames for kind in kinds):
        told = ", ".join(f"training.{kind}_weight = {weight:g}" for kind, weight in weights.items())
        there = " and ".join(kind for kind in kinds if any(getattr(f, kind) is not None for f in frames)) or "no labels"
        raise DataError(
            f"{name} set has {there}, and weights are {told}: there is nothing to learn; raise one of what is there"
        )


def learned_part(frames, valid, tests: dict[str, list[Frame]], isolated, dispersion: str | None, cues) -> tuple:
    """The sets without the dispersion of their labels, and without the pull of fields on net charges."""

    def learned(some: list[Frame], *, strict: bool = True) -> list[Frame]:
        return without_pull(without_dispersion(some, dispersion), cues, strict=strict)

    isolated = isolated and learned(isolated, strict=False)  # which are read for E0 only
    return learned(frames), learned(valid), {path: learned(some) for path, some in tests.items()}, isolated


def as_files_have_them(frames, valid, tests: dict[str, list[Frame]], isolated, cues, *, for_e0: bool) -> Sets:
    """What is judged: labels with their dispersion, of which digits and repeated values tell something, beside what a
    potential with these cues is told: what it is not, as charges, explains nothing."""
    test = [f for some in tests.values() for f in some]
    sets = [frames, valid, test, isolated if for_e0 else None]
    return Sets(*(some and told_alone(some, names_read(cues)) for some in sets))


def seconds_of_training(items: list[Item], settings: OptimConfig) -> float:
    """How long a training takes, at least."""
    device = resolve_device(settings.device).type
    longest = math.inf if settings.max_minutes is None else 60 * settings.max_minutes
    if settings.epochs is None:
        return min(longest, 60 * settings.committee * (settings.minutes or USUAL_MINUTES))
    edges = sum(len(item.graph.edge_src) for item in items)
    return min(longest, settings.committee * settings.epochs * SECONDS[device] * edges)


def label_keys(data: DataConfig, cues: tuple[Cue, ...]) -> LabelKeys:
    names = LabelKeys.model_fields.keys() - {"inputs"}
    return LabelKeys(inputs=names_read(cues), **{name: getattr(data, f"{name}_key") for name in names})


def read_sets(
    data: DataConfig, seed: int, cutoff: float, cues: tuple[Cue, ...]
) -> tuple[list[Frame], list[Frame], dict[str, list[Frame]], list | None]:
    """Frames for training, validation and tests, and isolated atoms where they have a file of their own."""
    keys = label_keys(data, cues)

    def read(paths: str | list[str], keys: LabelKeys = keys) -> list[Frame]:
        return with_isolated_atoms(read_frames(paths, keys), cutoff)

    frames = read(list(data.train))
    if data.valid:
        valid = read(list(data.valid))
    else:
        check_geometries(frames)
        some = told_alone(frames, names_read(cues))
        together = families(some, round(data.valid_fraction * len(frames))) if data.valid_fraction else None
        frames, valid = split_frames(frames, data.valid_fraction, seed, together)
    check_labels(frames)
    if data.valid:
        check_labels(valid)
    tests = {path: read(path) for path in data.test}
    isolated = data.isolated_atoms and read(data.isolated_atoms, LabelKeys(energy=data.energy_key, inputs=keys.inputs))
    return frames, valid, tests, isolated


def from_scratch(config: TrainConfig, data: TrainingData, report) -> Training:
    """A training of a potential with random weights."""
    potential = fresh_potential(config, data)
    size = sum(p.numel() for p in potential.parameters())
    neighbors = np.mean([len(item.graph.edge_src) / len(item.graph.numbers) for item in data.train])
    report(f"energy scale {data.scale:.3f} eV; {size} parameters; {neighbors:.1f} neighbours per atom")
    metadata = {"training": config.model_dump(mode="json"), "fine_tuned_from": None}
    same = fingerprint(config, data, None)
    return Training(potential, data, POTENTIAL, metadata, same, lone_atoms=data.references.of_atoms)


def fresh_potential(config: TrainConfig, data: TrainingData) -> Potential:
    E0, settings = data.references.values, config.training
    constants = {"reference_energies": list(E0.values()), "scales": [data.scale] * len(E0)}
    potential = Potential(model_config(**config.model), list(E0), **constants, seed=settings.seed)
    potential.to(resolve_dtype(settings.dtype))
    potential.dispersion = config.data.dispersion
    potential.calibrate(collate(graphs_of_norms([item.graph for item in data.train])))
    potential.set_core(data.closest)
    if potential.responses is not None:
        set_scales(potential, data.train)
    return potential


def what_teaches_dipoles(items: list[Item]) -> str:
    """How many frames of the training set have labels of dipoles, or are in a field, in a line."""
    names = ("dipole", "polarizability", "born")
    counts = {name: sum(bool(getattr(item.labels, name).isfinite().any()) for item in items) for name in names}
    counts |= {"field": sum(bool(item.graph.field.any()) for item in items)}
    told = "of the field: " + ", ".join(f"{count}/{len(items)} {name}" for name, count in counts.items())
    missing = {"dipoles": ("dipole", "born", "field"), "polarizabilities": ("polarizability", "field")}
    untaught = [name for name, kinds in missing.items() if not any(counts[kind] for kind in kinds)]
    return told if not untaught else f"{told}\n  warning: nothing teaches {' and '.join(untaught)}: they stay random"


def set_scales(potential: Potential, items: list[Item]) -> None:
    """How large dipoles and polarizabilities of atoms are, by the labels, and of each element what is usual."""
    kinds = [potential.species_index[item.graph.numbers] for item in items]
    counts = torch.stack([torch.bincount(kind, minlength=len(potential.species)).double() for kind in kinds])
    alpha = torch.stack([item.labels.polarizability[0].diagonal().mean() for item in items])
    dipoles = torch.cat([item.labels.dipole for item in items]) / counts.sum(1, keepdim=True).sqrt()
    born = torch.cat([item.labels.born for item in items])
    readout, known = potential.responses, alpha.isfinite()
    sizes = [x[x.isfinite()].square().mean().sqrt() for x in (dipoles, 0.5 * born)]
    found = [float(size) for size in sizes if bool(size > 0)]
    readout.scales[0] = max(found, default=1.0)
    if known.any():
        readout.usual[:] = torch.linalg.lstsq(counts[known], alpha[known, None], driver="gelsd").solution[:, 0]
        left = torch.cat([item.labels.polarizability for item in items])[known]
        left = left - (counts[known] @ readout.usual.double())[:, None, None] * torch.eye(3)
        size = (left / counts[known].sum(1).sqrt()[:, None, None]).square().mean().sqrt()
        readout.scales[1] = max(float(size), 1e-3)
