"""Every backend equals the brute-force search, as a multiset of pairs; a skin changes nothing."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list as ase_neighbor_list
from helpers.systems import CUTOFF, NAMED, PERIODIC, brute_force, rattled, rotation, transformed, triclinic, water
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from segnn_ase.base.errors import StructureError
from segnn_ase.structure.neighbors import BACKENDS, Neighbors, device_neighbor_list, neighbor_list
from segnn_ase.structure.skin import SkinNeighbors

CLUSTER = importlib.util.find_spec("torch_cluster") is not None
LISTS = [*(name for name in sorted(BACKENDS) if CLUSTER or name != "torch_cluster"), *["device"] * CLUSTER, "skin"]


@pytest.fixture(params=sorted(BACKENDS))
def backend(request):
    if request.param == "torch_cluster":
        pytest.importorskip("torch_cluster")
    return request.param


def geometry(atoms: Atoms):
    return atoms.positions, atoms.cell.array, atoms.pbc


def in_order(found) -> list[tuple]:
    return list(zip(found.i.tolist(), found.j.tolist(), *found.S.T.tolist(), strict=True))


def rows(found) -> list[tuple]:
    return sorted(in_order(found))


@pytest.mark.parametrize("name", NAMED)
def test_backend_equals_brute_force(name, backend):
    found = neighbor_list(*geometry(NAMED[name]()), CUTOFF, backend)
    assert rows(found) == brute_force(*geometry(NAMED[name]()), CUTOFF)[0]
    assert (np.diff(found.i) >= 0).all()
    assert all(np.issubdtype(x.dtype, np.integer) for x in found)


ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("name", NAMED)
def test_device_search_equals_brute_force(name, device):
    pytest.importorskip("torch_cluster")
    i, j, S = (x.cpu() for x in device_neighbor_list(*geometry(NAMED[name]()), CUTOFF, device))
    assert rows(Neighbors(i.numpy(), j.numpy(), S.numpy())) == brute_force(*geometry(NAMED[name]()), CUTOFF)[0]
    assert (i.diff() >= 0).all()


@pytest.mark.parametrize("name", [name for name in NAMED if name != "dimer_at_cutoff"])
def test_brute_force_equals_ase(name):
    expected, nearest = brute_force(*geometry(NAMED[name]()), CUTOFF)
    assert nearest > 1e-9
    i, j, S = ase_neighbor_list("ijS", NAMED[name](), CUTOFF)
    assert sorted(zip(i.tolist(), j.tolist(), *S.T.tolist(), strict=True)) == expected


components = st.floats(-4, 4, allow_subnormal=False)
shapes = st.sampled_from(["any", "left", "needle", "skewed", "tiny", "reduced"])
fractions = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0]), st.floats(-1, 2, allow_subnormal=False))
FARTHEST = 40  # cells, or some 100 Å


@st.composite
def geometries(draw):
    """Positions, cell and pbc: atoms on faces, inside, and far outside of cells of every shape."""
    cell = np.array(draw(st.lists(components, min_size=9, max_size=9))).reshape(3, 3)
    pbc = np.array(draw(st.one_of(st.tuples(st.booleans(), st.booleans(), st.booleans()), st.just((True,) * 3))))
    shape = draw(shapes)
    if shape == "left":
        cell *= -np.sign(np.linalg.det(cell))
    elif shape == "needle":
        cell[draw(st.integers(0, 2))] *= draw(st.sampled_from([0.2, 8.0]))
    elif shape == "skewed":
        cell[0] += draw(st.integers(-4, 4)) * cell[1] + draw(st.integers(-4, 4)) * cell[2]
    elif shape == "tiny":
        cell *= 0.35
    elif shape == "reduced":
        cell = np.diag(np.abs(np.diag(cell)))
    if draw(st.booleans()):
        cell[~pbc] = 0.0
    scaled = np.array(draw(st.lists(st.tuples(fractions, fractions, fractions), min_size=1, max_size=5)))
    if draw(st.booleans()):
        far = draw(st.lists(st.integers(-FARTHEST, FARTHEST), min_size=3, max_size=3))
        scaled[draw(st.integers(0, len(scaled) - 1))] += far
    frame = cell + 2.5 * np.eye(3)[:, ::-1] * ~cell.any(axis=1, keepdims=True)  # along what has no vector too
    return scaled @ frame, cell, pbc


def found_by(name: str, positions, cell, pbc, cutoff: float) -> list[tuple]:
    """Rows by a backend, by the list of a device, or by a list with a skin that was made for other positions."""
    if name == "device":
        return rows(Neighbors(*(x.numpy() for x in device_neighbor_list(positions, cell, pbc, cutoff, "cpu"))))
    if name != "skin":
        return rows(neighbor_list(positions, cell, pbc, cutoff, name))
    skin, away = SkinNeighbors(cutoff, 0.4), np.random.default_rng(0).uniform(-1, 1, positions.shape)
    for size in (0.4, 0.11):  # too far for the skin as a rule, near enough
        skin(positions + size * away, cell, pbc)
        kept = rows(skin(positions, cell, pbc))
    return kept


@pytest.mark.slow
@settings(max_examples=500)
@given(geometry=geometries(), cutoff=st.floats(0.6, 4.5))
def test_every_list_equals_brute_force_in_random_cells(geometry, cutoff):
    assert_every_list_equals_brute_force(geometry, cutoff)


@pytest.mark.proof
@settings(max_examples=5000)
@given(geometry=geometries(), cutoff=st.floats(0.6, 4.5))
def test_every_list_equals_brute_force_in_many_random_cells(geometry, cutoff):
    assert_every_list_equals_brute_force(geometry, cutoff)


def assert_every_list_equals_brute_force(geometry, cutoff) -> None:
    """Tiny, skewed, needle-like and left-handed cells, every mixture of pbc, atoms anywhere."""
    positions, cell, pbc = geometry
    if pbc.any():  # flat cells have thousands of images: cap the work
        vectors = cell[pbc]
        lengths = np.linalg.norm(vectors, axis=1)
        assume(lengths.min() > 0.3 and np.linalg.svd(vectors / lengths[:, None], compute_uv=False).min() > 0.05)
        reach = 2 * cutoff * np.linalg.norm(np.linalg.pinv(vectors), axis=0)
        assume(np.prod(reach + 3) * len(positions) ** 2 < 20_000)
    expected, nearest = brute_force(positions, cell, pbc, cutoff)
    assume(nearest > 1e-9)
    for name in LISTS:
        assert found_by(name, positions, cell, pbc, cutoff) == expected, name


@pytest.mark.parametrize("name", PERIODIC)
def test_pairs_do_not_depend_on_orientation(name, backend):
    atoms = transformed(NAMED[name](), rotation(1, improper=True), shift=(50.0, -20.0, 7.0))
    assert rows(neighbor_list(*geometry(atoms), CUTOFF, backend)) == brute_force(*geometry(NAMED[name]()), CUTOFF)[0]


def test_vectors_of_the_pairs_are_shorter_than_the_cutoff_and_come_in_both_directions(backend):
    positions, cell, pbc = geometry(NAMED["outside"]())
    found = neighbor_list(positions, cell, pbc, CUTOFF, backend)
    r = positions[found.j] + found.S @ cell - positions[found.i]
    assert np.linalg.norm(r, axis=1).max() < CUTOFF
    assert rows(found) == sorted((j, i, *(-np.array(S)).tolist()) for i, j, *S in rows(found))


def test_nothing_is_truncated_above_64_neighbors(backend):
    """torch_cluster.radius keeps 32 by default; fcc copper has 1060 within 12 Å."""
    atoms = bulk("Cu", "fcc", a=3.6)
    expected, nearest = brute_force(*geometry(atoms), 12.0)
    assert len(expected) > 512
    assert nearest > 1e-9
    assert rows(neighbor_list(*geometry(atoms), 12.0, backend)) == expected


def test_nothing_is_truncated_when_the_neighbors_are_exactly_64(backend):
    rng = np.random.default_rng(0)
    positions = np.vstack([np.zeros(3), rng.uniform(-1, 1, (64, 3))])
    found = neighbor_list(positions, np.zeros((3, 3)), False, 4.0, backend)
    assert len(found.i) == 65 * 64


def test_atoms_on_one_spot_are_neighbors(backend):
    assert rows(neighbor_list(np.zeros((2, 3)), np.zeros((3, 3)), False, 1.0, backend)) == [
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
    ]


def test_no_atoms_no_pairs(backend):
    found = neighbor_list(np.zeros((0, 3)), np.eye(3), True, 4.0, backend)
    assert [x.shape for x in found] == [(0,), (0,), (0, 3)]


def test_no_atoms_no_pairs_on_the_device():
    pytest.importorskip("torch_cluster")
    found = device_neighbor_list(np.zeros((0, 3)), np.zeros((3, 3)), False, 4.0, "cpu")
    assert [tuple(x.shape) for x in found] == [(0,), (0,), (0, 3)]


def test_an_atom_that_flew_away_costs_nothing(backend):
    """A molecule without cell that lost an atom: no memory in proportion to the empty space, no warning."""
    positions = [[0, 0, 0], [1.0, 0, 0], [1e5, 1e5, 1e5]]
    assert rows(neighbor_list(positions, np.zeros((3, 3)), False, CUTOFF, backend)) == [
        (0, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize("name", ["slab", "wire", "left_handed_slab", "mixed_pbc"])
def test_an_atom_that_left_a_surface_or_a_wire_costs_nothing(name, backend):
    atoms = NAMED[name]()
    expected = brute_force(*geometry(atoms), CUTOFF)[0]
    normal = np.linalg.svd(atoms.cell.array[atoms.pbc], full_matrices=True)[2][-1]  # to all periodic vectors
    n = len(atoms)
    atoms += Atoms("H", [1e5 * normal])
    found = rows(neighbor_list(*geometry(atoms), CUTOFF, backend))
    assert [row for row in found if row[0] < n or row[1] < n] == expected  # beside the atom's own images


def test_inputs_are_not_changed(backend):
    positions, cell, pbc = (x.copy() for x in geometry(NAMED["outside"]()))
    neighbor_list(positions, cell, pbc, CUTOFF, backend)
    for now, before in zip((positions, cell, pbc), geometry(NAMED["outside"]()), strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_positions_that_are_not_finite_name_the_atom(bad):
    positions = water().positions
    positions[2, 1] = bad
    with pytest.raises(StructureError, match="atom 2"):
        neighbor_list(positions, np.zeros((3, 3)), False, CUTOFF)
    with pytest.raises(StructureError, match="atom 2"):
        SkinNeighbors(CUTOFF, 0.5)(positions, np.zeros((3, 3)), np.zeros(3, bool))


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), True),
        (np.diag([4.0, 0.0, 4.0]), (False, True, False)),
        (np.array([[4.0, 0, 0], [8.0, 0, 0], [0, 0, 4.0]]), (True, True, False)),
        (np.ones((3, 3)), True),
    ],
)
def test_periodic_cells_without_volume_are_refused(cell, pbc):
    with pytest.raises(StructureError, match=r"span no volume.*pbc"):
        neighbor_list(np.zeros((1, 3)), cell, pbc, CUTOFF)


def test_cells_that_are_not_finite_are_refused():
    with pytest.raises(StructureError, match="cell is"):
        neighbor_list(np.zeros((1, 3)), np.diag([1.0, np.nan, 1.0]), True, CUTOFF)


def random_walk(atoms: Atoms, steps: int, stdev: float):
    rng = np.random.default_rng(5)
    for _ in range(steps):
        yield atoms
        atoms = atoms.copy()
        atoms.positions += rng.normal(scale=stdev, size=atoms.positions.shape)


@pytest.mark.parametrize("name", NAMED)
def test_skin_is_exact_along_a_random_walk(name):
    skin = SkinNeighbors(CUTOFF, 0.6)
    for atoms in random_walk(NAMED[name](), 40, 0.03):
        assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
    assert 1 < skin.rebuilds < 30


def test_order_of_the_pairs_does_not_depend_on_history():
    """A restarted run sums in the same order, hence ends with the same bits."""
    skin = SkinNeighbors(CUTOFF, 1.0)
    for atoms in random_walk(triclinic(), 20, 0.03):
        assert in_order(skin(*geometry(atoms))) == in_order(SkinNeighbors(CUTOFF, 1.0)(*geometry(atoms)))


def test_order_of_the_pairs_does_not_depend_on_the_skin():
    with_skin, without = (SkinNeighbors(CUTOFF, s)(*geometry(triclinic())) for s in (1.0, 0.0))
    assert in_order(with_skin) == in_order(without)


def test_skin_notices_wrapping():
    skin, atoms = SkinNeighbors(CUTOFF, 1.0), NAMED["outside"]()
    before = skin(*geometry(atoms))
    atoms.wrap()
    assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF)) != rows(before)
    assert skin.rebuilds == 2


def test_skin_is_exact_when_an_atom_moves_by_a_lattice_vector_shorter_than_half_the_skin():
    skin, atoms = SkinNeighbors(CUTOFF, 5.0), NAMED["needle"]()
    skin(*geometry(atoms))
    atoms.positions[1] += atoms.cell[0]
    assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
    assert skin.rebuilds == 1


@pytest.mark.parametrize("fraction", [0.49, 0.51])
def test_skin_is_exact_at_its_limit(fraction):
    """Two atoms move towards each other by just less and just more than half the skin each."""
    skin, s = SkinNeighbors(CUTOFF, 0.5), 0.5
    atoms = Atoms("CO", [[0, 0, 0], [CUTOFF + 0.99 * s, 0, 0]])
    assert rows(skin(*geometry(atoms))) == []
    atoms.positions[0, 0] += 0.5 * s
    atoms.positions[1, 0] -= fraction * s
    assert len(skin(*geometry(atoms)).i) == 2 * (atoms.get_distance(0, 1) < CUTOFF)
    assert skin.rebuilds == 1 + (fraction > 0.5)


def test_skin_notices_small_changes_of_the_cell_and_of_pbc():
    skin, atoms = SkinNeighbors(CUTOFF, 1.0), triclinic()
    skin(*geometry(atoms))
    atoms.set_cell(atoms.cell * 1.001)  # the positions stay
    assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
    assert skin.rebuilds == 1
    atoms.set_cell(atoms.cell * 0.8)
    assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
    atoms.pbc = (True, False, True)
    assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
    assert skin.rebuilds == 3


@pytest.mark.parametrize("skin", [0.6, "auto"])
@pytest.mark.parametrize("name", ["triclinic", "left_handed", "very_skewed", "tiny_cell"])
def test_skin_is_exact_while_the_cell_changes_and_atoms_are_wrapped(name, skin):
    """2,000 steps of a walk of atoms and cell; the list serves several steps all the same."""
    rng, atoms, skin = np.random.default_rng(1), NAMED[name](), SkinNeighbors(CUTOFF, skin)
    original = atoms.cell.array.copy()
    for step in range(2000):
        strain = np.eye(3) + 0.02 * np.sin(0.01 * step * np.arange(1, 10)).reshape(3, 3)
        atoms.set_cell(original @ strain, scale_atoms=True)
        atoms.positions += rng.normal(scale=0.01, size=atoms.positions.shape)
        if step % 300 == 299:
            atoms.wrap()
        if step % 10 == 0 or step % 300 == 299:
            assert in_order(skin(*geometry(atoms))) == in_order(neighbor_list(*geometry(atoms), CUTOFF)), step
        else:
            skin(*geometry(atoms))
    assert skin.rebuilds < 500


def test_a_strained_cell_uses_the_skin_up_exactly():
    """Two atoms just outside the skin come nearer because the cell shrinks: the list is made again in time."""
    for scale in np.linspace(1.0, 0.8, 41):
        skin = SkinNeighbors(CUTOFF, 0.5)
        atoms = Atoms("CO", [[0, 0, 0], [CUTOFF + 0.51, 0, 0]], cell=[12, 12, 12], pbc=True)
        skin(*geometry(atoms))
        atoms.set_cell(atoms.cell * scale, scale_atoms=True)
        assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))


@pytest.mark.parametrize(("speed", "limits"), [(0.1, (0.9, 1.5)), (0.001, (0.2, 0.3))])
def test_skin_follows_the_speed_of_the_atoms(speed, limits):
    tuned, fixed, start = SkinNeighbors(CUTOFF), SkinNeighbors(CUTOFF, 0.5), triclinic()
    for step in range(3000):
        atoms = start.copy()
        atoms.positions[0, 0] += speed * step
        tuned(*geometry(atoms))
        fixed(*geometry(atoms))
    assert limits[0] <= tuned.skin <= limits[1] and fixed.skin == 0.5


def test_a_search_that_failed_leaves_no_list_with_another_skin():
    """The skin is tuned before the search: the list of before must not be taken to reach as far."""
    skin, atoms = SkinNeighbors(CUTOFF), Atoms("CO", [[0, 0, 0], [CUTOFF + 0.55, 0, 0]])
    assert rows(skin(*geometry(atoms))) == []
    with pytest.raises(StructureError, match="atom 1"):
        skin(atoms.positions * [[1.0], [np.nan]], *geometry(atoms)[1:])
    atoms.positions[:, 0] += [0.3, -0.3]
    assert len(skin(*geometry(atoms)).i) == 2


def test_skin_does_not_follow_unrelated_structures():
    skin = SkinNeighbors(CUTOFF)
    for atoms in {len(build()): build() for build in NAMED.values()}.values():
        skin(*geometry(atoms))
    assert skin.skin == 0.5


def test_skin_notices_a_change_of_the_number_of_atoms():
    skin, atoms = SkinNeighbors(CUTOFF, 1.0), triclinic()
    for some in (atoms, atoms[:3], atoms * (2, 1, 1), atoms):
        assert rows(skin(*geometry(some))) == rows(neighbor_list(*geometry(some), CUTOFF))
    assert skin.rebuilds == 4


def test_skin_keeps_no_view_of_positions_or_cell_changed_in_place():
    skin, atoms = SkinNeighbors(CUTOFF, 0.4), triclinic()
    positions, cell, pbc = geometry(atoms)
    for _ in range(6):
        positions += rattled(Atoms("C5"), 1, 0.1).positions
        cell *= 0.99
        assert rows(skin(positions, cell, pbc)) == rows(neighbor_list(positions, cell, pbc, CUTOFF))


def test_skin_of_zero_searches_every_time():
    skin = SkinNeighbors(CUTOFF, 0.0)
    for atoms in itertools.islice(random_walk(triclinic(), 3, 0.1), 3):
        assert rows(skin(*geometry(atoms))) == rows(neighbor_list(*geometry(atoms), CUTOFF))
