"""What the guard of compiled code notices: kernels with one wrong constant, as a faulty compiler would make them."""

import ctypes
import re
from itertools import count

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces
from helpers.systems import water

from segnn_ase import SEGNNCalculator, load_potential
from segnn_ase.base.errors import AccelerationWarning
from segnn_ase.compiled import build, cache, choose, runtime
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.guard import difference
from segnn_ase.model import interactions, network
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.model.settings import model_config
from segnn_ase.structure.graph import edge_vectors, graph_from_atoms, with_pairs

CONSTANT = re.compile(r"\(\(T\)\(?(-?[0-9][0-9.e+-]*)\)?\)")
NUMBER = count()


def perfect_crystal() -> Atoms:
    return bulk("Si", a=5.468, cubic=True)


def dimer() -> Atoms:
    return Atoms("Si2", [[0.0, 0.0, 0.0], [0.0, 0.0, 2.3]])


def liquid() -> Atoms:
    atoms = bulk("Si", a=5.468, cubic=True).repeat(2)
    atoms.rattle(0.6, seed=1)
    return atoms


FIRST = (perfect_crystal, dimer, liquid)


class Compiler:
    """Compiles what it is asked for, but one constant of one source, of all in order, wrongly."""

    def __init__(self, folder, load):
        self.folder, self.load, self.sources, self.wrong = folder, load, [], None
        self.compiled: dict[str, ctypes.CDLL] = {}  # of the wrong ones

    def __call__(self, source: str) -> ctypes.CDLL:
        if source not in self.sources:
            self.sources.append(source)
        if self.wrong is None or source != self.sources[self.wrong[0]]:
            return self.load(source)
        _, place, change = self.wrong
        found = list(CONSTANT.finditer(source))[place]
        source = f"{source[: found.start()]}((T)({float(change) * float(found.group(1))!r})){source[found.end() :]}"
        if source not in self.compiled:
            folder = self.folder / str(next(NUMBER))
            folder.mkdir()
            self.compiled[source], _ = build._compile(source, folder)
        return self.compiled[source]


def noticed(potential, graph) -> bool:
    runtime.load_runtime.cache_clear()
    try:
        return choose._problem_of(CpuEvaluator(potential), choose.BACKENDS[1], potential, graph) is not None
    except cache.CompilerError:  # it does not give what its formula gives
        return True


def forces_of(potential, atoms: Atoms) -> torch.Tensor:
    runtime.load_runtime.cache_clear()
    return CpuEvaluator(potential)(graph_from_atoms(atoms, potential.cutoff)).forces


@pytest.mark.parametrize(
    "kernels", [pytest.param(6, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.proof)]
)
def test_a_kernel_with_one_wrong_constant_is_noticed(kernels, monkeypatch, tmp_path):
    potential = load_potential("silicon-pbe", dtype="float32")
    graphs = [graph_from_atoms(make(), potential.cutoff) for make in FIRST]
    compiler = Compiler(tmp_path, build.load_library)
    for module in (build, runtime):
        monkeypatch.setattr(module, "load_library", compiler)
    try:
        assert not any(noticed(potential, graph) for graph in graphs)
        places = [(k, n) for k, source in enumerate(compiler.sources) for n in range(len(CONSTANT.findall(source)))]
        rng = np.random.default_rng(0)
        right = forces_of(potential, liquid())
        harmful = 0
        for k, n in rng.permutation(places).tolist():
            compiler.wrong = (k, n, rng.choice([-1.0, 1.1]))
            with monkeypatch.context() as patch:
                patch.setattr(build, "_check", lambda *_: None)
                wrong = forces_of(potential, liquid())
            found = [noticed(potential, graph) for graph in graphs]
            if torch.equal(wrong, right):  # the gradient of a constant, say
                continue
            assert all(found), (compiler.wrong, dict(zip((f.__name__ for f in FIRST), found, strict=True)))
            harmful += 1
            if harmful == kernels:
                break
        assert harmful == kernels
    finally:
        runtime.load_runtime.cache_clear()


def test_a_structure_of_another_kind_is_compared_as_it_is(new_potential):
    """Molecules, too: the atoms thrown together do not replace those of the user."""
    potential = new_potential("fast")
    own, moved, thrown = (x.graph for x in choose.samples(potential, graph_from_atoms(water(), potential.cutoff)))
    assert own.numbers.equal(moved.numbers) and not own.positions.equal(moved.positions)
    assert set(thrown.numbers.tolist()) == set(potential.species) and len(thrown.edge_src) >= 40


@pytest.mark.parametrize("wild, distance", [(choose.WILD, choose.DISPLACED[0]), (0.0, choose.DISPLACED[-1])])
def test_atoms_are_displaced_less_where_forces_explode(new_potential, monkeypatch, wild, distance):
    """There rounding decides, and code that is right would be refused."""
    monkeypatch.setattr(choose, "WILD", wild)
    potential = new_potential("fast")
    own, moved, _ = (x.graph for x in choose.samples(potential, graph_from_atoms(water(), potential.cutoff)))
    ratio = (moved.positions - own.positions).square().mean().sqrt() / distance
    assert 0.5 < float(ratio) < 1.5


def test_virials_are_held_against_the_sum_of_their_terms():
    """In a perfect crystal these are alike, and so is their rounding, which adds up."""
    potential = Potential(model_config("schnet", cutoff=5.0, core_repulsion=False), [29], scales=[1e-3]).float()
    graph = with_pairs(graph_from_atoms(bulk("Cu", cubic=True).repeat(2), potential.cutoff))
    potential.calibrate(graph)
    sample = choose.samples(potential, graph)[0]
    found = choose._quantities_of(PlainEvaluator(potential), sample)
    g = PlainEvaluator(potential)(graph, stress=True).edge_gradients
    terms = float((edge_vectors(graph).norm(dim=1) * g.norm(dim=1)).sum())
    assert found["virial"].size == pytest.approx(terms, rel=1e-5)
    off = {"virial": found["virial"]._replace(value=found["virial"].value + 2e-5 * terms)}
    told = difference(off, lambda: found, found, 1e-5)
    assert told is not None and "virial differ by 2.0e-05" in told


def test_a_changed_layer_works_at_once_in_plain_torch(new_potential, monkeypatch):
    """One file changed, `model/interactions.py`: compiled code, which does not know it, is refused."""
    plain = interactions.received_by_steps

    def twice(message, pair, edges):
        return [tuple(2.0 * x for x in block) for block in plain(message, pair, edges)]

    monkeypatch.setattr(network, "PLAIN", network.PLAIN._replace(message=twice))
    atoms = water()
    atoms.calc = SEGNNCalculator(new_potential("fast"))
    with pytest.warns(AccelerationWarning, match="not used, as .* differ"):
        forces = atoms.get_forces()
    assert atoms.calc.evaluators == ("plain PyTorch",)
    assert np.abs(calculate_numerical_forces(atoms, eps=1e-5) - forces).max() < 1e-6
