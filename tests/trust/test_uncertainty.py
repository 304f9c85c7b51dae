"""The last-layer estimate: leverages, calibration by likelihood, and what it makes of data it has not seen."""

import numpy as np
import pytest
import torch

from segnn_ase.trust.uncertainty import Residuals, fit_power, measure_uncertainty


def frames(n: int, seed: int, *, size: int = 6, beta: float = 0.02, power: float = 1.0, width: float = 1.0):
    """Frames with normal features, and errors whose deviations are beta |first feature| ** power."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        x = rng.normal(size=(size, 5)) * width
        deviation = beta * np.linalg.norm(x, axis=1) ** power
        forces = rng.normal(size=(size, 3)) * deviation[:, None]
        energy = rng.normal() * 0.3 * np.linalg.norm(x.sum(0))
        out.append(Residuals(torch.from_numpy(x), energy, forces))
    return out


def test_the_leverage_of_usual_atoms_is_one():
    train = frames(400, 0)
    u = measure_uncertainty(train, [])
    h = torch.cat([u.leverage(one.features) for one in train])
    assert float(h.square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_leverage_is_the_textbook_quadratic_form():
    train = frames(50, 1)
    u = measure_uncertainty(train, [])
    x = torch.cat([one.features for one in train])
    form = x.T @ x / len(x)
    expected = torch.einsum("nc,cd,nd->n", x, torch.linalg.inv(form), x) / 5
    torch.testing.assert_close(u.leverage(x) ** 2, expected, rtol=1e-4, atol=0)
    sums = torch.stack([one.features.sum(0) for one in train])
    expected = torch.einsum("nc,cd,nd->n", sums, torch.linalg.inv(sums.T @ sums), sums).sqrt()
    torch.testing.assert_close(u.energy_std(sums) / u.alpha, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
def test_scale_and_power_are_found(power):
    u = measure_uncertainty(frames(100, 2, power=power), frames(2000, 3, power=power))
    assert u.gamma == pytest.approx(power, abs=0.051)
    assert u.calibrated_on == "validation"
    fresh = frames(500, 4, power=power)
    std = torch.cat([u.force_std(u.leverage(one.features)) for one in fresh]).numpy()
    ratio = np.concatenate([one.forces for one in fresh]) / std[:, None]
    assert np.mean(ratio**2) == pytest.approx(1.0, abs=0.05)
    assert np.mean(np.abs(ratio) < 1) == pytest.approx(0.683, abs=0.02)


def test_energies_are_calibrated_per_structure():
    u = measure_uncertainty(frames(300, 5), held_out := frames(3000, 6))
    sums = torch.stack([one.features.sum(0) for one in held_out])
    ratio = np.array([one.energy for one in held_out]) / u.energy_std(sums).numpy()
    assert np.mean(ratio**2) == pytest.approx(1.0, abs=1e-6)


def test_surroundings_that_were_not_seen_are_uncertain():
    train = [one._replace(features=one.features * torch.tensor([1, 1, 1, 1, 1e-3])) for one in frames(100, 7)]
    u = measure_uncertainty(train, [])
    usual, strange = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]], dtype=torch.float64)
    assert u.leverage(strange[None]) > 100 * u.leverage(usual[None])


def test_missing_labels_are_left_out_and_none_at_all_give_nan():
    train = frames(20, 8)
    spoilt = [one._replace(energy=float("nan")) for one in train]
    spoilt[0].forces[2] = np.nan
    u = measure_uncertainty(spoilt, spoilt)
    assert np.isnan(u.alpha) and np.isfinite(u.beta)
    assert np.isfinite(measure_uncertainty(train, spoilt[:1]).beta)


def test_fine_tuning_does_not_forget_what_was_known():
    old, new = frames(300, 10, power=1.5), frames(3, 11, width=0.01)
    before = measure_uncertainty(old, frames(300, 12, power=1.5))
    u = measure_uncertainty(new, frames(2, 13), before)
    assert u.counts == (303 * 6, 303) and u.gamma == before.gamma
    h = torch.cat([u.leverage(one.features) for one in old])
    assert float(h.square().mean()) == pytest.approx(1.0, rel=0.02)
    assert (
        float(measure_uncertainty(new, [], None).leverage(old[0].features).max()) > 50
    )  # they alone know nothing of the old
    together = measure_uncertainty([*old, *new], [])
    torch.testing.assert_close(u.leverage(old[0].features), together.leverage(old[0].features), rtol=1e-4, atol=0)
    sums = torch.stack([one.features.sum(0) for one in old])
    ratio = u.energy_std(sums) / u.alpha, together.energy_std(sums) / together.alpha
    torch.testing.assert_close(*ratio, rtol=1e-3, atol=0)


def test_features_that_never_vary_are_no_obstacle():
    train = [one._replace(features=torch.ones(6, 5, dtype=torch.float64)) for one in frames(10, 9)]
    u = measure_uncertainty(train, train)
    assert torch.isfinite(u.leverage(train[0].features)).all() and np.isfinite([u.alpha, u.beta, u.gamma]).all()


def test_likeliest_power_of_exact_data():
    x = np.linspace(1, 5, 50)
    c, p = fit_power(x, np.sqrt(3) * 0.1 * x[:, None] ** 1.2 * np.eye(3)[np.zeros(50, int)])
    assert (c, p) == (pytest.approx(0.1, rel=1e-6), pytest.approx(1.2))
