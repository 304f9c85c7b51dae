"""Cells that are sheared, fine or full: the same pairs as in a compact cell, in no time, or a message."""

import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from helpers.potentials import tiny_potential

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import StructureError
from segnn_ase.structure.neighbors import compact, neighbor_list

CUTOFF = 5.0


def silicon() -> Atoms:
    atoms = bulk("Si", a=5.43, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def copper_slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    atoms.rattle(0.1, seed=1)
    return atoms


def upright_slab() -> Atoms:
    """Periodic along the second and third direction."""
    atoms = copper_slab()
    atoms.set_cell(atoms.cell.array[[2, 0, 1]])
    atoms.pbc = (False, True, True)
    return atoms


def left_handed() -> Atoms:
    atoms = silicon()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def outside() -> Atoms:
    """Atoms that lie many cells away."""
    atoms = silicon()
    atoms.positions += np.random.default_rng(0).integers(-9, 9, (len(atoms), 3)) @ atoms.cell.array
    return atoms


MAKE = (silicon, copper_slab, upright_slab, left_handed, outside)


def sheared(atoms: Atoms, by: int) -> Atoms:
    """The same crystal, described by longer lattice vectors."""
    atoms, (a, *others) = atoms.copy(), np.flatnonzero(atoms.pbc)
    cell = atoms.cell.array
    for n, b in enumerate(others):
        cell[b] += (by, -by // 2)[n] * cell[a]
    atoms.set_cell(cell)
    return atoms


def vectors_of(atoms: Atoms) -> np.ndarray:
    """All r_ij with their ends (E, 5), sorted."""
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    vectors = atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array
    rows = np.column_stack([i, j, vectors.round(5) + 0.0])
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("by", [1, 3, -7, 100, 1000])
def test_a_sheared_cell_has_the_same_pairs_at_once(make, by):
    begin = time.perf_counter()
    found = vectors_of(sheared(make(), by))
    assert time.perf_counter() - begin < 1.0
    np.testing.assert_allclose(found, vectors_of(make()), atol=2e-5)


def test_shifts_are_those_of_the_given_cell():
    atoms = sheared(silicon(), 1000)
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, True, CUTOFF)
    distance = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array, axis=1)
    assert (distance < CUTOFF).all() and np.abs(S).max() > 100
    pairs = {tuple(row) for row in np.column_stack([i, j, S])}
    assert {(j, i, *(-s for s in S)) for i, j, *S in pairs} == pairs  # each with its reverse


@pytest.mark.parametrize("cell", [np.eye(3), bulk("Cu").cell.array, bulk("Ti").cell.array, bulk("Fe").cell.array])
def test_usual_cells_are_left_alone(cell):
    same, vectors = compact(cell, True)
    assert np.array_equal(same, cell) and np.array_equal(vectors, np.eye(3))


def test_energies_do_not_see_the_shear():
    calc = SEGNNCalculator(tiny_potential(), domain="ignore", accelerate="off")
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    found = []
    for by in (0, 10, 1000):
        one = sheared(atoms, by)
        one.calc = calc
        found.append((one.get_potential_energy(), one.get_forces(), one.get_stress()))
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-7)


@pytest.mark.parametrize(
    "cell, n",
    [(np.eye(3) * 0.01, 1), (np.diag([1e-4, 4, 4]), 1), (np.eye(3), 2000), (np.eye(3) * 1e-9, 1)],
    ids=["fine", "flat", "full", "of another unit"],
)
def test_what_would_fill_the_memory_is_refused_at_once(cell, n):
    begin = time.perf_counter()
    with pytest.raises(StructureError, match=r"cell is .* with \d+ atoms, each of which would have about"):
        neighbor_list(np.random.default_rng(0).random((n, 3)) @ cell, cell, True, CUTOFF)
    assert time.perf_counter() - begin < 1.0


def test_dense_matter_is_not_refused():
    """Copper at eight times its density, and a cell of one atom under 6 Å."""
    atoms = bulk("Cu", a=1.8)
    assert len(neighbor_list(atoms.positions, atoms.cell.array, True, 6.0).i) > 300


def water_box(n: int) -> Atoms:
    side = round(n ** (1 / 3) + 0.499)
    box = molecule("H2O", cell=[3.1] * 3, pbc=True).repeat(side)
    box = box[: 3 * n]
    box.rattle(0.05, seed=1)
    return box


def test_five_thousand_atoms():
    """Pairs as the energy of a pair potential by hand counts them, and the speed of growth with the number of atoms."""
    atoms = water_box(1728)
    assert len(atoms) == 5184
    begin = time.perf_counter()
    i, j, S = neighbor_list(atoms.positions, atoms.cell.array, True, CUTOFF)
    assert time.perf_counter() - begin < 5.0
    distance = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + S @ atoms.cell.array, axis=1)
    assert (distance < CUTOFF).all() and len(np.unique(np.column_stack([i, j, S]), axis=0)) == len(i)
    for k in (0, 2591, 5183):  # one atom against all images by brute force
        shifts = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ atoms.cell.array
        all_distances = np.linalg.norm(atoms.positions[:, None] + shifts - atoms.positions[k], axis=2)
        assert (i == k).sum() == (all_distances < CUTOFF).sum() - 1
