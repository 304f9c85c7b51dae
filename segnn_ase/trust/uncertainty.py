"""How far a prediction may be off: one estimate from a potential's last features, calibrated on validation frames.

The features phi_i of the last interaction, which the readout turns into the energy of atom i, are compared with those
of the training frames. A direction that hardly occurred there was hardly learned (last-layer prediction rigidity,
Bigi, Chong, Ceriotti, Grasselli, Mach. Learn.: Sci. Technol. 5, 045018 (2024)):

- leverage of an atom h_i^2 = phi_i^T (<phi phi^T> + r)^-1 phi_i / n, the mean over all training atoms; it is 1 for
  a usual atom. The standard deviation of each force component is beta h_i^gamma.
- of a structure, sigma_E^2 = alpha^2 s^T (sum_A s_A s_A^T + r)^-1 s, s = sum_i phi_i, the sum over training frames.

alpha, beta and gamma maximise the likelihood of the errors on frames that were not trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RIDGE = 1e-6  # r, of the mean diagonal
POWERS = np.linspace(0.0, 2.0, 41)  # for gamma
ENOUGH = 300  # atoms held out, for a power law of their own
FLOOR = 1e-6  # eV and eV/Å: an error of exactly zero is an accident


class Residuals(NamedTuple):
    """What a potential made of one labelled frame; NaN for labels that are not there."""

    features: Tensor  # (N, n)
    energy: float  # eV, predicted minus label
    forces: np.ndarray  # (N, 3) eV/Å


class Uncertainty(NamedTuple):
    """The two forms, factorised: h_i = |phi_i @ atoms|, sigma_E = alpha |s @ frames|."""

    atoms: Tensor  # (n, n) float64
    frames: Tensor  # (n, n) float64
    alpha: float  # eV; NaN where there were no energies
    beta: float  # eV/Å; NaN where there were no forces
    gamma: float
    calibrated_on: str  # "validation", or "training" where there was no other
    counts: tuple[int, int]  # atoms and frames behind the two forms

    def to(self, like: Tensor) -> "Uncertainty":
        """With the dtype and on the device of a tensor."""
        return self._replace(atoms=self.atoms.to(like), frames=self.frames.to(like))

    def leverage(self, features: Tensor) -> Tensor:
        """h of each atom (N,), from its features (N, n); 1 is usual among the training frames."""
        return torch.linalg.vector_norm(features @ self.atoms, dim=1)

    def of_structure(self, features: Tensor) -> tuple[np.ndarray, float]:
        """Leverages (N,) and the standard deviation of the energy, eV, of one structure."""
        leverage, energy_std = self.leverage(features), self.energy_std(features.sum(0, keepdim=True))
        return leverage.double().cpu().numpy(), float(energy_std)

    def of_training(self) -> Tensor:
        """Sum over the training atoms of phi phi^T (n, n), with its ridge: what is known already."""
        return self.counts[0] * _form(self.atoms) / len(self.atoms)

    def force_std(self, leverage):
        """Standard deviation of a force component of each atom, (N,) eV/Å, from its leverage."""
        return self.beta * leverage**self.gamma

    def energy_std(self, sums: Tensor) -> Tensor:
        """Standard deviations of total energies, (B,) eV, from the sums of the features of each structure (B, n)."""
        return self.alpha * torch.linalg.vector_norm(sums @ self.frames, dim=1)


def measure_uncertainty(
    train: Sequence[Residuals], held_out: Sequence[Residuals], before: Uncertainty | None = None
) -> Uncertainty:
    """The forms of the training frames, calibrated on frames that were held out; on the first where there are none.

    before: of the potential that was fine-tuned. What it knows is not forgotten: the forms are added, taking the
    features to be much the same, and few atoms held out do not make another power law.
    """
    features = torch.cat([one.features for one in train]).double()
    sums = torch.stack([one.features.double().sum(0) for one in train])
    n = features.shape[1]
    counts, of_atoms, of_frames = (len(features), len(train)), features.T @ features, sums.T @ sums
    if before is not None:
        counts = (counts[0] + before.counts[0], counts[1] + before.counts[1])
        of_atoms = of_atoms + before.of_training()
        of_frames = of_frames + _form(before.frames)
    u = Uncertainty(
        atoms=_inverse_factor(of_atoms / counts[0]) / n**0.5,
        frames=_inverse_factor(of_frames),
        alpha=1.0,
        beta=1.0,
        gamma=1.0,
        calibrated_on="validation" if held_out else "training",
        counts=counts,
    )
    frames = held_out or train
    leverage = torch.cat([u.leverage(one.features.double()) for one in frames]).numpy()
    powers = [before.gamma] if before is not None and len(leverage) < ENOUGH else POWERS
    beta, gamma = fit_power(leverage, np.concatenate([one.forces for one in frames]), powers)
    energies = np.array([one.energy for one in frames])
    sums = torch.stack([one.features.double().sum(0) for one in frames])
    alpha, _ = fit_power(u.energy_std(sums).numpy(), energies[:, None], [1.0])
    return u._replace(alpha=alpha, beta=beta, gamma=gamma)


def _form(factor: Tensor) -> Tensor:
    """The form of which `_inverse_factor` is the factor."""
    return torch.linalg.inv((factor @ factor.T).double())


def _inverse_factor(form: Tensor) -> Tensor:
    """W with W W^T = (form + r)^-1."""
    ridge = max(RIDGE * float(form.diagonal().mean()), 1e-300)
    values, vectors = torch.linalg.eigh(form)
    return vectors * (values.clamp_min(0.0) + ridge).rsqrt()


def fit_power(x: np.ndarray, errors: np.ndarray, powers: Sequence[float] = POWERS) -> tuple[float, float]:
    """c and p of the likeliest normal errors (N, k) with standard deviation c x^p; NaN errors are left out.

    For a given p the best c^2 is the mean of errors^2 / x^(2p). Without any error c is NaN.
    """
    known = np.isfinite(errors).all(axis=1) & (x > 0)
    if not known.any():
        return float("nan"), float(powers[0])
    x, squares = x[known], np.square(errors[known]).mean(axis=1) + FLOOR**2
    fits = [(np.mean(squares / x ** (2 * p)), p) for p in powers]
    c2, p = min(fits, key=lambda fit: np.log(fit[0]) + 2 * fit[1] * np.log(x).mean())
    return float(np.sqrt(c2)), float(p)


def parse_uncertainty(values: dict, width: int) -> Uncertainty:
    """The uncertainty of a file, of so many features. Raises TypeError, ValueError for what is none."""
    u = Uncertainty(**values)
    u = u._replace(counts=tuple(u.counts))  # a list in a file
    numbers = all(isinstance(x, float) for x in (u.alpha, u.beta, u.gamma)) and isinstance(u.calibrated_on, str)
    if not numbers or not all(x.shape == (width, width) and torch.isfinite(x).all() for x in (u.atoms, u.frames)):
        raise ValueError(f"uncertainty has no matrices for {width} features, or what should be numbers is not")
    return u
