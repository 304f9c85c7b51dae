"""Bodies whose motion is to be learned: charged ones and stars, as in the published experiments.

Charged: Kipf et al., ICML 2018 (arXiv 1802.04687), as used by EGNN (arXiv 2102.09844) and SEGNN (arXiv 2110.02905,
section 5.1); gravity: SEGNN, section 5.1. All is a function of the numbers in `Bodies` and of a seed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from segnn_ase.base.errors import expect
from segnn_ase.dynamics.motion import Motion

State = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, velocities, charges or masses
Accelerations = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of positions (T, n, 3) and charges or masses (T, n)


class System(NamedTuple):
    """How trajectories of one kind begin, move and are looked at; masses are 1, units are such that k and G are 1."""

    bodies: int
    start: Callable[[np.random.Generator, int, int], State]  # (rng, trajectories, bodies)
    accelerations: Accelerations
    potential: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (T,), whose gradient the accelerations are
    whole_kicks: bool  # leapfrog whose velocities are half a step behind, as published; else kick, drift, kick
    before: int  # frames of EVERY steps until the input,
    after: int  # and from there to what is predicted


TIMESTEP, EVERY = 1e-3, 100
BOX = 5.0  # initial positions are reflected at its walls, at plus and minus this
SPEED = 0.5
MOST_FORCE = 100.0  # of a component, on a charge
SOFTENING = 0.1
AT_ONCE = {"charged": 500, "gravity": 8}  # trajectories side by side, as many as fit into the caches


def charged_start(rng: np.random.Generator, trajectories: int, n: int) -> State:
    positions = rng.normal(size=(trajectories, n, 3)) * (n / 5) ** (1 / 3)
    velocities = rng.normal(size=(trajectories, n, 3))
    velocities *= SPEED / np.linalg.norm(velocities, axis=2, keepdims=True)
    charges = rng.choice([-1.0, 1.0], size=(trajectories, n))
    outside = np.abs(positions) > BOX
    velocities = np.where(outside, -np.sign(positions) * np.abs(velocities), velocities)
    positions = np.where(outside, np.sign(positions) * 2 * BOX - positions, positions)
    return positions, velocities, charges


def stars_start(rng: np.random.Generator, trajectories: int, n: int) -> State:
    positions, velocities = rng.normal(size=(2, trajectories, n, 3))
    return positions, velocities - velocities.mean(axis=1, keepdims=True), np.ones((trajectories, n))


def coulomb(positions: np.ndarray, charges: np.ndarray) -> np.ndarray:
    """sum_j q_i q_j r_ij / r^3 with r_ij = r_i - r_j; each component of a body is cut at `MOST_FORCE`."""
    apart = positions[:, :, None] - positions[:, None]
    squared = np.einsum("tijx,tijx->tij", apart, apart)
    np.einsum("tii->ti", squared)[:] = 1.0
    factor = charges[:, :, None] * charges[:, None] * squared**-1.5
    return np.clip(np.einsum("tij,tijx->tix", factor, apart), -MOST_FORCE, MOST_FORCE)


def coulomb_energy(positions: np.ndarray, charges: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(positions.shape[1], 1)
    distances = np.linalg.norm(positions[:, i] - positions[:, j], axis=2)
    return (charges[:, i] * charges[:, j] / distances).sum(axis=1)


def newton(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """sum_j m_j (r_j - r_i) / (r^2 + softening^2)^(3/2)."""
    squares = np.einsum("tix,tix->ti", positions, positions)
    squared = squares[:, :, None] + squares[:, None] - 2.0 * positions @ positions.mT + SOFTENING**2
    weights = masses[:, None] / (squared * np.sqrt(squared))
    return weights @ positions - weights.sum(axis=2)[..., None] * positions


def newton_energy(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """-G m m / sqrt(r^2 + softening^2), of which `newton` is the gradient."""
    i, j = np.triu_indices(positions.shape[1], 1)
    squared = np.square(positions[:, i] - positions[:, j]).sum(axis=2) + SOFTENING**2
    return -(masses[:, i] * masses[:, j] / np.sqrt(squared)).sum(axis=1)


SYSTEMS = {  # frames: of charges the first is after the first EVERY steps, of stars at the beginning
    "charged": System(5, charged_start, coulomb, coulomb_energy, whole_kicks=True, before=31, after=10),
    "gravity": System(100, stars_start, newton, newton_energy, whole_kicks=False, before=30, after=10),
}


def simulate(name: str, trajectories: int, seed: int) -> Motion:
    """Trajectories of a system at its two times. Raises ConfigError for an unknown one, or none."""
    expect(name in SYSTEMS, "system", name, f"one of {', '.join(SYSTEMS)}")
    expect(isinstance(trajectories, int) and trajectories > 0, "trajectories", trajectories, "an integer above 0")
    system, rng = SYSTEMS[name], np.random.default_rng(seed)
    x, v, q = system.start(rng, trajectories, system.bodies)
    parts = np.array_split(np.arange(trajectories), -(-trajectories // AT_ONCE[name]))
    found = [_motion(system, x[part], v[part], q[part]) for part in parts]
    return Motion(*(np.concatenate(field) for field in zip(*found, strict=True)))


def _motion(system: System, x: np.ndarray, v: np.ndarray, q: np.ndarray) -> Motion:
    x, v = leapfrog(system, x, v, q, EVERY * system.before)
    return Motion(x, v, q, *leapfrog(system, x, v, q, EVERY * system.after))


def leapfrog(system: System, x: np.ndarray, v: np.ndarray, q: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities after so many steps of `TIMESTEP`; given ones stay as they are."""
    a = None
    for _ in range(steps):
        if system.whole_kicks:
            v = v + TIMESTEP * system.accelerations(x, q)
            x = x + TIMESTEP * v
        else:
            a = system.accelerations(x, q) if a is None else a
            v = v + 0.5 * TIMESTEP * a
            x = x + TIMESTEP * v
            a = system.accelerations(x, q)
            v = v + 0.5 * TIMESTEP * a
    return x, v
