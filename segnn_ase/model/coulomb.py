"""The Coulomb energy of Gaussian charges, in molecules by pairs, in crystals and slabs by waves, and its derivatives.

E = sum_i<j k q_i q_j v(r_ij), v(r) = erf(r / (s sqrt(2))) / r; the same in reciprocal space, less what each charge has
with itself, and, for a net charge, with the background in which points have no mean potential (Ewald, Ann. Phys.
369, 253 (1921); Frenkel and Smit, Understanding Molecular Simulation, chapter 12). In slabs waves run in two
directions, and pairs know how far they are apart in the third, exactly and without vacuum (Parry, Surf. Sci. 49, 433
(1975)).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.structure.neighbors import compact

COULOMB = 14.399645478425668  # e^2 / (4 pi eps_0) in eV Å, CODATA 2018
TOLERANCE = 1e-12  # of the weight of waves that are left out
NEUTRAL = 1e-6  # e, that a slab may have in all
MOST = 5e7  # charges times waves, or components of distances: a few GB


class Derivatives(NamedTuple):
    """Of the energy of charges."""

    potential: Tensor  # (N,) dE/dq, eV/e
    forces: Tensor  # (N, 3) -dE/dr, eV/Å
    virial: Tensor  # (3, 3) dE/dstrain, eV


class Waves(NamedTuple):
    """One of every two plane waves that are opposite."""

    vectors: Tensor  # (K, 3) 1/Å
    weight: Tensor  # (K,) of |sum_i q_i exp(i k r_i)|^2 in the sum of both, 1/Å
    cosines: Tensor  # (N, K)
    sines: Tensor


def coulomb_energies(charges: Tensor, positions: Tensor, cell: Tensor | None, smearing: float) -> Tensor:
    """Energy of Gaussian charges (N,) e at positions (N, 3) Å, half of every pair for either, (N,) eV; cell: vectors
    (3, 3) Å of a crystal, whose net charge has a uniform background, or (2, 3) of a slab, which must have none."""
    if cell is None:
        around = _among(charges, positions, smearing)
    elif len(cell) == 2:
        around = _in_slab(charges, positions, cell, smearing)
    else:
        around = _in_waves(charges, positions, cell, smearing)
    return 0.5 * COULOMB * charges * around


def of_charges(charges: Tensor, positions: Tensor, cell: Tensor | None, smearing: float) -> Derivatives:
    """All derivatives of `coulomb_energies`, in closed form but for slabs."""
    if cell is None:
        return _of_molecule(charges, positions, smearing)
    if len(cell) == 2:
        return _by_autograd(charges, positions, cell, smearing)
    size, squared = torch.linalg.det(cell).abs(), smearing**2
    waves = waves_of(positions, cell, smearing)
    c, s = charges @ waves.cosines, charges @ waves.sines
    both = [waves.weight * x for x in (c, s)]
    potential = waves.cosines @ both[0] + waves.sines @ both[1] - _constant(charges, size, smearing)
    push = (waves.sines * both[0] - waves.cosines * both[1]) @ waves.vectors
    energy = 0.5 * waves.weight * (c.square() + s.square())
    k = waves.vectors
    bent = 2.0 * energy * (0.5 * squared + 1.0 / k.square().sum(1))
    even = math.pi * squared / size * charges.sum() ** 2 - energy.sum()
    virial = (bent[:, None] * k).mT @ k + even * torch.eye(3).to(k)
    return Derivatives(COULOMB * potential, COULOMB * charges[:, None] * push, COULOMB * virial)


def _of_molecule(charges: Tensor, positions: Tensor, smearing: float) -> Derivatives:
    apart = _between(positions)
    distance, alone = _distances(apart)
    v = _potential(distance, smearing).masked_fill(alone, 0.0)
    gauss = math.sqrt(2.0 / math.pi) / smearing * torch.exp(-0.5 * (distance / smearing) ** 2)
    slope = ((gauss - v) / distance.square()).masked_fill(alone, 0.0)  # v'(r) / r
    pairs = charges[:, None] * charges * slope
    push = torch.einsum("ij,ija->ia", pairs, apart)
    virial = 0.5 * torch.einsum("ij,ija,ijb->ab", pairs, apart, apart)
    return Derivatives(COULOMB * (v @ charges), -COULOMB * push, COULOMB * virial)


def _by_autograd(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float) -> Derivatives:
    with torch.enable_grad():
        q, x, strain = charges.detach().clone(), positions.detach().clone(), positions.new_zeros(3, 3)
        for leaf in (q, x, strain):
            leaf.requires_grad_()
        both = 0.5 * (strain + strain.mT)
        energy = coulomb_energies(q, x + x @ both, cell.detach() + cell.detach() @ both, smearing).sum()
        potential, slope, virial = torch.autograd.grad(energy, (q, x, strain))
    return Derivatives(potential, -slope, virial)


def _between(positions: Tensor) -> Tensor:
    """Vectors between all pairs, (N, N, 3). Raises StructureError where these are too many."""
    if (expected := 3 * len(positions) ** 2) > MOST:
        raise StructureError(
            f"{len(positions)} charges in a molecule need {expected:.1e} numbers; expected at most {MOST:.0e}"
        )
    return positions[:, None] - positions


def _distances(apart: Tensor) -> tuple[Tensor, Tensor]:
    """Of all pairs, and which ones are of an atom with itself, whose distance is set to 1."""
    alone = torch.eye(len(apart), dtype=torch.bool, device=apart.device)
    return apart.square().sum(2).masked_fill(alone, 1.0).sqrt(), alone


def _potential(distance: Tensor, smearing: float) -> Tensor:
    return torch.erf(distance / (math.sqrt(2.0) * smearing)) / distance


def _among(charges: Tensor, positions: Tensor, smearing: float) -> Tensor:
    """Potential of all others at each, e/Å."""
    distance, alone = _distances(_between(positions))
    return _potential(distance, smearing).masked_fill(alone, 0.0) @ charges


def _in_waves(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float) -> Tensor:
    """The same of all periodic images."""
    _, weight, c, s = waves_of(positions, cell, smearing)
    around = c @ (weight * (charges @ c)) + s @ (weight * (charges @ s))
    return around - _constant(charges, torch.linalg.det(cell).abs(), smearing)


def _constant(charges: Tensor, size: Tensor, smearing: float) -> Tensor:
    """Of a charge with itself, and with a background that has no mean potential with points, not Gaussians."""
    itself = math.sqrt(2.0 / math.pi) / smearing * charges
    return itself + 2.0 * math.pi * smearing**2 / size * charges.sum()


def _in_slab(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float) -> Tensor:
    """The same of all images in two directions. Raises StructureError for a net charge, and for too many numbers."""
    if (net := float(charges.detach().sum().abs())) > NEUTRAL:
        raise StructureError(
            f"the slab has a net charge of {net:g} e, whose energy is infinite: expected a neutral one, or a crystal "
            "with vacuum, where a net charge has a uniform background"
        )
    normal = torch.linalg.cross(cell[0], cell[1])
    area, longest = normal.norm(), _longest(smearing)
    apart = _between(positions)
    if (expected := len(positions) ** 2 * float(area.detach()) * longest**2 / (8 * math.pi)) > MOST:
        raise StructureError(
            f"{len(positions)} charges of width {smearing:g} Å in a slab of {float(area.detach()):.0f} Å^2 need "
            f"{expected:.1e} numbers; expected at most {MOST:.0e}: make it a crystal with vacuum, which takes less"
        )
    waves = _whole_numbers(cell.detach(), longest) @ (2.0 * math.pi * torch.linalg.pinv(cell)).T
    height, k = apart @ (normal / area), waves.norm(dim=1)
    a, b = smearing * k / math.sqrt(2.0), height[:, :, None] / (math.sqrt(2.0) * smearing)
    up = k * height[:, :, None]  # exp and erfc are 1e-260 and 1e260 before they are none
    falling = sum(torch.exp((s * up).clamp_max(600.0)) * torch.erfc(a + s * b) for s in (1.0, -1.0))
    pairs = (2.0 * math.pi / k * (apart @ waves.T).cos() * falling).sum(dim=2)
    level = height * torch.erf(b[:, :, 0]) + smearing * math.sqrt(2.0 / math.pi) * torch.exp(-b[:, :, 0].square())
    return (pairs - 2.0 * math.pi * level) / area @ charges - math.sqrt(2.0 / math.pi) / smearing * charges


def _longest(smearing: float) -> float:
    """Wave number from which on waves are left out, 1/Å."""
    return math.sqrt(-2.0 * math.log(TOLERANCE)) / smearing


def waves_of(positions: Tensor, cell: Tensor, smearing: float) -> Waves:
    """All that count. Raises StructureError where these are too many."""
    longest = _longest(smearing)
    given = cell.detach().cpu().numpy()
    room = abs(np.linalg.det(given))
    if (expected := len(positions) * room * longest**3 / (12 * math.pi**2)) > MOST:
        raise StructureError(
            f"{len(positions)} charges of width {smearing:g} Å in {room:.0f} Å^3 need {expected:.1e} numbers; expected "
            f"at most {MOST:.0e}: fewer atoms, less vacuum, or a potential with another `smearing`"
        )
    short = torch.as_tensor(compact(given, True)[1]).to(cell) @ cell
    vectors = _whole_numbers(short.detach(), longest) @ (2.0 * math.pi * torch.linalg.inv(short)).T
    squares = vectors.square().sum(1)
    weight = 8.0 * math.pi / torch.linalg.det(cell).abs() * torch.exp(-0.5 * smearing**2 * squares) / squares
    phase = positions @ vectors.T
    return Waves(vectors, weight, phase.cos(), phase.sin())


def _whole_numbers(cell: Tensor, longest: float) -> Tensor:
    """Of the waves along two or three vectors that are not longer, one of every two that are opposite."""
    most = (longest * cell.norm(dim=1) / (2.0 * math.pi)).floor().long().tolist()
    numbers = torch.cartesian_prod(*(torch.arange(-m, m + 1, device=cell.device) for m in most)).to(cell)
    numbers = numbers[len(numbers) // 2 + 1 :]  # behind that of zeros come the opposites of those before
    waves = numbers @ (2.0 * math.pi * torch.linalg.pinv(cell)).T
    return numbers[waves.square().sum(1) <= longest**2]
