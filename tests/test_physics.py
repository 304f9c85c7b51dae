"""What must hold for every potential: T1 to T13 of the design, on all named systems.

The potentials have random weights and calibrated norms, so energies are of the order of 1 eV an atom.
"""

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from helpers.potentials import VARIANTS
from helpers.systems import (
    CUTOFF,
    MOLECULES,
    NAMED,
    PERFECT,
    PERIODIC,
    SPECIES,
    WITH_VOLUME,
    elements,
    ethanol,
    random_gas,
    rotation,
    transformed,
    triclinic,
    water,
)
from helpers.trainings import loss_on

from segnn_ase.base.errors import StructureError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.batches import Item, Labels
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import save_potential
from segnn_ase.structure.graph import collate, edge_vectors, graph_from_atoms
from segnn_ase.structure.neighbors import BACKENDS

SMALL = [name for name in VARIANTS if name != "default"]
SMOOTH = [name for name in SMALL if name != "segnn2022"]
EVERYTHING = {name: build() for name, build in NAMED.items()}


@pytest.fixture(params=SMOOTH)
def potential(request, small_potential) -> Potential:
    return small_potential(request.param)


@pytest.fixture(params=SMALL)
def any_potential(request, small_potential) -> Potential:
    return small_potential(request.param)


with_default = pytest.mark.parametrize("potential", [*SMOOTH, "default"], indirect=True)


def graph_of(structures, backend: str = "matscipy"):
    return collate([graph_from_atoms(atoms, CUTOFF, backend) for atoms in structures])


def evaluate(potential: Potential, *structures: Atoms, **wanted):
    return predict(potential, graph_of(structures), **wanted)


def energies_of(potential: Potential, structures) -> np.ndarray:
    return evaluate(potential, *structures, forces=False).energy.numpy()


def by_structure(values, structures) -> list[np.ndarray]:
    """Cut per-atom values into one array per structure."""
    return np.split(values.numpy(), np.cumsum([len(atoms) for atoms in structures])[:-1])


def assert_all_close(actual, expected, tolerance: float, names=EVERYTHING):
    """Compare per-structure values and name the structures that differ by more than the tolerance."""
    differences = {
        name: float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for name, a, b in zip(names, actual, expected, strict=True)
    }
    wrong = {name: d for name, d in differences.items() if not d <= tolerance}
    assert not wrong, f"difference above {tolerance}: {wrong}"


@pytest.mark.parametrize("improper", [False, True], ids=["rotation", "reflection"])
@pytest.mark.parametrize("any_potential", list(VARIANTS), indirect=True)
def test_T01_rotation_reflection_and_translation(any_potential, improper):
    structures = list(EVERYTHING.values())
    matrix = rotation(7, improper=improper)
    moved = [transformed(atoms, matrix, shift=(3.1, -40.7, 12.3)) for atoms in structures]
    before, after = (evaluate(any_potential, *s) for s in (structures, moved))
    assert_all_close(after.energy, before.energy, 1e-9)
    turned = before.forces @ torch.from_numpy(matrix).T
    assert_all_close(by_structure(after.forces, moved), by_structure(turned, structures), 1e-8)


def test_T01_stress_rotates(any_potential):
    structures = [EVERYTHING[name] for name in WITH_VOLUME]
    matrix = rotation(8, improper=True)
    before = evaluate(any_potential, *structures, stress=True).stress
    after = evaluate(any_potential, *(transformed(s, matrix) for s in structures), stress=True).stress
    assert before.abs().max() > 1e-3
    assert_all_close(after, matrix @ before.numpy() @ matrix.T, 1e-9, WITH_VOLUME)


def test_T01_rotation_in_float32(any_potential, request, small_potential):
    """Relative to the largest deviation of an energy from E0, and to the largest force."""
    single = small_potential(request.node.callspec.params["any_potential"], torch.float32)
    structures, matrix = list(EVERYTHING.values()), torch.from_numpy(rotation(9))
    moved = [transformed(atoms, matrix.numpy()) for atoms in structures]
    before, after = evaluate(single, *structures), evaluate(single, *moved)
    exact = evaluate(any_potential, *structures)
    assert before.energy.dtype == torch.float64
    energy, force = exact.energies.abs().max(), exact.forces.abs().max()
    for ours, reference in ((after, before), (before, exact)):
        turned = reference.forces @ matrix.T if ours is after else reference.forces
        assert (ours.energies - reference.energies).abs().max() < 1e-4 * energy
        assert (ours.forces - turned).abs().max() < 1e-4 * force


def test_T02_permutation_of_atoms(any_potential):
    rng = np.random.default_rng(2)
    structures = list(EVERYTHING.values())
    orders = [rng.permutation(len(atoms)) for atoms in structures]
    shuffled = [atoms[order] for atoms, order in zip(structures, orders, strict=True)]
    before, after = evaluate(any_potential, *structures), evaluate(any_potential, *shuffled)
    assert_all_close(after.energy, before.energy, 1e-10)
    for ours, reference in ((after.forces, before.forces), (after.energies, before.energies)):
        expected = [x[order] for x, order in zip(by_structure(reference, structures), orders, strict=True)]
        assert_all_close(by_structure(ours, shuffled), expected, 1e-10)


def test_T02_permutation_of_edges(any_potential):
    graph = graph_of(EVERYTHING.values())
    order = torch.randperm(len(graph.edge_src), generator=torch.Generator().manual_seed(0))
    edges = {name: getattr(graph, name)[order] for name in ("edge_src", "edge_dst", "edge_shift")}
    before, after = predict(any_potential, graph), predict(any_potential, graph._replace(**edges))
    assert_all_close(after.energy, before.energy, 1e-10)
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.edge_gradients, before.edge_gradients[order], rtol=0, atol=1e-10)


def test_T02_order_of_the_batch(any_potential):
    names = list(EVERYTHING)[::-1]
    structures = list(EVERYTHING.values())
    before, after = evaluate(any_potential, *structures), evaluate(any_potential, *structures[::-1])
    assert_all_close(after.energy, before.energy.flip(0), 1e-10, names)
    assert_all_close(by_structure(after.forces, structures[::-1]), by_structure(before.forces, structures)[::-1], 1e-10)


def slopes(potential: Potential, items, displaced, h: float) -> np.ndarray:
    """dE/ds by central differences, fourth order in h, for each item; displaced(item, s) is a structure."""
    energies = [energies_of(potential, [displaced(item, s * h) for item in items]) for s in (-2, -1, 1, 2)]
    return (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * h)


@with_default
def test_T03_forces_equal_central_differences(potential):
    """All atoms of a structure move along a random direction, a unit vector in 3N dimensions."""
    rng = np.random.default_rng(3)
    structures = list(EVERYTHING.values())
    directions = [v / np.linalg.norm(v) for v in (rng.normal(size=(len(atoms), 3)) for atoms in structures)]

    def displaced(item, s):
        moved = item[0].copy()
        moved.positions += s * item[1]
        return moved

    forces = by_structure(evaluate(potential, *structures).forces, structures)
    analytic = [(f * v).sum() for f, v in zip(forces, directions, strict=True)]
    items = list(zip(structures, directions, strict=True))
    assert_all_close(analytic, -slopes(potential, items, displaced, 2e-4), 1e-6)
    assert np.abs(analytic).max() > 0.1


@pytest.mark.parametrize("name", ["ethanol", "wire", "tiny_cell", "mixed_pbc", "left_handed_slab"])
def test_T03_every_component_of_the_forces(small_potential, name):
    """One atom and one axis at a time."""
    potential, atoms = small_potential("segnn"), EVERYTHING[name]
    steps = [(atom, axis) for atom in range(len(atoms)) for axis in range(3)]

    def displaced(step, s):
        moved = atoms.copy()
        moved.positions[step] += s
        return moved

    expected = -slopes(potential, steps, displaced, 2e-4).reshape(-1, 3)
    np.testing.assert_allclose(evaluate(potential, atoms).forces, expected, rtol=0, atol=1e-6)


STRAINS = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}


@pytest.mark.parametrize("component", STRAINS)
def test_T04_stress_equals_finite_strain(potential, component):
    structures = [EVERYTHING[name] for name in WITH_VOLUME]
    a, b = STRAINS[component]

    def strained(atoms, s):
        strain = np.zeros((3, 3))
        strain[a, b] += s / 2
        strain[b, a] += s / 2
        return transformed(atoms, np.eye(3) + strain)

    expected = slopes(potential, structures, strained, 1e-4) / [atoms.get_volume() for atoms in structures]
    stress = evaluate(potential, *structures, stress=True).stress
    assert torch.equal(stress, stress.mT)
    assert_all_close(stress[:, a, b], expected, 1e-7, WITH_VOLUME)


def last_neighbor(d: float) -> Atoms:
    return Atoms("CO", [[0, 0, 0], [d, 0, 0]])


def one_of_many(d: float) -> Atoms:
    """Only the carbon at the origin sees the oxygen: the others are on its far side."""
    near = [[0, 0, 0], [-1, 0.3, 0.2], [-0.9, -0.8, 0.1], [-1.3, 0.2, -0.9], [-2.4, 0.5, 0.4]]
    return Atoms("CHHOCuO", [*near, [d, 0, 0]])


def whole_shell(d: float) -> Atoms:
    """A ring of five atoms at once; they are too far from each other and from the two atoms on the axis."""
    ring = [[d * math.cos(2 * math.pi * k / 5), d * math.sin(2 * math.pi * k / 5), 0] for k in range(5)]
    return Atoms("CHOCu5", [[0, 0, 0], [0, 0, 1.1], [0, 0, -1.2], *ring])


def two_hops(d: float) -> Atoms:
    """A chain out of which one fragment moves as a whole: the first atom feels it through the second."""
    chain = [[-5.6, 0.3, 0.2], [-2.8, -0.4, 0], [0, 0, 0]]
    return Atoms("OCCOH", [*chain, [d, 0, 0], [d + 1.0, 0.5, 0]])


def own_image(d: float) -> Atoms:
    """An atom and its own periodic image."""
    return Atoms("Cu", cell=[d, 9, 9], pbc=True)


CROSSINGS = [last_neighbor, one_of_many, whole_shell, two_hops, own_image]


def jump(potential: Potential, build) -> tuple[float, float]:
    """Change of energy and of the forces while a pair crosses the cutoff by 1e-7 Å to either side."""
    inside, outside = (evaluate(potential, build(CUTOFF + s)) for s in (-1e-7, 1e-7))
    assert len(inside.edge_gradients) > len(outside.edge_gradients)
    return (inside.energy - outside.energy).abs().item(), (inside.forces - outside.forces).abs().max().item()


@with_default
@pytest.mark.parametrize("build", CROSSINGS)
def test_T05_an_atom_crossing_the_cutoff_changes_nothing(potential, build):
    energy, force = jump(potential, build)
    assert energy < 1e-10
    assert force < 1e-8


@pytest.mark.parametrize("build", CROSSINGS)
def test_T05b_the_hard_mean_of_the_paper_jumps(small_potential, build):
    """The same measurement finds the discontinuity where there is one."""
    assert jump(small_potential("segnn2022"), build)[0] > 1e-3


def test_T05_the_crossing_atom_is_felt_when_it_is_nearer(potential):
    """No trivial pass: the same geometries depend on that atom well inside the cutoff."""
    near, far = (energies_of(potential, [build(d) for build in CROSSINGS]) for d in (0.7 * CUTOFF, CUTOFF))
    assert (np.abs(near - far) > 1e-3).all()


def lonely(z: int, **cell) -> Atoms:
    return Atoms([z], [[0.3, 0.2, 0.1]], **cell)


def assert_is_reference(potential: Potential, atoms: Atoms, z: int):
    result = evaluate(potential, atoms)
    assert abs(result.energy.item() - potential.reference_energies[potential.species.index(z)]) < 1e-12
    assert result.forces.abs().max() < 1e-12


@pytest.mark.parametrize("z", SPECIES)
def test_T06_isolated_atom_has_its_reference_energy(any_potential, z):
    assert_is_reference(any_potential, lonely(z), z)
    assert_is_reference(any_potential, lonely(z, cell=np.eye(3) * 9, pbc=True), z)


def test_T06_isolated_atom_after_other_weights_are_loaded(new_potential):
    """eps_iso belongs to the weights: it must not outlive them, in eval mode either."""
    potential = new_potential("segnn")
    evaluate(potential, water())
    potential.load_state_dict(new_potential("segnn", seed=1).state_dict())
    assert_is_reference(potential, lonely(6), 6)


def test_T06_isolated_atom_after_weights_are_changed_in_place(new_potential):
    """An optimiser step or an average of weights in eval mode."""
    potential = new_potential("segnn")
    evaluate(potential, water())
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.1)
    assert_is_reference(potential, lonely(6), 6)


def test_T06_isolated_atom_in_training_and_in_float32(new_potential, small_potential):
    assert_is_reference(new_potential("segnn").train(), lonely(6), 6)
    assert_is_reference(small_potential("segnn", torch.float32), lonely(6), 6)


def test_T06_empty_edge_list(any_potential):
    """Several atoms, no pair: the sum of the reference energies."""
    atoms = Atoms("HCOCu", [[10.0 * k, 0, 0] for k in range(4)])
    result = evaluate(any_potential, atoms)
    assert abs(result.energy.item() - sum(any_potential.reference_energies)) < 1e-12
    assert (result.forces == 0).all()
    assert result.edge_gradients.shape == (0, 3)


def test_T06_one_atom_in_a_small_periodic_cell_has_no_force(any_potential):
    result = evaluate(any_potential, EVERYTHING["tiny_cell"], stress=True)
    assert result.forces.abs().max() < 1e-12
    assert result.stress.abs().max() > 1e-4


@pytest.mark.parametrize("distance", [CUTOFF + 3, 1000.0])
def test_T07_energies_of_far_molecules_add_up(any_potential, distance):
    a, b = water(), ethanol()
    b.translate([a.positions[:, 0].max() - b.positions[:, 0].min() + distance, 0, 0])
    together, apart = evaluate(any_potential, a + b), evaluate(any_potential, a, b)
    assert abs(together.energy.item() - apart.energy.sum().item()) < 1e-9
    torch.testing.assert_close(together.forces, apart.forces, rtol=0, atol=1e-9)


def test_T07_supercells(any_potential):
    structures = [EVERYTHING[name] for name in PERIODIC]
    large = [atoms * (1, 1 + int(atoms.pbc[1]), 1 + int(atoms.pbc[2])) for atoms in structures]
    assert all(len(b) > len(a) for a, b in zip(structures, large, strict=True))
    per_atom = [energies_of(any_potential, s) / [len(atoms) for atoms in s] for s in (structures, large)]
    assert_all_close(*per_atom, 1e-9, PERIODIC)


def chain(moved: float) -> Atoms:
    """Nine atoms 3 Å apart, each in sight of the next ones only; the last one is moved."""
    atoms = Atoms("CHCOCHCuOC", [[3.0 * k, 0.4 * (k % 2), 0.3 * (k % 3)] for k in range(9)])
    atoms.positions[8, 1] += moved
    return atoms


@pytest.mark.parametrize("moved", [0.7, 60.0], ids=["moved", "gone"])
def test_T08_beyond_the_receptive_field_nothing_changes(any_potential, moved):
    """An energy depends on atoms so many hops away, a force on twice as many.

    One hop an interaction, and one more where node attributes steer the embedding: they know the neighbours.
    """
    config = any_potential.config
    hops = config.interactions + (config.lmax_attr > 0)
    before, after = (evaluate(any_potential, chain(x)) for x in (0.0, moved))
    assert torch.equal(before.energies[: 8 - hops], after.energies[: 8 - hops])
    assert torch.equal(before.forces[: 8 - 2 * hops], after.forces[: 8 - 2 * hops])
    assert (before.energies[8 - hops :] != after.energies[8 - hops :]).all()
    assert (before.forces[8 - 2 * hops :] != after.forces[8 - 2 * hops :]).any(dim=1).all()


def test_T09_forces_add_up_to_zero(any_potential):
    structures = list(EVERYTHING.values())
    forces = by_structure(evaluate(any_potential, *structures).forces, structures)
    assert_all_close([f.sum(axis=0) for f in forces], np.zeros((len(forces), 3)), 1e-10)


def test_T09_torques_on_molecules_add_up_to_zero(any_potential):
    structures = [EVERYTHING[name] for name in MOLECULES]
    forces = by_structure(evaluate(any_potential, *structures).forces, structures)
    torques = [np.cross(a.positions, f).sum(axis=0) for a, f in zip(structures, forces, strict=True)]
    assert_all_close(torques, np.zeros((len(torques), 3)), 1e-10, MOLECULES)


def test_T10_batch_equals_single(any_potential):
    structures = list(EVERYTHING.values())
    batch = evaluate(any_potential, *structures)
    single = [evaluate(any_potential, atoms) for atoms in structures]
    assert_all_close(batch.energy, [s.energy.item() for s in single], 1e-10)
    assert_all_close(by_structure(batch.forces, structures), [s.forces for s in single], 1e-10)
    periodic = [EVERYTHING[name] for name in WITH_VOLUME]
    stress = evaluate(any_potential, *periodic, stress=True).stress
    assert_all_close(stress, [evaluate(any_potential, s, stress=True).stress[0] for s in periodic], 1e-10, WITH_VOLUME)


def test_T10_wrapped_equals_unwrapped(any_potential):
    rng = np.random.default_rng(10)
    structures = [EVERYTHING[name] for name in PERIODIC]
    moved = [atoms.copy() for atoms in structures]
    for atoms in moved:
        atoms.positions += (rng.integers(-3, 4, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array
    wrapped = [atoms.copy() for atoms in structures]
    for atoms in wrapped:
        atoms.wrap()
    expected = evaluate(any_potential, *structures)
    for other in (moved, wrapped):
        result = evaluate(any_potential, *other)
        assert_all_close(result.energy, expected.energy, 1e-10, PERIODIC)
        torch.testing.assert_close(result.forces, expected.forces, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_T10_every_neighbor_backend_gives_the_same(small_potential, backend):
    """That they find the same pairs is in test_neighbors.py."""
    if backend == "torch_cluster":
        pytest.importorskip("torch_cluster")
    expected = evaluate(small_potential("segnn"), *EVERYTHING.values())
    result = predict(small_potential("segnn"), graph_of(EVERYTHING.values(), backend))
    assert_all_close(result.energy, expected.energy, 1e-10)
    torch.testing.assert_close(result.forces, expected.forces, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_T10_the_same_structure_twice_gives_the_same_bits(new_potential, dtype):
    """Else a restarted simulation cannot go on bit for bit: its first step is a potential's first call."""
    potential = new_potential("segnn", dtype)
    first, second = (evaluate(potential, ethanol()) for _ in range(2))
    assert torch.equal(first.energies, second.energies)
    assert torch.equal(first.forces, second.forces)


def assert_finite(result):
    assert all(torch.isfinite(x).all() for x in result if x is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-7, 1e-6, 1e-3, 0.1])
def test_T11_overlapping_atoms_give_no_nan(small_potential, distance, dtype):
    atoms = Atoms("CHO", [[0, 0, 0], [0, distance, 0], [1.2, 0, 0.1]])
    for variant in VARIANTS:
        assert_finite(evaluate(small_potential(variant, dtype), atoms))


def gradients(loss, potential: Potential) -> list[torch.Tensor]:
    """Of the parameters that matter: the l > 0 outputs of the last update do not reach the energy."""
    found = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def test_T11_overlapping_atoms_give_no_nan_in_training(new_potential):
    potential = new_potential("segnn").train()
    result = evaluate(potential, Atoms("CHO", [[0, 0, 0], [0, 0, 0], [1.2, 0, 0.1]]))
    assert all(torch.isfinite(g).all() for g in gradients(result.forces.square().sum(), potential))


def test_T11_a_molecule_beside_a_crystal_gives_no_nan_in_training(new_potential):
    """The stress of the molecule is undefined; that of the crystal, and its slopes, must not suffer."""
    potential = new_potential("segnn").train()
    crystal = evaluate(potential, triclinic(), water(), stress=True).stress[0]
    assert torch.isfinite(crystal).all()
    assert all(torch.isfinite(g).all() for g in gradients(crystal.square().sum(), potential))


@pytest.mark.parametrize("missing", ["energy", "forces", "stress"])
def test_T11_missing_labels_give_no_nan_in_training(new_potential, missing):
    """A batch in which one structure has no energy, no forces or no stress."""
    potential, graph = new_potential("segnn").train(), graph_of([triclinic(), triclinic()])
    shapes = ((2,), (10, 3), (2, 3, 3), (10, 0), (2, 3), (2, 3, 3), (10, 3, 3))
    labels = Labels(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    getattr(labels, missing)[0] = math.nan
    loss = loss_on(Item(graph, labels), potential)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, potential))


def test_T11_collinear_atoms_are_pulled_along_their_line_only(any_potential):
    for atoms in (EVERYTHING["collinear"], molecule("CO2"), Atoms("C8", [[0, 0, 1.3 * k] for k in range(8)])):
        forces = evaluate(any_potential, atoms).forces
        assert forces[:, :2].abs().max() < 1e-10
        assert forces[:, 2].abs().max() > 1e-3


def test_T11_perfect_crystals_have_no_forces(any_potential):
    assert evaluate(any_potential, *(EVERYTHING[name] for name in PERFECT)).forces.abs().max() < 1e-10


def test_T11_zero_cues_change_nothing(any_potential):
    """The design's cues enter as node attributes: zero of them is the same as none, with finite slopes."""
    graph = graph_of([ethanol()])
    segnn, one_hot = any_potential.segnn, any_potential._one_hot(any_potential.species_index[graph.numbers])
    cues = torch.zeros(len(graph.numbers), (segnn.config.lmax_attr + 1) ** 2, dtype=torch.float64, requires_grad=True)
    inputs = (one_hot, edge_vectors(graph), graph.edge_src, graph.edge_dst)
    without, with_zero = (any_potential.readout(segnn(*inputs, node_attr=x)[0]) for x in (None, cues))
    assert torch.equal(without, with_zero)
    (slope,) = torch.autograd.grad(with_zero.sum(), cues)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("atoms", [water(), EVERYTHING["tilted_wire"]], ids=["molecule", "periodic"])
def test_T12_gradgradcheck(any_potential, atoms):
    """First and second derivatives of the energy with respect to positions and cell."""
    graph = graph_of([atoms])

    def energy(positions, cell):
        return any_potential(graph._replace(positions=positions, cell=cell))[0]

    inputs = (graph.positions.requires_grad_(), graph.cell.requires_grad_())
    assert torch.autograd.gradcheck(energy, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, inputs, fast_mode=True)


def test_T12_every_element_of_the_second_derivatives(small_potential):
    graph = graph_of([water()])

    def energy(positions):
        return small_potential("segnn")(graph._replace(positions=positions))[0]

    assert torch.autograd.gradgradcheck(energy, graph.positions.requires_grad_())


@pytest.mark.parametrize("variant", SMALL)
def test_T12_loss_on_energy_forces_and_stress_is_differentiable_in_the_weights(new_potential, variant):
    """The derivative that training uses, against differences along a random direction of all weights."""
    potential = new_potential(variant).train()
    graph = graph_of([EVERYTHING["vacuum"], triclinic()])
    parameters, generator = list(potential.parameters()), torch.Generator().manual_seed(0)
    start = {p: p.detach().clone() for p in parameters}
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss():
        result = predict(potential, graph, stress=True)
        return sum(x.square().mean() for x in (result.energy, result.forces, 10 * result.stress))

    def displaced_loss(s: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.copy_(start[p] + s * d)
        return loss().item()

    slopes = torch.autograd.grad(loss(), parameters, allow_unused=True)
    analytic = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True) if g is not None).item()
    coarse, fine = ((displaced_loss(h) - displaced_loss(-h)) / (2 * h) for h in (1e-5, 5e-6))
    numerical = (4 * fine - coarse) / 3  # Richardson
    assert analytic == pytest.approx(numerical, rel=1e-6)


@pytest.mark.parametrize("neighbors", [2, 5, 10, 20, 40])
@pytest.mark.parametrize("preset", ["segnn", "fast", "accurate", "tfn", "egnn", "schnet"])
def test_T13_variance_of_the_scalars_at_initialisation(preset, neighbors):
    """Mean square over atoms, channels and three seeds of the 0e features, after each interaction.

    The norms are calibrated on the structure itself, a gas of random atoms with so many neighbours on
    average, and weights are fresh. Nothing is asserted for l > 0: node attributes shrink with the number
    of neighbours, and so do the features that come from them (0.03 to 0.6).
    """
    width = {"fast": "32x0e+32x1o", "egnn": "64x0e", "schnet": "64x0e"}.get(preset, "16x0e+16x1o+16x2e")
    graph = graph_of([random_gas(12, neighbors, CUTOFF, seed=neighbors)])
    squares = []
    for seed in range(3):
        torch.manual_seed(seed)
        potential = Potential(model_config(preset, cutoff=CUTOFF, hidden_irreps=width), SPECIES)
        potential.calibrate(graph)
        one_hot = potential._one_hot(potential.species_index[graph.numbers])
        with torch.no_grad():
            history, _ = potential.segnn(one_hot, edge_vectors(graph).float(), graph.edge_src, graph.edge_dst)
        squares.append([f[potential.readout.scalar].square().mean().item() for f in history])
    for variance in np.mean(squares, axis=0):
        assert 0.3 < variance < 3


@pytest.fixture(scope="module")
def periodic_table():
    """A potential of 89 elements with a crystal that holds each of them once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = model_config(cutoff=CUTOFF, radial_hidden=(16,), hidden_irreps="8x0e+8x1o+8x2e")
        potential = Potential(config, list(range(1, 90)), reference_energies=[-0.1 * z for z in range(1, 90)]).double()
    atoms = elements()
    potential.calibrate(graph_of([atoms]))
    return potential.eval(), atoms


def test_89_elements_rotate_permute_and_repeat(periodic_table):
    potential, atoms = periodic_table
    matrix, order = rotation(11, improper=True), np.random.default_rng(0).permutation(len(atoms))
    before = evaluate(potential, atoms)
    moved = evaluate(potential, transformed(atoms, matrix, shift=(3.0, -1.0, 40.0))[order])
    assert abs(float(moved.energy - before.energy)) < 1e-9
    turned = (before.forces @ torch.from_numpy(matrix).T)[order]
    torch.testing.assert_close(moved.forces, turned, rtol=0, atol=1e-8)
    assert abs(float(evaluate(potential, atoms * (2, 1, 1)).energy - 2 * before.energy)) < 1e-7


def test_89_elements_have_89_energies_and_forces_of_their_own(periodic_table):
    potential, atoms = periodic_table
    alone = [evaluate(potential, lonely(z)).energy.item() for z in range(1, 90)]
    np.testing.assert_allclose(alone, [-0.1 * z for z in range(1, 90)], rtol=0, atol=1e-12)
    neighbors = [Atoms([z, 8], [[0, 0, 0], [2.0, 0, 0]]) for z in range(1, 90)]
    bonds = energies_of(potential, neighbors) - alone
    assert len(np.unique(bonds.round(8))) == 89

    def displaced(atom, s):
        moved = atoms.copy()
        moved.positions[atom, atom % 3] += s
        return moved

    forces, chosen = evaluate(potential, atoms).forces, range(0, 89, 11)
    analytic = [float(forces[atom, atom % 3]) for atom in chosen]
    np.testing.assert_allclose(analytic, -slopes(potential, chosen, displaced, 2e-4), rtol=0, atol=1e-6)


def test_89_elements_are_saved_and_run_in_compiled_code(periodic_table, tmp_path):
    potential, atoms = periodic_table
    save_potential(tmp_path / "all.pt", potential)
    results = []
    for mode in ("off", "require"):
        atoms = elements()
        atoms.calc = SEGNNCalculator(tmp_path / "all.pt", accelerate=mode)
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    for layers, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, layers, rtol=1e-7, atol=1e-7)
    atoms.numbers[3] = 90
    with pytest.raises(StructureError, match="atom 3 is Th, which this potential does not know"):
        atoms.get_forces()
