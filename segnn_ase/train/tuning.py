"""A training that goes on from a trained potential: new elements, reference energies, and what is to be kept."""

import copy

import numpy as np

from segnn_ase.base.devices import resolve_device, resolve_dtype
from segnn_ase.base.errors import ConfigError
from segnn_ase.data.batches import Item, make_item, smallest_distances
from segnn_ase.data.frames import Frame, species_of
from segnn_ase.data.references import ALIKE, ReferenceEnergies, energy_scale, is_lone_ion, reference_energies
from segnn_ase.model.more_elements import named, nearest_element, with_more_elements
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.store.tensors import checksum
from segnn_ase.train.beside import Beside, beside
from segnn_ase.train.job import Training, TrainingData
from segnn_ase.train.old_frames import (
    CONTRADICTED,
    LOOKED_AT,
    OLD,
    contradiction,
    energies_off,
    labelled_set,
    read_old_frames,
    read_old_structures,
    wanted,
)
from segnn_ase.train.potential_goal import POTENTIAL
from segnn_ase.train.prepare import label_keys
from segnn_ase.train.resume import checksum_of_items, fingerprint
from segnn_ase.train.settings import TrainConfig
from segnn_ase.trust.more_elements import domain_of_more

STILL = 1e-6  # eV by which an E0 is moved that stays where it was
FAINT = 1e-3  # how much the E0 of a known element moves where that of a new one could as well
NOTHING_OLD = "nothing is known of the old data: give --replay or --structures to see, and to keep, what it knew"
OF_FILES = {"replay", "structures"}  # settings of which the frames count, not the names


def from_trained(config: TrainConfig, data: TrainingData, start: Potential, metadata: dict, report) -> Training:
    """A training that goes on from a trained potential, which is left as it is."""
    before = with_elements_of(data.frames, start, config, report)
    added = before.species[len(start.species) :]
    potential = copy.deepcopy(before).to(resolve_dtype(config.training.dtype)).eval()
    potential.domain = potential.uncertainty = potential.examples = None  # measured again at the end
    most = max(LOOKED_AT, 4 * wanted(config.finetune, len(data.train)) // 3 + 1)
    frames = read_old_frames(config.finetune, label_keys(config.data, before.config.cues), before, most)
    given = [make_item(frame, before.cutoff, before.config.cues) for frame in frames]
    structures = read_old_structures(config.finetune, before, most)
    learned = wanted(config.finetune, len(data.train)) if keeps(config, before, data.train, report) else 0
    set_cores(potential, smallest_distances([*data.train, *given]), added)
    lone_atoms = before.domain is not None and before.domain.lone_atoms
    labelled = [*data.frames, *frames], [*data.train, *given]
    off = None if added else energies_off(before, labelled[1], config.training)
    shift = shift_references(potential, added, *labelled, structures, off, report)
    became_lone = before.domain is not None and not lone_atoms and shift is not None and shift.of_atoms
    lone_atoms = all_are_lone(potential.species, shift, added, before=lone_atoms)
    if became_lone:
        report("E0 become those of lone atoms: of structures that the potential labels itself energies are not learned")
    began = copy.deepcopy(potential).requires_grad_(False)
    old = old_sets(config, learned, given, structures, began, energies=not became_lone)
    report("\n".join(one.told() for one in old) or NOTHING_OLD)
    if config.finetune.keep == "old" and not any(one.replayed for one in old):
        raise ConfigError(
            "setting 'finetune.keep' is 'old', but nothing old is there to learn; expected two structures or more by "
            "--replay or --structures"
        )
    data = data._replace(beside=old, checksum=checksum([data.checksum, checksum_of_items([given, structures])]))
    origin = {k: v for k, v in metadata.items() if k != "fine_tuned_from"}
    metadata = {"training": config.model_dump(mode="json"), "fine_tuned_from": origin}
    same = {**fingerprint(config, data, before), "finetune": config.finetune.model_dump(mode="json", exclude=OF_FILES)}
    potential.requires_grad_(True)
    return Training(
        potential,
        data,
        POTENTIAL,
        metadata,
        same,
        lone_atoms=lone_atoms,
        before=before,
        began=began,
        pull=config.finetune.l2_sp,
    )


def with_elements_of(frames: list[Frame], start: Potential, config: TrainConfig, report) -> Potential:
    """The potential, or one that knows the elements of the frames, too."""
    added = [z for z in species_of(frames) if z not in start.species]
    if not added:
        return start
    begin = config.finetune.new_elements
    like = ", ".join(f"{named([z])} begins like {named([nearest_element(z, start.species)])}" for z in added)
    report(f"new elements: {named(added)}; {like if begin == 'nearest' else 'they begin with random weights'}")
    names = [cue.name for cue in start.config.cues]
    scale = energy_scale(frames, reference_energies(frames, species_of(frames), names=names).values)
    grown = with_more_elements(start, added, begin=begin, scale=scale, seed=config.training.seed)
    grown.domain = start.domain and domain_of_more(start.domain, len(grown.species))
    grown.uncertainty, grown.examples = start.uncertainty, start.examples
    return grown


def keeps(config: TrainConfig, start: Potential, items: list[Item], report) -> bool:
    """Whether the old is to be learned. Tells where labels contradict what the potential knows of its structures."""
    settings = config.finetune
    if settings.keep != "auto":
        return settings.keep == "old"
    if settings.replay or settings.structures or start.examples is None:
        return True
    size = contradiction(start, items, config.training)
    if size is None or size < CONTRADICTED:
        return True
    report(
        f"forces of frames within its domain are {size:.1f} times as far off as is expected: the new labels seem to be "
        "of another level of theory, so that nothing old is learned (--keep old would)"
    )
    return False


def all_are_lone(species: list[int], shift: ReferenceEnergies | None, added: list[int], *, before: bool) -> bool:
    """Whether all E0 are energies of lone atoms: those of such frames, and those that were before and did not move."""
    moved = {} if shift is None else {z: value for z, value in shift.values.items() if abs(value) > STILL}
    known = set() if shift is None or not shift.of_atoms else set(shift.values)
    known |= set(species) - moved.keys() - set(added) if before else set()
    return known >= set(species)


def set_cores(potential: Potential, closest: dict[tuple[int, int], float], added: list[int]) -> None:
    """Core radii from the shortest distances: of known pairs they are only lowered, of new elements they are set."""
    new = {pair: d for pair, d in closest.items() if set(pair) & set(added)}
    potential.set_core(new)
    potential.set_core({pair: d for pair, d in closest.items() if pair not in new}, keep_smaller=True)


def shift_references(
    potential: Potential,
    added: list[int],
    frames: list[Frame],
    items: list[Item],
    old: list[Item],
    off: float | None,
    report,
) -> ReferenceEnergies | None:
    """Move E0 by what labels and potential differ, which is returned; None where no frame has an energy.

    old: structures of before, whose energies are left as they are where the labels allow that; off: see `energies_off`,
    where that is little, labels differ by errors of the potential, and E0 stay, but for those of lone atoms.
    """
    names = [cue.name for cue in potential.config.cues]
    given = [(f, item) for f, item in zip(frames, items, strict=True) if not is_lone_ion(f, names)]
    differences = differences_of(potential, *map(list, zip(*given, strict=True))) if given else []
    if not differences:
        return None
    species = species_of(differences)
    shift = reference_energies(differences, species, names=names)
    if not shift.of_atoms and (old or set(added) & set(species)):
        shift = shift_beside(differences, [item.atoms.numbers for item in old], added)
    if off is not None and off < CONTRADICTED and not shift.of_atoms:
        report(f"E0 stay: energies of the labels are {off:.1f} times as far off as is expected, which is to be learned")
        return None
    report(f"shift of {shift.report()}")
    pairs = zip(potential.species, potential.reference_energies, strict=True)
    potential.reference_energies = [e + shift.values.get(z, 0.0) for z, e in pairs]
    return shift


def differences_of(potential: Potential, frames: list[Frame], items: list[Item]) -> list[Frame]:
    """Frames whose energies are what the labels have beyond the potential."""
    return [
        frame._replace(energy=frame.energy - float(predict(potential, item.graph, forces=False).energy[0]))
        for frame, item in zip(frames, items, strict=True)
        if frame.energy is not None
    ]


def shift_beside(frames: list[Frame], old: list[np.ndarray], added: list[int]) -> ReferenceEnergies:
    """E0 by least squares on the energies of frames; what their compositions leave open is decided by two wishes.

    Structures of before, with the atomic numbers `old`, are to keep their energies, and elements that were known their
    E0, so that new ones take up the rest: what is known counts less in the norm that is the smallest.
    """
    compositions = [frame.atoms.numbers for frame in frames] + old
    species = sorted({int(z) for numbers in compositions for z in numbers})
    counts = np.array([[np.mean(numbers == z) for z in species] for numbers in compositions])
    energies = np.array([frame.energy / len(frame.atoms) for frame in frames])
    columns = np.array([1.0 if z in added else FAINT for z in species])
    new, before = np.split(counts * columns, [len(frames)])
    best = np.linalg.lstsq(new, energies, rcond=ALIKE)[0]
    _, sizes, axes = np.linalg.svd(new)
    free = axes[np.count_nonzero(sizes > ALIKE * sizes[0]) :].T  # directions in which these energies stay
    if free.size and old:
        moved = before @ free
        moved[np.abs(moved) < ALIKE * np.abs(before).max()] = 0.0  # of compositions that the frames have, too
        best -= free @ np.linalg.lstsq(moved, before @ best, rcond=ALIKE)[0]
    shift = columns * best
    shift[np.abs(shift) < 1e-9] = 0.0  # rounding
    residual = float(np.sqrt(np.mean((counts[: len(frames)] @ shift - energies) ** 2)))
    rank = int(np.linalg.matrix_rank(counts, tol=1e-6))
    return ReferenceEnergies(dict(zip(species, shift.tolist(), strict=True)), "least squares", rank, residual)


def old_sets(
    config: TrainConfig,
    learned: int,
    frames: list[Item],
    structures: list[Item],
    began: Potential,
    *,
    energies: bool,
) -> tuple[Beside, ...]:
    """What is learned, so many, and measured of the old; began: the potential as it starts, which labels structures.

    energies: whether it knows their energies. With E0 of lone atoms in place of a fit it does not: the network's part
    was learned beside that fit.
    """
    settings, training = config.finetune, config.training
    began = began.to(resolve_device(training.device))
    own = labelled_set(began, structures, learned, settings, training.accelerate, energies=energies)
    found = [beside(OLD, frames, learned, f"{len(frames)} old frames"), own]
    return tuple(old for old in found if old.held)
