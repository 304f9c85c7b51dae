"""What the core does: nothing from its radius on; below, the network sees no nearer pair, and the repulsion rules."""

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from helpers.systems import CUTOFF, rattled

from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.model.predict import predict
from segnn_ase.model.repulsion import CORE_BLUR, held_apart
from segnn_ase.structure.graph import graph_from_atoms

SHIPPED = {"silicon-pbe": ["Si"], "water-pbe0": ["H", "O"], "acetylacetone-pbe": ["H", "C", "O"]}


def seen_at(d: torch.Tensor, radius: float) -> torch.Tensor:
    direction = torch.tensor([0.48, -0.6, 0.64], dtype=d.dtype)
    return held_apart(d[:, None] * direction, torch.full_like(d, radius)) @ direction


def test_pairs_outside_the_core_are_seen_where_they_are():
    vectors = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(held_apart(vectors, vectors.norm(dim=1)), vectors)
    assert torch.equal(held_apart(vectors.float(), 0.9 * vectors.float().norm(dim=1)), vectors.float())


def test_the_distance_that_is_seen_is_smooth_and_stops_at_the_blur():
    radius = 1.7
    d = torch.linspace(0.1, 1.2 * radius, 20_001, dtype=torch.float64)
    step = float(d[1] - d[0])
    d.requires_grad_()
    derivatives = [seen_at(d, radius)]
    for _ in range(2):
        derivatives.append(torch.autograd.grad(derivatives[-1].sum(), d, create_graph=True)[0])
    # a kink in D or D' would leave steps of order one in the next derivative however fine the grid is
    assert derivatives[0].diff().abs().max() < 1.01 * step and derivatives[1].diff().abs().max() < 19 / radius * step
    assert derivatives[2].diff().abs().max() < 600 / radius**2 * step
    deep = d < (1 - CORE_BLUR) * radius - step
    torch.testing.assert_close(derivatives[0][deep], torch.full_like(d[deep], (1 - CORE_BLUR / 2) * radius))
    assert derivatives[1].min() > -1e-12 and derivatives[1].max() < 1.0 + 1e-12


def approached(atoms: Atoms, i: int, j: int, distances: np.ndarray) -> list[Atoms]:
    """The atom j moved along the line to i."""
    unit = atoms.get_distance(i, j, mic=True, vector=True) / atoms.get_distance(i, j, mic=True)
    frames = [atoms.copy() for _ in distances]
    for frame, d in zip(frames, distances, strict=True):
        frame.positions[j] = frame.positions[i] + d * unit
    return frames


def radii_of(calc: SEGNNCalculator, atoms: Atoms, i: int) -> np.ndarray:
    """Core radii of all atoms with atom i, (N,) Å."""
    p = calc.potentials[0]
    kinds = [p.symbols.index(symbol) for symbol in atoms.symbols]
    return p.core_radii.numpy()[kinds[i], kinds]


def assert_repels(calc: SEGNNCalculator, atoms: Atoms, i: int, j: int, count: int = 40, *, past_others=True) -> int:
    """The energy rises at all distances up to 0.9 of the core radius; returns at how many.

    past_others: also where j is in the core of a third atom.
    """
    radii, others = radii_of(calc, atoms, j), [k for k in range(len(atoms)) if k not in (i, j)]
    frames = approached(atoms, i, j, np.linspace(0.1, 0.9 * radii[i], count))
    alone = np.array([(f.get_distances(j, others, mic=True) > radii[others]).all() if others else True for f in frames])
    energies = np.array([r["energy"] for r in calc.evaluate(frames, "energy")])
    steps = np.diff(energies)[past_others | (alone[1:] & alone[:-1])]
    assert (steps < 0.0).all(), (atoms[i].symbol, atoms[j].symbol)
    return len(steps)


@pytest.mark.parametrize("name", SHIPPED)
def test_two_atoms_repel_each_other_everywhere_in_the_core(name):
    calc = SEGNNCalculator(name, dtype="float64", domain="ignore")
    for pair in itertools.combinations_with_replacement(SHIPPED[name], 2):
        assert_repels(calc, Atoms(pair, [[0, 0, 0], [0, 0, 1.5]]), 0, 1)


def test_atoms_of_a_crystal_repel_each_other():
    calc = SEGNNCalculator("silicon-pbe", dtype="float64", domain="ignore")
    crystal = bulk("Si", cubic=True)
    for atoms in (crystal, rattled(crystal, stdev=0.08), rattled(crystal, 1, stdev=0.15)):
        nearest = np.argsort(atoms.get_distances(0, range(1, 8), mic=True))[:4] + 1
        for j in nearest:
            assert_repels(calc, atoms, 0, int(j))


def waters() -> Atoms:
    """A small dense box; no other atom is near the bonds."""
    grid = np.stack(np.meshgrid(range(2), range(2), range(2), indexing="ij"), -1).reshape(-1, 3)
    box = Atoms(cell=[6.2] * 3, pbc=True)
    for n, site in enumerate(grid):
        one = molecule("H2O")
        one.rotate(73 * n, (1, n, 2))
        one.translate(3.1 * site)
        box += one
    return box


def test_atoms_of_a_liquid_and_of_a_molecule_repel_each_other():
    water = SEGNNCalculator("water-pbe0", dtype="float64", domain="ignore")
    box = waters()
    for n in range(8):
        assert_repels(water, box, 3 * n, 3 * n + 1)
        assert_repels(water, box, 3 * n + 2, 3 * n)
    acetone = molecule("CH3COCH3")
    distances = acetone.get_all_distances()
    calc = SEGNNCalculator("acetylacetone-pbe", dtype="float64", domain="ignore")
    for i, j in np.argwhere(np.triu((distances > 0) & (distances < 1.6))):
        assert_repels(calc, acetone, i, j)
        assert_repels(calc, acetone, j, i)


@pytest.mark.parametrize(
    ("name", "build", "reach", "least"),
    [
        ("silicon-pbe", lambda: rattled(bulk("Si", cubic=True), stdev=0.1), 4.0, 60),
        ("water-pbe0", lambda: waters()[:12], 3.3, 60),
        ("acetylacetone-pbe", lambda: molecule("CH3COCH3"), 3.0, 40),
    ],
    ids=["crystal", "liquid", "molecule"],
)
def test_every_pair_within_reach_repels(name, build, reach, least):
    """Not only neighbours: atoms that come from behind others, too."""
    calc, atoms = SEGNNCalculator(name, dtype="float64", domain="ignore"), build()
    distances, seen = atoms.get_all_distances(mic=True), {}
    for i, j in itertools.permutations(range(len(atoms)), 2):
        kind = f"{atoms[i].symbol}{atoms[j].symbol}"
        if i < 5 and distances[i, j] < reach and seen.get(kind, 0) < least:
            seen[kind] = seen.get(kind, 0) + assert_repels(calc, atoms, i, j, 12, past_others=False)
    assert sum(seen.values()) >= least and len(seen) >= len(SHIPPED[name]) ** 2 - 1


def test_derivatives_in_the_core_are_exact(small_potential):
    potential = small_potential("segnn")
    atoms = Atoms("CHOHC", [[0, 0, 0], [0.3, 0.95, 0.1], [1.1, -0.2, 0.2], [0.5, -0.75, -0.4], [0.1, 0.2, 1.2]])
    atoms.set_cell([[3.6, 0.2, 0], [0, 3.9, 0.3], [0.1, 0, 3.7]])
    atoms.pbc = True

    def energy(moved: Atoms) -> float:
        return float(predict(potential, graph_from_atoms(moved, CUTOFF), forces=False).energy)

    found = predict(potential, graph_from_atoms(atoms, CUTOFF), stress=True)
    direction, strain = np.random.default_rng(0).normal(size=(5, 3)), np.random.default_rng(1).normal(size=(3, 3))
    strain += strain.T
    ends = []
    for h in (1e-4, -1e-4):
        moved, strained = atoms.copy(), atoms.copy()
        moved.positions += h * direction
        strained.set_cell(atoms.cell.array @ (np.eye(3) + h * strain), scale_atoms=True)
        ends.append((energy(moved), energy(strained)))
    slopes = (np.array(ends[0]) - ends[1]) / 2e-4
    assert slopes[0] == pytest.approx(-float((found.forces.numpy() * direction).sum()), rel=1e-6)
    assert slopes[1] == pytest.approx(float((found.stress[0].numpy() * strain).sum()) * atoms.get_volume(), rel=1e-6)
