"""A potential that learns further elements: rows are added to whatever has one for each element."""

from typing import Literal

import torch
from ase.data import chemical_symbols
from torch import Tensor

from segnn_ase.base.errors import expect
from segnn_ase.model.potential import Potential

NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
Beginning = Literal["nearest", "fresh"]  # of the rows of a new element


def with_more_elements(
    potential: Potential, added: list[int], *, begin: Beginning = "fresh", scale: float = 1.0, seed: int = 0
) -> Potential:
    """The potential with more species (atomic numbers) behind its own, whose energies and forces stay as they are.

    A new element begins with random weights (of the seed) and this scale, eV, or with the weights and the scale of the
    chemically nearest known one. Silicon that learned molybdenum did better with random ones: alike weights tell two
    elements apart only once training has moved them, and it moves those of the known one, too. Its E0 is 0, its core
    radii are those of an untrained potential. Domain and uncertainty, which tell of the training, are left out.
    """
    expect(begin in ("nearest", "fresh"), "begin", begin, "'nearest' or 'fresh'")
    known, old = potential.species, potential.state_dict()
    nearest = [known.index(nearest_element(z, known)) for z in added]
    scales = [potential.scales[k] if begin == "nearest" else scale for k in nearest]
    grown = Potential(
        potential.config,
        [*known, *added],
        reference_energies=[*potential.reference_energies, *([0.0] * len(added))],
        scales=[*potential.scales, *scales],
        seed=seed,
    )
    grown.to(dtype=potential.dtype, device=potential.device)
    grown.dispersion = potential.dispersion
    state = grown.state_dict()
    of_nearest = nearest if begin == "nearest" else None
    embedding = {
        f"segnn.embedding.weights.{k}": len(w) // len(known) for k, w in enumerate(potential.segnn.embedding.weights)
    }
    grown.load_state_dict(
        {name: _grown(old[name], fresh, of_nearest, name, embedding.get(name, 1)) for name, fresh in state.items()}
    )
    return grown.eval()


def _grown(old: Tensor, fresh: Tensor, nearest: list[int] | None, name: str, paths: int = 1) -> Tensor:
    """The old values within a larger tensor; an axis that has grown is one of elements.

    What is new begins like the nearest elements along the first axis, else as in the fresh tensor.
    """
    if old.shape == fresh.shape:
        return old
    if paths > 1:  # with rows of all species for each
        parts = [x.unflatten(0, (paths, -1)) for x in (old, fresh)]
        return torch.cat([_grown(a, b, nearest, "") for a, b in zip(*parts, strict=True)])
    if nearest is not None and name != "core_radii":
        return torch.cat([old, old[nearest]])
    return fresh.index_put(torch.meshgrid(*map(torch.arange, old.shape), indexing="ij"), old)


def nearest_element(z: int, known: list[int]) -> int:
    """The known element that is closest in the periodic table, by steps between groups and between periods."""
    return min(known, key=lambda other: (_steps(z, other), abs(z - other)))


def _steps(a: int, b: int) -> int:
    (period, group), (other_period, other_group) = period_and_group(a), period_and_group(b)
    return abs(period - other_period) + abs(group - other_group)


def period_and_group(z: int) -> tuple[int, int]:
    """Period from 1 and group from 1 to 18 of an atomic number; lanthanides and actinides are in group 3."""
    period = sum(z > noble for noble in NOBLE_GASES)
    after, before = z - NOBLE_GASES[period - 1], NOBLE_GASES[period] - z
    if (period > 1 and before < 6) or z == 2:
        return period, 18 - before
    if after <= 2:
        return period, after
    return period, max(3, 18 - before)


def named(species: list[int]) -> str:
    """Symbols in a list for messages."""
    return ", ".join(chemical_symbols[z] for z in species)
