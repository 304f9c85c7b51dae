"""What is judged at every step in one call into C is what the plain definitions say."""

import copy
import math

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from helpers.domains import characterized, contact, copper, training_set
from helpers.potentials import build_potential
from helpers.systems import NAMED

from segnn_ase import SEGNNCalculator, load_potential, shipped_potentials
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.newness import CompiledNewness, SortedPairs
from segnn_ase.model.newness import newness
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.structure.graph import edge_vectors, graph_from_atoms
from segnn_ase.trust.domain import virial_of
from segnn_ase.trust.monitor import Monitor


@pytest.fixture(scope="module")
def known():
    return characterized(build_potential("segnn"), training_set())


def stretched() -> Atoms:
    atoms = molecule("CO")
    atoms.set_distance(0, 1, 1.5)
    return atoms


STRUCTURES = {
    "crystal": lambda: copper(1),
    "supercell": lambda: copper(2).repeat((3, 2, 1)),
    "molecule": lambda: molecule("CO"),
    "molecule in a cell": lambda: molecule("CO", vacuum=8.0, pbc=True),
    "molecule across a boundary": lambda: Atoms("CO", [[0, 0, 0], [0, 0, 8.9]], cell=[10, 10, 10], pbc=[0, 0, 1]),
    "compressed": lambda: copper(0, 0.93),
    "contact": contact,
    "stretched": stretched,
    **{name: NAMED[name] for name in ("slab", "wire", "two_atoms") if name in NAMED},
}


def judged(potential, atoms: Atoms, monitor: Monitor, evaluator: CpuEvaluator):
    """What C says, and what the plain definitions say: of the reasons, of newness and of the leverages."""
    graph = graph_from_atoms(atoms, potential.cutoff)
    volume = float(atoms.cell.volume) if atoms.pbc.all() else None
    p = evaluator(graph, stress=volume is not None)
    watched = monitor._watch(monitor.check.limits(graph.numbers))
    exact = PlainEvaluator(potential)(graph, stress=volume is not None)
    new = newness(watched.surroundings, graph, potential.species_index[graph.numbers], potential.cutoff)
    leverage, energy_std = monitor.uncertainty.of_structure(exact.features)
    ways = monitor.check(graph, exact, new, volume=volume, leverage=leverage)
    return evaluator.judge(graph, p, volume, watched), ways, new, leverage, energy_std


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_call_judges_as_the_plain_definitions(known, dtype):
    potential = copy.deepcopy(known).to(dtype)
    monitor, evaluator, inside = Monitor(potential), CpuEvaluator(potential), 0
    rtol = 1e-6 if dtype == torch.float64 else 1e-2
    for name, build in STRUCTURES.items():
        found, ways, new, leverage, energy_std = judged(potential, build(), monitor, evaluator)
        assert found.inside == (ways == []), (name, ways)
        inside += found.inside
        np.testing.assert_allclose(found.leverage, leverage, rtol=rtol)
        assert found.energy_std == pytest.approx(energy_std, rel=rtol)
        np.testing.assert_allclose(found.forces_std[:, 1], monitor.uncertainty.force_std(found.leverage), rtol=1e-12)
        if not found.inside:
            for got, right in zip(found.new, new, strict=True):
                np.testing.assert_allclose(got, right, rtol=1e-3, atol=1e-3)
    assert 3 <= inside < len(STRUCTURES) - 1


LIMITS = {
    "neighbors": lambda w: np.full_like(w.neighbors, -1.0),
    "energy": lambda w: (w.energy[0] - 10.0, w.energy[0] - 9.0),
    "volume": lambda w: 1e6,
    "virial": lambda w: (1e3, 2e3),
    "force": lambda w: 1e-9,
    "leverage": lambda w: 1e-9,
    "crowding": lambda w: 1e3,
    "surroundings": lambda w: w.surroundings._replace(
        landscape=w.surroundings.landscape._replace(limits=(1e-9, math.inf, math.inf))
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_counts(known, name):
    monitor, evaluator, atoms = Monitor(known), CpuEvaluator(known), copper(1)
    graph = graph_from_atoms(atoms, known.cutoff)
    p, volume = evaluator(graph, stress=True), float(atoms.cell.volume)
    watched = monitor._watch(monitor.check.limits(graph.numbers))
    assert evaluator.judge(graph, p, volume, watched).inside
    assert not evaluator.judge(graph, p, volume, watched._replace(**{name: LIMITS[name](watched)})).inside
    assert evaluator.judge(graph, p, volume, watched).inside


@pytest.mark.parametrize("broken", ["energy", "forces", "stress", "features"])
def test_what_is_not_a_number_is_not_inside(known, broken):
    monitor, evaluator, atoms = Monitor(known), CpuEvaluator(known), copper(1)
    graph = graph_from_atoms(atoms, known.cutoff)
    p = evaluator(graph, stress=True)
    p = p._replace(**{broken: torch.full_like(getattr(p, broken), math.nan)})
    watched = monitor._watch(monitor.check.limits(graph.numbers))
    assert not evaluator.judge(graph, p, float(atoms.cell.volume), watched).inside


def test_the_virial_is_that_of_the_forces_where_there_is_no_cell(known):
    monitor, evaluator = Monitor(known), CpuEvaluator(known)
    graph = graph_from_atoms(stretched(), known.cutoff)
    p, watched = evaluator(graph), monitor._watch(monitor.check.limits(graph.numbers))
    virial, free = virial_of(graph, p, None), (-math.inf, math.inf)
    wide = watched._replace(energy=free, force=math.inf, leverage=math.inf, crowding=-1.0, surroundings=None)
    for span, inside in (((virial - 1e-6, virial + 1e-6), True), ((virial + 1e-6, math.inf), False)):
        assert evaluator.judge(graph, p, None, wide._replace(virial=span)).inside == inside


def test_what_lies_in_the_memory_of_another_structure_is_not_judged(known):
    """Pairs are those of the last evaluation, of a copy of the evaluator too: if these are of others, they are found
    again."""
    monitor, evaluator = Monitor(known), CpuEvaluator(known)
    graphs = [graph_from_atoms(atoms, known.cutoff) for atoms in (stretched(), molecule("CO"), copper(1).repeat(2))]
    watched = [monitor._watch(monitor.check.limits(g.numbers)) for g in graphs]
    ps = [evaluator(g) for g in graphs]
    expected = [found_after(lambda g=g: evaluator(g), evaluator, g, ps, k, watched) for k, g in enumerate(graphs)]
    for k, g in enumerate(graphs):
        for before in (evaluator, evaluator.without_core()):
            for other in graphs:
                assert found_after(lambda e=before, o=other: e(o), evaluator, g, ps, k, watched) == expected[k]


def found_after(first, evaluator, graph, ps, k, watched) -> tuple:
    first()
    strict = watched[k]._replace(crowding=1e9)  # to be told what is new
    found = evaluator.judge(graph, ps[k], None, strict)
    return found.inside, found.new.largest, found.new.crowding, found.leverage.tolist()


def test_the_calculator_keeps_a_copy_of_its_own(known):
    atoms = copper(1)
    atoms.calc = calculator = SEGNNCalculator(known, domain="ignore")
    atoms.get_forces()
    atoms.info["step"] = 1
    for n in range(2):  # only positions, then all else
        atoms.positions[0] += 0.01
        atoms.set_constraint(FixAtoms([n]))
        atoms.set_tags(np.full(len(atoms), n))
        first = calculator.atoms
        atoms.get_potential_energy()
        kept = calculator.atoms
        assert kept == atoms and kept is not first and kept.calc is None and first != atoms
        assert kept.info == {"step": 1} and kept.info is not atoms.info
        assert kept.constraints[0].index.tolist() == [n] and kept.constraints[0] is not atoms.constraints[0]
        assert kept.get_tags().tolist() == [n] * len(atoms)
        assert not any(np.shares_memory(kept.arrays[name], atoms.arrays[name]) for name in atoms.arrays)


@pytest.mark.parametrize("name", ["silicon-pbe", "acetylacetone-pbe"])
def test_a_landmark_that_is_known_says_no_less_than_the_newness(name):
    """Of atoms that move among landmarks, inside and out of what is known, with the pairs of the first structure."""
    potential = load_potential(name)
    known, cutoff = potential.domain.surroundings, potential.cutoff
    fast, rng = CompiledNewness(known, cutoff), np.random.default_rng(0)
    atoms = ase.io.read(shipped_potentials()[name].with_name("reference.xyz"), "0")
    graph = graph_from_atoms(atoms, cutoff)
    kind, vectors = potential.species_index[graph.numbers], edge_vectors(graph)
    first = torch.searchsorted(graph.edge_dst.contiguous(), torch.arange(len(kind) + 1))
    look, outside = fast.look(SortedPairs(kind, vectors, first, graph.edge_src)), 0
    for step in range(30):
        found = (fast.function(*look.given[1:], 1), look.found())[1]
        right, limits = newness(known, graph, kind, cutoff), known.landscape.limits
        assert (found.atoms >= right.atoms - 1e-3).all()
        inside = found.largest <= limits[0] and found.mean <= limits[1]
        assert inside == (right.largest <= limits[0] and right.mean <= limits[1]), step
        assert found.most >= right.most - 1e-3 and (found.most <= limits[2]) == (right.most <= limits[2]), step
        if step == 0 or not inside:
            np.testing.assert_allclose(found.atoms, right.atoms, rtol=1e-3, atol=1e-3)
        outside += not inside
        graph.positions.add_(torch.from_numpy(rng.normal(0, 0.05, (len(kind), 3))))
        vectors.copy_(edge_vectors(graph))
    assert 0 < outside < 30
