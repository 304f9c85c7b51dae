"""What a potential knew before it was fine-tuned, as structures: some are learned beside the new ones, to be kept.

Replay takes old frames with their labels. Pseudo-replay needs no old data: the starting potential labels structures
itself, given ones or those that its file has stored, and how far it has moved on them is measured instead of an error.
"""

from collections.abc import Callable

import numpy as np
from ase import Atoms
from torch import Tensor

from segnn_ase.base.devices import resolve_device
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.batches import Item, make_item
from segnn_ase.data.dispersed import without_dispersion
from segnn_ase.data.frames import (
    Frame,
    as_paths,
    check_geometries,
    check_labels,
    check_species,
    read_frames,
    refuse_wires,
    structure_alone,
    with_isolated_atoms,
)
from segnn_ase.data.images import read_images
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.pulled import without_pull
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Prediction
from segnn_ase.structure.cue_settings import names_read
from segnn_ase.structure.stored import evenly
from segnn_ase.structure.told import told_in, with_told
from segnn_ase.train.beside import Beside, beside
from segnn_ase.train.evaluation import errors_of, evaluator_of, residuals
from segnn_ase.train.settings import OptimConfig
from segnn_ase.train.tuning_settings import FinetuneConfig

RATTLE = 0.03  # Å, rms of a component: less than at room temperature, as stiff bonds are displaced, too
TIMES, LEAST = 2, 16  # old structures in an epoch: so many for each new frame, and at least
LOOKED_AT = 64  # of many, at least so many are learned or measured
CONTRADICTED = 3.0  # errors of forces, times what is expected, where the new labels are of another kind
OLD, DRIFT = "old", "drift"  # names of sets: frames with labels of their own, and with those of the starting potential


def wanted(settings: FinetuneConfig, new: int) -> int:
    """How many old structures are learned beside so many new frames, where there are enough."""
    return settings.replay_frames or max(TIMES * new, LEAST)


def read_old_frames(settings: FinetuneConfig, keys: LabelKeys, start: Potential, most: int) -> list[Frame]:
    """At most so many of the frames to replay, without the dispersion that the potential never saw."""
    if not settings.replay:
        return []
    frames = with_isolated_atoms(read_frames(list(settings.replay), keys), start.cutoff)
    check_labels(frames)
    check_species(frames, start.species, "replay")
    if start.charges is not None:
        refuse_wires(frames, start.config.cues, start.config.electrostatics)
    return without_pull(without_dispersion(evenly(frames, most), start.dispersion), start.config.cues)


def read_old_structures(settings: FinetuneConfig, start: Potential, most: int) -> list[Item]:
    """Structures without labels: those given, else those that the potential has stored, unless frames are given."""
    if settings.structures:
        images = [image for path in as_paths(list(settings.structures)) for image in read_images(path)]
        names = names_read(start.config.cues)
        given = [(with_told(structure_alone(a, source), told_in(a, names)), source) for source, a in images]
        frames = [_bare(*one) for one in given]
    elif start.examples is not None and not settings.replay:
        frames = [_bare(atoms, f"stored structure {n}") for n, atoms in enumerate(start.examples.atoms())]
    else:
        return []
    frames = evenly(frames, most)
    check_geometries(frames)
    check_species(frames, start.species, "structures")
    if start.charges is not None:
        refuse_wires(frames, start.config.cues, start.config.electrostatics)
    items = [make_item(frame, start.cutoff, start.config.cues) for frame in frames]
    return [item for item in items if len(item.graph.edge_src)]


def _bare(atoms: Atoms, source: str) -> Frame:
    return Frame(atoms, None, None, None, source, (None, None, None))


def labelled_by(potential: Potential, items: list[Item], accelerate: str, *, energies: bool = True) -> list[Item]:
    """The structures with what the potential itself says of them, or of their forces and stresses alone."""
    if not items:
        return []
    evaluate = evaluator_of(potential, items, accelerate)
    labelled = []
    for item in items:
        p = evaluate(item.graph, forces=True, stress=bool(item.atoms.pbc.all()))
        stress = item.labels.stress if p.stress is None else p.stress.detach().double()
        energy = p.energy.detach().double() if energies else item.labels.energy
        said = {"energy": energy, "forces": p.forces.detach().double(), "stress": stress}
        labels = item.labels._replace(**said, cue_gradients=gradients_of(p, item), **moments_of(p))
        labelled.append(item._replace(labels=labels))
    return labelled


def gradients_of(p: Prediction, item: Item) -> Tensor:
    """dE/dcues, where there are cues."""
    return item.labels.cue_gradients if p.cue_gradients is None else p.cue_gradients.detach().double()


def moments_of(p: Prediction) -> dict[str, Tensor]:
    """Dipoles and polarizabilities, of who knows them."""
    found = {name: getattr(p, name) for name in ("dipole", "polarizability")}
    return {name: x.detach().double() for name, x in found.items() if x is not None}


def labelled_set(
    began: Potential,
    structures: list[Item],
    learned: int,
    settings: FinetuneConfig,
    accelerate: str,
    *,
    energies: bool,
) -> Beside:
    """The same of structures that the potential labels itself as it begins; those to learn come with copies."""
    of_files = "structures that were given" if settings.structures else "structures of its own training"
    old = beside(DRIFT, structures, learned, f"{len(structures)} {of_files}")
    copies = (c for n, item in enumerate(old.replayed) for c in _copies_of(item, n, settings, began))
    pool = [*old.replayed, *copies]
    labelled = labelled_by(began, [*pool, *old.held], accelerate, energies=energies)
    replayed, held = labelled[: len(pool)], labelled[len(pool) :]
    return old._replace(replayed=replayed, each_epoch=min(learned, len(pool)), held=held, copies=settings.rattled)


def _copies_of(item: Item, n: int, settings: FinetuneConfig, began: Potential) -> list[Item]:
    """Copies of the n-th structure with displaced atoms."""
    copies = []
    for k in range(settings.rattled):
        atoms = item.atoms.copy()
        atoms.rattle(RATTLE, rng=np.random.default_rng([n, k]))
        copies.append(make_item(_bare(atoms, f"copy of structure {n}"), began.cutoff, began.config.cues))
    return copies


def contradiction(start: Potential, items: list[Item], settings: OptimConfig) -> float | None:
    """How many times as large as the potential expects its errors of forces are on a typical new frame in its domain.

    The median over frames: a few bad ones are what it is to learn. None where none is within, or nothing is expected.
    """
    if start.domain is None or start.uncertainty is None:
        return None
    items = evenly(items, LOOKED_AT)
    calculator = SEGNNCalculator(start, domain="ignore", device=str(resolve_device(settings.device)))
    found = calculator.evaluate([item.atoms for item in items])
    inside = [item for item, results in zip(items, found, strict=True) if not results.get("outside_domain")]
    if not inside:
        return None
    evaluate = evaluator_of(start, inside, settings.accelerate)
    each = [errors_of(residuals(evaluate, [item], settings, start.uncertainty)) for item in inside]
    found = [(errors["forces_rmse"], errors.get("forces_std")) for errors in each]
    sizes = [rmse / expected for rmse, expected in found if rmse is not None and expected]
    return float(np.median(sizes)) if sizes else None


def energies_off(start: Potential, items: list[Item], settings: OptimConfig) -> float | None:
    """How many times as large as the potential expects its error of the energy is on a typical structure.

    The median over structures. None where none has an energy, or nothing is expected.
    """
    known = [item for item in items if len(item.atoms) > 1 and bool(item.labels.energy.isfinite())]
    if not known or start.uncertainty is None:
        return None
    known = evenly(known, LOOKED_AT)
    evaluate = evaluator_of(start, known, settings.accelerate)
    each = [residuals(evaluate, [item], settings, start.uncertainty) for item in known]
    off = [
        abs(one["energy_predicted"] - one["energy_reference"]) / one["energy_std"]
        for one in each
        if "energy_std" in one
    ]
    return float(np.median(np.concatenate(off))) if off else None


def told_of_drift(old: Beside, errors: dict[str, dict]) -> str:
    """What the row of the changes means, for below the table; nothing of other rows."""
    if old.name != DRIFT:
        return ""
    moved = 1e3 * errors[DRIFT]["forces_rmse"]
    return f"{DRIFT}: forces on {len(old.held)} of {old.origin} changed by {moved:.1f} meV/Å, rmse"


def errors_before(
    errors: dict[str, dict], sets: dict[str, list[Item]], measure: Callable[[list[Item]], dict]
) -> dict[str, dict]:
    """Errors with those of the starting potential beside them; measure: its errors on a set."""
    found = {}
    for name, values in errors.items():
        before = {} if name == DRIFT else measure(sets[name])
        found[name] = {**values, **{f"{q}_rmse_before": before.get(f"{q}_rmse") for q in ("energy", "forces")}}
    return found
