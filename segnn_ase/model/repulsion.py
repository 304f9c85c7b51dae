"""`Potential`: elements, embedding, readout, reference energies; energy, forces and stress by autograd."""

import torch
from torch import Tensor

_COULOMB = 14.399645478425668  # e^2 / (4 pi eps_0) in eV Å, CODATA 2018
CORE_MARGIN = 0.95  # of the shortest distance seen: what lies just below it is still learned well
CORE_SWITCH = 0.25  # of the core radius: over this length the repulsion is switched on


def core_repulsion(vectors: Tensor, zi: Tensor, zj: Tensor, radii: Tensor) -> Tensor:
    """Repulsion of pairs closer than their core radius, (E,) eV, from r_ij (E, 3), atomic numbers, and radii (E,) Å.

    V = s Z_i Z_j e^2 / (4 pi eps_0 d) phi(d / a), a = 0.46850 Å / (Z_i^0.23 + Z_j^0.23), phi the universal
    screening function (Ziegler, Biersack, Littmark 1985). s goes from 0 at the core radius to 1 at
    `CORE_SWITCH` below it, with two continuous derivatives: y^3 (10 - 15 y + 6 y^2).
    """
    d = vectors.square().sum(1).clamp_min(1e-12).sqrt()
    x = d * (zi.to(d) ** 0.23 + zj.to(d) ** 0.23) / 0.46850
    terms = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
    phi = sum(c * torch.exp(-b * x) for c, b in terms)
    y = ((radii - d) / (CORE_SWITCH * radii)).clamp(0.0, 1.0)
    return _COULOMB * zi * zj / d * phi * y**3 * (10.0 - 15.0 * y + 6.0 * y**2)
