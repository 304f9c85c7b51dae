"""The heat flux against its definition, d/dt sum_i r_i E_i, and in crystals against a crystal unfolded by hand."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from helpers.potentials import TINY, VARIANTS, odd_potential, tiny_potential
from helpers.systems import ethanol, rattled, rattled_copper, squeezed, tiny_cell, triclinic, two_fragments

from segnn_ase.base.errors import ConfigError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.structure.graph import graph_from_atoms

SMOOTH = [name for name in VARIANTS if name not in ("default", "segnn2022")]


def moving(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms = atoms.copy()
    atoms.set_velocities(np.random.default_rng(seed).normal(size=(len(atoms), 3)))
    return atoms


def moment(potential: Potential, atoms: Atoms) -> np.ndarray:
    """sum_i r_i E_i of a cluster, eV Å."""
    energies = predict(potential, graph_from_atoms(atoms, potential.cutoff), forces=False).energies.numpy()
    kinetic = 0.5 * atoms.get_masses() * (atoms.get_velocities() ** 2).sum(1)
    return (atoms.positions * (energies + kinetic)[:, None]).sum(0)


def slope_of_moment(potential: Potential, atoms: Atoms, h: float = 1e-4) -> np.ndarray:
    """By differences of fourth order along the trajectory: r + v t, v + F t / m."""
    forces = predict(potential, graph_from_atoms(atoms, potential.cutoff)).forces.numpy()

    def at(t: float) -> np.ndarray:
        later = atoms.copy()
        later.set_velocities(atoms.get_velocities() + t * forces / atoms.get_masses()[:, None])
        later.positions += t * atoms.get_velocities()
        return moment(potential, later)

    return (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h)


def calculator(potential: Potential) -> SEGNNCalculator:
    return SEGNNCalculator(potential, accelerate="off", domain="ignore")


@pytest.mark.parametrize("variant", SMOOTH)
@pytest.mark.parametrize("build", [ethanol, two_fragments, lambda: squeezed()[0]], ids=["molecule", "two", "core"])
def test_flux_of_a_cluster_is_the_slope_of_the_first_moment(variant, build, small_potential):
    potential, atoms = small_potential(variant), moving(build())
    found = calculator(potential).get_heat_flux(atoms)
    expected = slope_of_moment(potential, atoms)
    assert np.abs(found - expected).max() < 1e-7 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ["high_degree", "few_attributes"])
def test_flux_of_a_cluster_for_odd_settings(name):
    potential, atoms = odd_potential(name), moving(ethanol(), 1)
    expected = slope_of_moment(potential, atoms)
    found = calculator(potential).get_heat_flux(atoms)
    assert np.abs(found - expected).max() < 1e-7 * max(1.0, np.abs(expected).max())


def unfolded_flux(potential: Potential, atoms: Atoms) -> np.ndarray:
    """sum_ij (r_i - r_j) dU_i / dr_j . v_j: i in the cell, j in a cluster of images that holds all that U_i sees."""
    reach = (potential.config.interactions + 1) * potential.cutoff
    copies = [int(np.ceil(reach / d)) for d in 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)]
    shifts = np.stack(np.meshgrid(*(range(-c, c + 1) for c in copies), indexing="ij"), -1).reshape(-1, 3)
    shifts = shifts[np.argsort(np.abs(shifts).sum(1), kind="stable")]  # the cell itself first
    positions = (atoms.positions[None] + (shifts @ atoms.cell.array)[:, None]).reshape(-1, 3)
    numbers, velocities = np.tile(atoms.numbers, len(shifts)), np.tile(atoms.get_velocities(), (len(shifts), 1))
    near = np.linalg.norm(positions[:, None] - atoms.positions, axis=2).min(1) <= reach
    graph = graph_from_atoms(Atoms(numbers[near], positions[near]), potential.cutoff)
    r, v, n = graph.positions.requires_grad_(), torch.as_tensor(velocities[near]), len(atoms)
    with torch.enable_grad():
        energies = potential(graph._replace(positions=r))[1][:n]
        weighted = r.detach()[:n].T @ energies
        moments = [torch.autograd.grad(weighted[a], r, retain_graph=True)[0] for a in range(3)]
        (total,) = torch.autograd.grad(energies.sum(), r)
    first = torch.stack([(m * v).sum() for m in moments])
    return (first - (r.detach() * (total * v).sum(1)[:, None]).sum(0)).numpy()


@pytest.mark.parametrize("build", [rattled_copper, tiny_cell, triclinic], ids=lambda build: build.__name__)
def test_flux_of_a_crystal_is_that_of_the_unfolded_one(build):
    potential, atoms = tiny_potential(), moving(build())
    expected = unfolded_flux(potential, atoms)
    found = calculator(potential).get_heat_flux(atoms, convective=False)
    assert np.abs(found - expected).max() < 1e-9 * max(1.0, np.abs(expected).max()) and np.abs(expected).max() > 1e-3


def test_atoms_that_move_as_one_carry_energy_and_work_against_the_stress():
    """Without heat: J = sum_i E_i u - V stress u."""
    potential, atoms = tiny_potential(), triclinic()
    u = np.array([0.3, -1.2, 0.7])
    atoms.set_velocities(np.tile(u, (len(atoms), 1)))
    calc = atoms.calc = calculator(potential)
    energy = atoms.get_potential_energy() + atoms.get_kinetic_energy()
    expected = energy * u - atoms.get_volume() * atoms.get_stress(voigt=False) @ u
    np.testing.assert_allclose(calc.get_heat_flux(atoms), expected, rtol=1e-10, atol=1e-10)


def test_flux_is_extensive_and_knows_neither_origin_nor_wrapping():
    calc, atoms = calculator(tiny_potential()), moving(triclinic())
    flux = calc.get_heat_flux(atoms)
    moved = atoms.copy()
    moved.positions += [1.0, 2.0, -3.0]
    moved.wrap()
    np.testing.assert_allclose(calc.get_heat_flux(moved), flux, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(calc.get_heat_flux(atoms * (2, 1, 1)), 2 * flux, rtol=1e-10, atol=1e-9)
    atoms.set_velocities(np.zeros((len(atoms), 3)))
    assert not calc.get_heat_flux(atoms).any()


def test_the_sum_over_pairs_is_not_the_flux():
    """What the usual formula for pair potentials gives: the atoms' virials times their velocities."""
    calc, atoms = SEGNNCalculator("silicon-pbe", dtype="float64"), moving(rattled(bulk("Si", cubic=True)))
    naive = -np.einsum("iab,ib->a", calc.get_virials(atoms), atoms.get_velocities())
    exact = calc.get_heat_flux(atoms, convective=False)
    assert np.abs(naive - exact).max() > 0.05 * np.abs(exact).max()


def test_a_shipped_potential_and_a_committee():
    atoms = moving(rattled(bulk("Si", cubic=True)))
    atoms.set_velocities(atoms.get_velocities() * (300 * units.kB / 28) ** 0.5)
    one = SEGNNCalculator("silicon-pbe").get_heat_flux(atoms)
    both = SEGNNCalculator(["silicon-pbe"] * 2).get_heat_flux(atoms)
    assert one.shape == (3,) and one.dtype == float
    np.testing.assert_allclose(both, one)


def test_the_published_message_and_wrong_arguments_are_refused(small_potential):
    calc = SEGNNCalculator(small_potential("segnn2022"), accelerate="off", allow_nonsmooth=True)
    with pytest.raises(ConfigError, match="published"):
        calc.get_heat_flux(moving(ethanol()))
    with pytest.raises(ConfigError, match=r"convective is 'yes'; expected True or False"):
        calculator(tiny_potential(cutoff=TINY["cutoff"])).get_heat_flux(ethanol(), convective="yes")
