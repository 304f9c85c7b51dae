"""Trajectories: forces are gradients, leapfrog keeps energy and momentum, the published settings hold."""

import numpy as np
import pytest

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.dynamics.motion import Motion, read_motion, write_motion
from segnn_ase.dynamics.systems import BOX, EVERY, MOST_FORCE, SPEED, SYSTEMS, TIMESTEP, coulomb, leapfrog, simulate

NAMES = sorted(SYSTEMS)


def started(name, trajectories=3, seed=0):
    system = SYSTEMS[name]
    return system, *system.start(np.random.default_rng(seed), trajectories, system.bodies)


@pytest.mark.parametrize("name", NAMES)
def test_accelerations_are_minus_the_gradient_of_the_energy(name):
    system, x, _, q = started(name)
    x = x[:, :5] * 3.0  # far from where forces are cut
    q, step, direction = q[:, :5], 1e-5, np.random.default_rng(1).normal(size=x.shape)
    up, down = (system.potential(x + sign * step * direction, q) for sign in (1, -1))
    np.testing.assert_allclose(
        (up - down) / (2 * step), -(system.accelerations(x, q) * direction).sum((1, 2)), rtol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_energy_and_momentum_are_kept(name):
    system, x, v, q = started(name)
    x = 3.0 * x  # so that no two come as close as only smaller steps could follow
    later, w = leapfrog(system, x, v, q, 300)
    energies = [system.potential(p, q) + 0.5 * (u**2).sum((1, 2)) for p, u in ((x, v), (later, w))]
    kinetic = 0.5 * (v**2).sum((1, 2))
    assert np.abs(later - x).max() > 0.1
    assert (np.abs(energies[1] - energies[0]) < 1e-3 * kinetic).all()
    np.testing.assert_allclose(w.sum(axis=1), v.sum(axis=1), atol=1e-9)


def test_charges_begin_as_published():
    _, x, v, q = started("charged", 4000)
    assert abs(x.std() - 1.0) < 0.01 and np.abs(x).max() <= BOX
    np.testing.assert_allclose(np.linalg.norm(v, axis=2), SPEED)
    assert set(q.ravel()) == {-1.0, 1.0} and abs(q.mean()) < 0.02


def test_stars_begin_at_rest_together():
    _, _, v, masses = started("gravity")
    np.testing.assert_allclose(v.mean(axis=1), 0.0, atol=1e-12)
    assert (masses == 1.0).all()


def test_forces_on_charges_that_meet_are_cut():
    x = np.array([[[0.0, 0, 0], [1e-3, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]]])
    assert np.abs(coulomb(x, np.ones((1, 5)))).max() == MOST_FORCE


def test_two_times_of_the_same_trajectory():
    """The same bodies step by step; a seed decides all."""
    motion = simulate("charged", 2, 7)
    system, x, v, q = started("charged", 2, 7)
    for steps, *known in (
        (EVERY * 31, motion.positions, motion.velocities),
        (EVERY * 10, motion.later, motion.later_velocities),
    ):
        x, v = leapfrog(system, x, v, q, steps)
        np.testing.assert_array_equal([x, v], known)
    assert TIMESTEP * EVERY * 10 == pytest.approx(1.0)
    assert not np.array_equal(simulate("charged", 2, 8).positions, motion.positions)
    with pytest.raises(ConfigError, match="expected one of charged, gravity"):
        simulate("springs", 2, 0)
    with pytest.raises(ConfigError, match="trajectories"):
        simulate("charged", 0, 0)


def test_files(tmp_path):
    rng = np.random.default_rng(0)
    x, v, later = rng.normal(size=(3, 2, 5, 3))
    motion, path = Motion(x, v, np.ones((2, 5)), later, later), tmp_path / "motion.npz"
    write_motion(path, motion)
    for found, given in zip(read_motion(path), motion, strict=True):
        np.testing.assert_array_equal(found, given)
    for wrong, reason in (
        (motion._replace(charges=np.ones(5)), "expected charges"),
        (motion._replace(later=later[:, :4]), "expected charges"),
        (motion._replace(velocities=v * np.nan), "not finite"),
    ):
        write_motion(path, wrong)
        with pytest.raises(DataError, match=reason):
            read_motion(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="no file of motion"):
        read_motion(path)
    with pytest.raises(FileNotFoundError, match="motion is"):
        read_motion(tmp_path / "other.npz")
