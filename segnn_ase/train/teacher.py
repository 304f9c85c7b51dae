"""Structures that a teacher labels: a potential that is trained already, or the mean of a committee.

The mean of a committee is nearer to the truth than its members, and a large potential than a small one. A potential
that learns what they say near the frames, beside the frames, has most of that at its own cost (Hinton et al.,
arXiv:1503.02531). Where the frames are is told by short dynamics from each, at its own temperature.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.data import chemical_symbols
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import AccelerationWarning, ConfigError, SEGNNError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.batches import Item, Labels, make_item
from segnn_ase.data.frames import Frame
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_committee
from segnn_ase.store.tensors import checksum
from segnn_ase.structure.stored import evenly
from segnn_ase.structure.told import standing
from segnn_ase.train.beside import beside
from segnn_ase.train.evaluation import Evaluate, evaluator_of
from segnn_ase.train.job import TrainingData
from segnn_ase.train.rollouts import CONTACT, FRICTION, dynamics_of, nearest_of, usual_timestep
from segnn_ase.train.settings import OptimConfig, TrainConfig

TAUGHT = "taught"  # name of the set
TIMES, MOST, MOST_ATOMS = 10, 500, 20_000  # structures for each frame, and in all
STEPS = 40  # of dynamics between structures
PROBES, DISPLACED = 4, 0.01  # directions in which the curvature of the energy is measured, and how far, Å
COLDEST, HOTTEST = 100.0, 5000.0  # K
DISAGREED = 3.0  # times the usual spread of a committee is too much to be learned
FAR_OFF = 0.3  # of the energy scale, eV an atom, by which a teacher's energies are of other labels


class Visited(NamedTuple):
    """A frame, and structures of dynamics from there."""

    start: Item
    temperature: float  # K
    frames: list[Frame]


def with_teacher(data: TrainingData, config: TrainConfig, cutoff: float, report) -> TrainingData:
    """The data with structures that the teacher of the settings labels, if there is one; the same in every run."""
    settings = config.data
    if settings.teacher is None:
        if settings.taught is not None and not config.training.teachers:
            raise ConfigError(
                f"setting 'data.taught' is {settings.taught}, but there is no data.teacher, and training.teachers is "
                f"{config.training.teachers}; give one of them, too"
            )
        return data
    teachers = teachers_of(config, data.frames)
    starts = starts_of(data)
    most = settings.taught or usual_number(starts)
    report(f"teacher: {most} structures are made by short dynamics from the frames")
    near = dynamics_near(starts, teachers, most, data.closest, config.training)
    cues = teachers[0].config.cues
    items = [make_item(frame, cutoff, cues) for frame in agreed(near, teachers, data.scale, config)]
    low, high = np.percentile([one.temperature for one in near], [10, 90]) if near else (0.0, 0.0)
    origin = f"{len(items)} structures from short dynamics at {low:.0f} to {high:.0f} K, labelled by "
    origin += f"the mean of {len(teachers)} potentials" if len(teachers) > 1 else "one potential"
    left_out = sum(len(one.frames) for one in near) - len(items)
    origin += f" ({left_out} left out, on which they disagree)" if left_out else ""
    found = beside(TAUGHT, items, len(items), origin)._replace(chooses=False)
    if not found.replayed:
        raise ConfigError(
            f"setting 'data.teacher' is {settings.teacher!r}: {len(items)} structures of its dynamics can be "
            "learned, expected two or more; raise data.taught, or take a teacher that was trained on such frames"
        )
    known = checksum([data.checksum, most, *(dict(potential.state_dict()) for potential in teachers)])
    report(f"teacher: {found.told()}")
    return data._replace(beside=(found,), checksum=known)


def starts_of(data: TrainingData) -> list[Item]:
    """The frames of which there are dynamics."""
    return [item for item in data.train if len(item.atoms) > 1 and len(item.graph.edge_src)]


def usual_number(starts: list[Item]) -> int:
    """Of structures that are taught: more add little, and those of large frames take long."""
    atoms = sum(len(item.atoms) for item in starts) / max(len(starts), 1)
    return max(min(TIMES * len(starts), MOST, int(MOST_ATOMS / max(atoms, 1))), 2)


def teachers_of(config: TrainConfig, frames: list[Frame]) -> list[Potential]:
    """The potentials of the teacher's file. Raises ConfigError for those that cannot teach this training."""
    settings = config.data
    told = f"setting 'data.teacher' is {settings.teacher!r}"
    teachers = load_committee(settings.teacher).potentials
    first, needed = teachers[0], {int(z) for frame in frames for z in frame.atoms.numbers}
    cues = model_config(**config.model).cues
    if first.config.cues != cues:
        names = [[cue.name for cue in some] or "nothing" for some in (first.config.cues, cues)]
        raise ConfigError(f"{told}, which is told {names[0]}, and this training {names[1]}; expected the same cues")
    if not all(potential.config.smooth for potential in teachers):
        raise ConfigError(f"{told}, whose energies jump at the cutoff; expected a potential that can be simulated")
    if unknown := needed - set(first.species):
        known, more = (", ".join(chemical_symbols[z] for z in sorted(some)) for some in (first.species, unknown))
        raise ConfigError(
            f"{told}, which knows {known}; the frames have {more}, too: expected a potential of all their elements"
        )
    if first.dispersion != settings.dispersion:
        raise ConfigError(
            f"{told}, of whose labels the dispersion {first.dispersion!r} was taken off, and 'data.dispersion' is "
            f"{settings.dispersion!r}; expected the same"
        )
    device = resolve_device(config.training.device)
    return [potential.to(device).eval().requires_grad_(False) for potential in teachers]


def dynamics_near(
    starts: list[Item],
    teachers: list[Potential],
    most: int,
    closest: dict[tuple[int, int], float],
    settings: OptimConfig,
) -> list[Visited]:
    """At most so many structures of dynamics that start from frames; the teachers take turns."""
    near, chosen = [], evenly(starts, most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)  # said when the training begins
        options = {"domain": "ignore", "accelerate": "off" if settings.accelerate == "off" else "auto"}
        calculators = [SEGNNCalculator(potential, device=str(potential.device), **options) for potential in teachers]
        for n, start in enumerate(chosen):
            rng, calculator = np.random.default_rng([settings.seed, n]), calculators[n % len(teachers)]
            temperature = configurational_temperature(start.atoms, calculator, rng)
            copies = most * (n + 1) // len(chosen) - most * n // len(chosen)
            found = visited(start.atoms, calculator, temperature, copies, closest, rng)
            source, nothing = "dynamics of the teacher", (None, None, None)
            near.append(Visited(start, temperature, [Frame(a, None, None, None, source, nothing) for a in found]))
    return near


def configurational_temperature(start: Atoms, calculator: SEGNNCalculator, rng: np.random.Generator) -> float:
    """Squared forces over the Laplacian of the energy, K, within bounds: the temperature of a structure in equilibrium.

    Butler et al., J. Chem. Phys. 109, 6519 (1998); the Laplacian is the mean curvature in random directions.
    """
    atoms = standing(start)
    atoms.calc = calculator
    squared, curvature = float(np.sum(atoms.get_forces() ** 2)), 0.0
    for _ in range(PROBES):
        direction = rng.choice([-1.0, 1.0], size=atoms.positions.shape)
        change = np.zeros_like(direction)
        for sign in (1.0, -1.0):
            atoms.positions = start.positions + sign * DISPLACED * direction
            change -= sign * atoms.get_forces()
        curvature += float(np.sum(direction * change)) / (2 * DISPLACED * PROBES)
    return float(np.clip(squared / (units.kB * curvature), COLDEST, HOTTEST)) if curvature > 0 else COLDEST


def visited(
    start: Atoms,
    calculator: SEGNNCalculator,
    temperature: float,
    copies: int,
    closest: dict[tuple[int, int], float],
    rng: np.random.Generator,
) -> Iterator[Atoms]:
    """So many structures of Langevin dynamics, fewer where it fails or atoms meet."""
    atoms = standing(start)
    atoms.calc = calculator
    dynamics = dynamics_of(atoms, usual_timestep(atoms), temperature, FRICTION, rng)
    for _ in range(copies):
        try:
            dynamics.run(STEPS)
        except (SEGNNError, np.linalg.LinAlgError):
            return
        if not np.isfinite(atoms.positions).all() or nearest_of(atoms, closest) < CONTACT:
            return
        yield standing(atoms)


def agreed(near: list[Visited], teachers: list[Potential], scale: float, config: TrainConfig) -> list[Frame]:
    """The structures with the mean of what the teachers say, without those on which they disagree more than usual.

    That is, than on the frame where the dynamics began and than in the median; one teacher never disagrees. scale:
    of the energy, eV. Raises ConfigError where the frames themselves have other labels.
    """
    groups = [[_unlabelled(one.start.atoms), *one.frames] for one in near]
    first = teachers[0]
    items = [make_item(frame, first.cutoff, first.config.cues) for group in groups for frame in group]
    if not items:
        return []
    evaluators = [evaluator_of(potential, items, config.training.accelerate) for potential in teachers]
    said = iter([labelled_by_mean(item, evaluators) for item in items])
    labelled = [[next(said) for _ in group] for group in groups]
    refuse_other_labels([(one.start, group[0][0]) for one, group in zip(near, labelled, strict=True)], scale, config)
    spreads = [spread for group in labelled for _, spread in group[1:]]
    usual = float(np.median(spreads)) if spreads else 0.0
    return [
        frame._replace(energy=float(labels.energy[0]), forces=labels.forces.numpy(), stress=_matrix(labels.stress))
        for group, found in zip(groups, labelled, strict=True)
        for frame, (labels, spread) in zip(group[1:], found[1:], strict=True)
        if len(teachers) == 1 or spread <= DISAGREED * max(usual, found[0][1])
    ]


def _unlabelled(atoms: Atoms) -> Frame:
    return Frame(standing(atoms), None, None, None, "training frame", (None, None, None))


def _matrix(stress: Tensor) -> np.ndarray | None:
    return stress[0].numpy() if bool(stress.isfinite().all()) else None


def labelled_by_mean(item: Item, evaluators: list[Evaluate]) -> tuple[Labels, float]:
    """What potentials say of a structure in the mean, and the root mean square of their forces' deviations from it."""
    said = [evaluate(item.graph, forces=True, stress=bool(item.atoms.pbc.all())) for evaluate in evaluators]
    energy, forces = (torch.stack([getattr(p, name).detach().double() for p in said]) for name in ("energy", "forces"))
    stress = item.labels.stress
    if said[0].stress is not None:
        stress = torch.stack([p.stress.detach().double() for p in said]).mean(dim=0)
    spread = float(forces.var(dim=0, unbiased=False).mean().sqrt())
    means = {"energy": energy.mean(dim=0), "forces": forces.mean(dim=0), "stress": stress}
    return item.labels._replace(**means), spread


def refuse_other_labels(pairs: list[tuple[Item, Labels]], scale: float, config: TrainConfig) -> None:
    """Raise ConfigError where what a teacher says of the frames themselves is no better than nothing."""
    energies = np.array([float(said.energy[0] - item.labels.energy[0]) / len(item.atoms) for item, said in pairs])
    off = float(np.sqrt(np.nanmean(energies**2))) if np.isfinite(energies).any() else 0.0
    found = np.concatenate([said.forces.numpy() for _, said in pairs])
    true = np.concatenate([item.labels.forces.numpy() for item, _ in pairs])
    known = np.isfinite(true)
    error, size = (float(np.sqrt(np.mean(x[known] ** 2))) if known.any() else 0.0 for x in (found - true, true))
    if off > FAR_OFF * scale or error > size > 0:
        raise ConfigError(
            f"setting 'data.teacher' is {config.data.teacher!r}, whose energies of the training frames are off by "
            f"{off:.3g} eV/atom, and forces by {error:.3g} eV/Å (rms of the labels: {size:.3g}); expected a model of "
            "the same level of theory and the same E0"
        )
