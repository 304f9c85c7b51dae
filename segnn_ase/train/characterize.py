"""What a potential is to say about itself: which structures it was trained on, and how far it may be off."""

from ase import Atoms

from segnn_ase.data.batches import Item
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Prediction
from segnn_ase.structure.stored import stored
from segnn_ase.train.evaluation import Evaluate, evaluator_of
from segnn_ase.trust import domain, uncertainty


def characterize(
    potential: Potential,
    train: list[Item],
    valid: list[Item],
    closest: dict[tuple[int, int], float],
    *,
    lone_atoms: bool,
    before: Potential | None = None,
    evaluate: Evaluate | None = None,
) -> None:
    """Store in the potential what its training structures covered, some of them, and how far it may be off.

    closest: see `smallest_distances`; lone_atoms: whether E0 are energies of lone atoms; before: the potential that
    was fine-tuned; evaluate: a faster way to evaluate this one.
    """
    evaluate = evaluate or evaluator_of(potential, train)
    predictions, errors = see(evaluate, train)
    known = None if before is None else before.uncertainty
    potential.uncertainty = uncertainty.measure_uncertainty(errors, see(evaluate, valid)[1], known)
    covered = [
        domain.Covered(item.graph, p, _volume(item.atoms), potential.uncertainty.leverage(p.features.double()))
        for item, p in zip(train, predictions, strict=True)
    ]
    known = before and before.domain
    potential.domain = domain.measure_domain(potential, covered, closest, lone_atoms=lone_atoms, before=known)
    if not potential.config.cues:  # of which nothing is stored
        potential.examples = stored([item.atoms for item in train], before and before.examples)


def see(evaluate: Evaluate, items: list[Item]) -> tuple[list[Prediction], list[uncertainty.Residuals]]:
    """What a potential makes of each structure, and its errors."""
    predictions = [evaluate(item.graph, stress=bool(item.atoms.pbc.all())) for item in items]
    residuals = [
        uncertainty.Residuals(
            p.features, float(p.energy[0] - item.labels.energy[0]), (p.forces - item.labels.forces).numpy()
        )
        for item, p in zip(items, predictions, strict=True)
    ]
    return predictions, residuals


def _volume(atoms: Atoms) -> float | None:
    return float(atoms.cell.volume) if atoms.pbc.all() else None
