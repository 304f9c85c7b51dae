"""The Coulomb energy of Gaussian charges, in molecules by pairs, in crystals and slabs by waves, and its derivatives.

E = sum_i<j k q_i q_j v(r_ij), v(r) = erf(r / (s sqrt(2))) / r; the same in reciprocal space, less what each charge has
with itself, and, for a net charge, with the background in which points have no mean potential (Ewald, Ann. Phys.
369, 253 (1921); Frenkel and Smit, Understanding Molecular Simulation, chapter 12). A slab is a crystal with so much
vacuum that no wave crosses it, and without the field of its copies' dipoles (Yeh and Berkowitz, J. Chem. Phys. 111,
3155 (1999)).
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
SHORTEST = 1e-12  # 1/Å^2, of k^2; what is shorter is the mean
FADED = 1e-10  # of a wave that crosses the vacuum between slabs
STEP = 5.0  # Å, by which that grows with the slab
NEUTRAL = 1e-6  # e, that a slab may have in all
MOST = 5e7  # numbers that are held at once: a few GB


class Derivatives(NamedTuple):
    """Of the energy of charges."""

    potential: Tensor  # (N,) dE/dq, eV/e
    forces: Tensor  # (N, 3) -dE/dr, eV/Å
    virial: Tensor  # (3, 3) dE/dstrain, eV


class Waves(NamedTuple):
    """Plane waves exp(i k r), k = a b_1 + b b_2 + c b_3, for whole numbers from -A to A, -B to B and 0 to C: one of two
    that are opposite, but both where c = 0. A sum over charges or waves is a product of matrices."""

    numbers: tuple[Tensor, Tensor, Tensor]  # a, b and c
    reciprocal: Tensor  # (3, 3) 1/Å
    weight: Tensor  # of |S|^2, S = sum_i q_i exp(i k r_i), in the sum of all waves, (2A+1, 2B+1, C+1) 1/Å
    planes: Tensor  # phases of each charge by a and b, (N, (2A+1) * (2B+1))
    along: Tensor  # and by c, (N, C+1)

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers, each along a dimension of its own."""
        a, b, c = self.numbers
        return a[:, None, None], b[:, None], c

    @property
    def vectors(self) -> Tensor:
        """k, (2A+1, 2B+1, C+1, 3)."""
        a, b, c = (n[..., None] * row for n, row in zip(self.indices, self.reciprocal, strict=True))
        return a + b + c

    def sums(self, charges: Tensor) -> Tensor:
        """S, (2A+1, 2B+1, C+1)."""
        return (self.planes.mT @ (charges[:, None] * self.along)).view(self.weight.shape)

    def at_charges(self, *amplitudes: Tensor) -> Tensor:
        """sum of amplitudes * exp(i k r) at each charge, for each of some amplitudes, (N, some)."""
        found = self.planes @ torch.stack(amplitudes, dim=2).flatten(2).flatten(0, 1)
        return (found.unflatten(1, (len(amplitudes), -1)) * self.along[:, None]).sum(dim=2)


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
    found = waves.sums(charges)
    amplitudes = waves.weight * found.conj()
    around, *slopes = waves.at_charges(amplitudes, *(n * amplitudes for n in waves.indices)).unbind(1)
    potential = around.real - _constant(charges, size, smearing)
    push = torch.stack(slopes, dim=1).imag @ waves.reciprocal
    energy, k = 0.5 * (amplitudes * found).real.flatten(), waves.vectors.flatten(0, 2)
    bent = 2.0 * energy * (0.5 * squared + 1.0 / k.square().sum(1).clamp_min(SHORTEST))
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
    push = (pairs[:, :, None] * apart).sum(dim=1)
    return Derivatives(COULOMB * (v @ charges), -COULOMB * push, COULOMB * positions.mT @ push)


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
    if len(positions) > (most := math.isqrt(int(MOST / 3))):
        raise StructureError(f"there are {len(positions)} charges in a molecule; expected at most {most}, or a crystal")
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
    waves = waves_of(positions, cell, smearing)
    around = waves.at_charges(waves.weight * waves.sums(charges).conj())[:, 0].real
    return around - _constant(charges, torch.linalg.det(cell).abs(), smearing)


def _constant(charges: Tensor, size: Tensor, smearing: float) -> Tensor:
    """Of a charge with itself, and with a background that has no mean potential with points, not Gaussians."""
    itself = math.sqrt(2.0 / math.pi) / smearing * charges
    return itself + 2.0 * math.pi * smearing**2 / size * charges.sum()


def _in_slab(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float) -> Tensor:
    """The same of all images in two directions. Raises StructureError for a net charge."""
    if (net := float(charges.detach().sum().abs())) > NEUTRAL:
        raise StructureError(
            f"the slab has a net charge of {net:g} e, whose energy is infinite: expected a neutral one, or a crystal "
            "with vacuum, where a net charge has a uniform background"
        )
    normal = torch.linalg.cross(cell[0], cell[1])
    area = normal.norm()
    heights = positions @ (normal / area)
    heights = heights - heights.detach().mean()
    thick = float(heights.detach().max() - heights.detach().min())
    height = STEP * math.ceil((thick + _vacuum(cell.detach(), smearing)) / STEP)
    around = _in_waves(charges, positions, torch.cat([cell, height * (normal / area)[None]]), smearing)
    # without the field of the copies' dipoles, and of the mean potential that there is none between slabs
    squares = heights.square()
    field = 2.0 * (charges @ heights) * heights - charges @ squares - charges.sum() * squares
    return around + 2.0 * math.pi / (area * height) * field


def _vacuum(cell: Tensor, smearing: float) -> float:
    """What waves along two vectors need to fade from one slab to the next, and Gaussians not to overlap, Å."""
    short = torch.as_tensor(compact(torch.nn.functional.pad(cell, (0, 0, 0, 1)).cpu().numpy(), (True, True, False))[1])
    longest = float((short.to(cell)[:2, :2] @ cell).norm(dim=1).max())
    return -math.log(FADED) * longest / (2.0 * math.pi) + 8.0 * smearing


def waves_of(positions: Tensor, cell: Tensor, smearing: float) -> Waves:
    """All that count. Raises StructureError where these are too many."""
    given, longest = compact(cell.detach().cpu().numpy(), True)[1], math.sqrt(-2.0 * math.log(TOLERANCE)) / smearing
    given = given[np.argsort(np.linalg.norm(given @ cell.detach().cpu().numpy(), axis=1))]  # the longest last
    short = torch.as_tensor(given).to(cell) @ cell
    most = _most(short.detach(), longest)
    box = [2 * m + 1 for m in most]
    if (expected := max(len(positions) * max(box[0] * box[1], 2 * box[2]), 1.5 * math.prod(box))) > MOST:
        room = float(torch.linalg.det(cell.detach()).abs())
        raise StructureError(
            f"{len(positions)} charges of width {smearing:g} Å in {room:.0f} Å^3 need {expected:.1e} numbers; expected "
            f"at most {MOST:.0e}: fewer atoms, a smaller cell, none far off a slab, or a potential of larger `smearing`"
        )
    numbers = tuple(torch.arange(0 if k == 2 else -m, m + 1).to(short) for k, m in enumerate(most))
    inverse = torch.linalg.inv(short)
    turns = 2.0 * math.pi * positions @ inverse
    angles = [turn[:, None] * n for turn, n in zip(turns.unbind(1), numbers, strict=True)]
    x, y, along = (torch.polar(torch.ones_like(angle), angle) for angle in angles)
    planes = (x[:, :, None] * y[:, None]).flatten(1)
    waves = Waves(numbers, 2.0 * math.pi * inverse.T, short, planes, along)
    squares = waves.vectors.square().sum(3)
    weight = (
        4.0
        * math.pi
        / torch.linalg.det(cell).abs()
        * torch.exp(-0.5 * smearing**2 * squares)
        / squares.clamp_min(SHORTEST)
    )
    counted = (squares.detach() <= longest**2) & (squares.detach() > SHORTEST)
    twice = 1.0 + (numbers[2] > 0).to(weight)
    return waves._replace(weight=torch.where(counted, weight, 0.0) * twice)


def _most(cell: Tensor, longest: float) -> list[int]:
    """Largest whole numbers of waves that are not longer, along each vector."""
    return (longest * cell.norm(dim=1) / (2.0 * math.pi)).floor().long().tolist()
