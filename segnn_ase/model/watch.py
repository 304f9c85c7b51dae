"""What is looked at in every structure besides its energy, and what comes of it: see `trust.monitor`."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from segnn_ase.model.newness import KnownSurroundings, Newness


class Limits(NamedTuple):
    """What a structure of certain atoms must keep to."""

    neighbors: np.ndarray  # (2, N) float64, fewest and most
    energy: tuple[float, float]  # eV
    volume: float  # Å^3, the smallest
    virial: tuple[float, float]  # eV/atom
    force: float  # eV/Å
    leverage: float


class Watched(NamedTuple):
    """What is asked of structures of certain atoms."""

    limits: Limits
    forms: Tensor | None  # (2, n, n), `Uncertainty.atoms` and `.frames`
    powers: tuple[float, float, float]  # alpha, beta, gamma of the uncertainty
    surroundings: KnownSurroundings | None


class Judged(NamedTuple):
    """What was found; leverages and deviations where there are forms."""

    inside: bool  # of the limits
    new: Newness | None = None  # where surroundings are known, until the next structure
    leverage: np.ndarray | None = None  # (N,)
    energy_std: float | None = None  # eV
    forces_std: np.ndarray | None = None  # (N, 3) eV/Å
