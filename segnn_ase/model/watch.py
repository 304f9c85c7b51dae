"""What is looked at in every structure besides its energy, and what comes of it: see `trust.monitor`."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from segnn_ase.model.newness import KnownSurroundings, Newness


class Watched(NamedTuple):
    """What structures of certain atoms must keep to, and what tells how far predictions may be off."""

    neighbors: np.ndarray  # (2, N) float64, fewest and most
    energy: tuple[float, float]  # eV
    volume: float  # Å^3, the smallest
    virial: tuple[float, float]  # eV/atom
    force: float  # eV/Å
    leverage: float
    surroundings: KnownSurroundings | None
    crowding: float  # the least, where surroundings are known
    forms: Tensor | None  # (2, n, n), `Uncertainty.atoms` and `.frames`
    powers: tuple[float, float, float]  # alpha, beta, gamma of the uncertainty


class Judgement(NamedTuple):
    """What was found; leverages and deviations where there are forms."""

    inside: bool  # for certain, and in all respects; else it is to be said in which not
    new: Newness | None = None  # of what may be outside, until the next structure
    leverage: np.ndarray | None = None  # (N,)
    energy_std: float | None = None  # eV
    forces_std: np.ndarray | None = None  # (N, 3) eV/Å
