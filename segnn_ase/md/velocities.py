"""First velocities from the Maxwell-Boltzmann distribution, and the degrees of freedom that share the heat."""

import numpy as np
from ase import Atoms, units


def set_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator, *, turned: bool = False) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution, without total momentum, for molecules without rotation.

    What is left after the projection is the canonical distribution of the other degrees of freedom: it needs
    no rescaling. With constraints nothing is projected out. turned: as by a field, which a molecule feels; rotations
    stay.
    """
    masses = atoms.get_masses()[:, None]  # (N, 1) amu
    velocities = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature / masses)
    if not atoms.constraints:
        velocities -= (masses * velocities).sum(axis=0) / masses.sum()
        if not (atoms.pbc.any() or turned):
            arms, inertia = _inertia(atoms)
            # pinv: the inertia about the axis of a linear molecule is zero
            spin = np.linalg.pinv(inertia, rcond=1e-8, hermitian=True) @ np.cross(arms, masses * velocities).sum(axis=0)
            velocities -= np.cross(spin, arms)
    atoms.set_momenta(masses * velocities)


def degrees_of_freedom(atoms: Atoms, *, centre_moves: bool, turned: bool = False) -> int:
    """Count the degrees of freedom that share the thermal energy.

    Where the centre of mass is not pushed, the total momentum is conserved, and of a molecule that is not turned, as by
    a field, the angular one: those that are zero stay so and hold no heat.
    """
    count = atoms.get_number_of_degrees_of_freedom()
    if centre_moves or atoms.constraints:
        return count
    momenta = atoms.get_momenta()
    arms, inertia = _inertia(atoms)
    if np.linalg.norm(momenta.sum(axis=0)) <= 1e-4 * np.linalg.norm(momenta):
        count -= 3
        turning = np.cross(arms, momenta).sum(axis=0)
        scale = np.linalg.norm(arms) * np.linalg.norm(momenta)
        if not (atoms.pbc.any() or turned) and np.linalg.norm(turning) <= 1e-4 * scale:
            count -= np.linalg.matrix_rank(inertia, tol=1e-8 * np.trace(inertia), hermitian=True)
    return max(int(count), 1)


def kinetic_temperature(atoms: Atoms) -> float:
    """K, of the velocities; what is conserved and zero, as the momentum in most ensembles, holds no heat."""
    return 2 * atoms.get_kinetic_energy() / (degrees_of_freedom(atoms, centre_moves=False) * units.kB)


def _inertia(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Return positions from the centre of mass (N, 3) Å and the tensor of inertia (3, 3) amu Å^2."""
    arms = atoms.positions - atoms.get_center_of_mass()
    second = np.einsum("n,na,nb->ab", atoms.get_masses(), arms, arms)
    return arms, np.trace(second) * np.eye(3) - second
