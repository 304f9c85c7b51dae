"""The network in compiled code against the same network layer by layer (T16), with the same radial tables."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet
from helpers.potentials import ODD, VARIANTS, everything_at_once, odd_potential
from helpers.systems import CUTOFF, NAMED, SPECIES

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled import cpu, kernels
from segnn_ase.compiled.choose import accelerate
from segnn_ase.compiled.cpu import Engine, panels
from segnn_ase.compiled.passes import make_plan, supported
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.store.shipped import find_model
from segnn_ase.structure.graph import collate, graph_from_atoms

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ONE_BLOCK = [v for v in VARIANTS if v not in ("uneven", "parities", "segnn2022")]


def tabulated(potential: Potential) -> Potential:
    potential.segnn.accelerate()
    potential.segnn.tabulate()
    return potential


def assert_equal(potential: Potential, graph, tolerance: float) -> None:
    """Energies, descriptors, edge gradients, forces and stress of the engine are those of the layers."""
    potential.compile_network(False)
    expected = predict(potential, graph, stress=True)
    assert potential.compile_network() and potential.engine is not None
    found = predict(potential, graph, stress=True)
    alone = predict(potential, graph, forces=False)
    assert torch.equal(alone.energies, found.energies) and torch.equal(alone.features, found.features)
    for name in ("energies", "features", "edge_gradients", "forces", "stress"):
        x, y = (getattr(r, name).nan_to_num().double() for r in (found, expected))
        size = max(float(y.abs().max()) if y.numel() else 0.0, 1e-3)
        assert not y.numel() or (x - y).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", ONE_BLOCK)
def test_T16_engine_equals_the_layers(variant, dtype, new_potential):
    assert_equal(tabulated(new_potential(variant, dtype)), everything_at_once(), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ODD)
def test_T16_engine_equals_the_layers_for_odd_settings(name):
    assert_equal(tabulated(odd_potential(name)), everything_at_once(), 1e-10)


@pytest.mark.parametrize("name", NAMED)
def test_T16_engine_equals_the_layers_on_each_structure(name, new_potential):
    assert_equal(tabulated(new_potential("fast")), graph_from_atoms(NAMED[name](), CUTOFF), 1e-10)


@pytest.mark.parametrize("variant", ["uneven", "parities", "segnn2022"])
def test_what_the_engine_does_not_know_is_left_to_the_kernels(variant, new_potential):
    potential = tabulated(new_potential(variant))
    assert not supported(potential) and not potential.compile_network() and potential.engine is None
    predict(potential, graph_from_atoms(NAMED["ethanol"](), CUTOFF))


def test_threads_agree(new_potential, monkeypatch):
    potential = tabulated(new_potential("fast"))
    graph = graph_from_atoms(NAMED["diamond"]().repeat((4, 2, 2)), CUTOFF)
    assert potential.compile_network()
    one = predict(potential, graph, stress=True)
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    torch.set_num_threads(3)
    try:
        three = predict(potential, graph, stress=True)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.energies, three.energies)
    torch.testing.assert_close(one.forces, three.forces, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.stress, three.stress, atol=1e-12, rtol=0)


def test_results_depend_on_no_call_before(new_potential):
    """Buffers are kept and grow: after a large structure a small one has the same bits as before."""
    potential = tabulated(new_potential("segnn"))
    assert potential.compile_network()
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    first = predict(potential, few)
    predict(potential, many)
    again = predict(potential, few)
    assert torch.equal(first.energies, again.energies) and torch.equal(first.forces, again.forces)
    predict(potential, many)
    assert torch.equal(first.forces, again.forces)  # results are no views of the buffers
    assert torch.equal(first.features, again.features)


def test_one_engine_serves_several_python_threads(new_potential):
    """Compiled code lets go of the interpreter's lock; the buffers are shared."""
    potential = tabulated(new_potential("segnn"))
    assert potential.compile_network()
    graphs = [graph_from_atoms(NAMED[name]().repeat(2), CUTOFF) for name in ("copper", "triclinic", "diamond")]
    expected = [predict(potential, graph).forces for graph in graphs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda graph: predict(potential, graph).forces, graphs * 20))
    assert all(torch.equal(f, expected[n % 3]) for n, f in enumerate(found))


def test_a_lonely_atom_has_exactly_its_reference_energy(new_potential):
    potential = tabulated(new_potential("fast"))
    assert potential.compile_network()
    graph = graph_from_atoms(NAMED["one_atom"](), CUTOFF)
    result = predict(potential, graph)
    kind = SPECIES.index(int(graph.numbers[0]))
    assert float(result.energy) == potential.reference_energies[kind] and not bool(result.forces.any())


def test_unsorted_edges_go_through_the_layers(new_potential):
    potential = tabulated(new_potential("fast"))
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    order = torch.randperm(len(graph.edge_src), generator=torch.Generator().manual_seed(0))
    shuffled = graph._replace(
        edge_src=graph.edge_src[order], edge_dst=graph.edge_dst[order], edge_shift=graph.edge_shift[order]
    )
    assert potential.compile_network()
    torch.testing.assert_close(predict(potential, shuffled).forces, predict(potential, graph).forces)


def test_training_copies_and_moves_leave_the_engine_behind(new_potential):
    potential = tabulated(new_potential("fast"))
    assert potential.compile_network()
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    expected = predict(potential, graph).forces
    for twin in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert twin._engine is None and twin.engine is not potential.engine
        assert torch.equal(predict(twin, graph).forces, expected)
    assert potential.train().engine is None and potential.eval().engine is None
    assert tabulated(potential).engine is None  # not the old one, with the old weights
    potential = tabulated(potential)
    assert potential.compile_network() and potential.to(torch.float32).engine is None


def test_a_wrong_step_is_caught(new_potential, monkeypatch):
    """The sign of one path's weights is flipped in the compiled network only."""
    potential = new_potential("fast")

    def flipped(of):
        plan = make_plan(of)
        step = plan.segments[2][0]
        plan.segments[2][0] = replace(step, weight=-step.weight)
        return plan

    monkeypatch.setattr(cpu, "make_plan", flipped)
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    with pytest.warns(AccelerationWarning, match="layer by layer: .* differ by"):
        assert accelerate(potential, graph, tables=True)
    assert potential.engine is None and potential.segnn.fused  # the layers were right
    lonely, rattled = NAMED["one_atom"](), NAMED["ethanol"]()
    lonely.calc = rattled.calc = SEGNNCalculator(potential, accelerate="require")
    lonely.get_potential_energy()  # without neighbours there is nothing to compare
    with pytest.raises(AccelerationError, match="differ by"):
        rattled.get_potential_energy()
    contact = NAMED["ethanol"]()
    contact.positions[1] = contact.positions[0] + [0.3, 0, 0]
    with pytest.raises(AccelerationError, match="differ by"):
        accelerate(potential, graph_from_atoms(contact, CUTOFF), "require", tables=True)


def test_weights_loaded_later_are_those_that_count(new_potential):
    potential, graph = tabulated(new_potential("fast")), graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    assert potential.compile_network()
    predict(potential, graph)
    other = new_potential("fast", seed=3)
    potential.load_state_dict(other.state_dict())
    assert potential.engine is None
    torch.testing.assert_close(predict(potential, graph).forces, predict(other, graph).forces)


def test_a_failed_allocation_leaves_nothing_half_made(new_potential, monkeypatch):
    potential = tabulated(new_potential("fast"))
    assert potential.compile_network()
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    expected, engine_ = predict(potential, many).forces, potential.engine
    larger = collate([many] * 5)
    original, calls = Engine._tensor, []

    def failing(self, buffer):
        calls.append(buffer)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return original(self, buffer)

    monkeypatch.setattr(Engine, "_tensor", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(potential, larger)
    assert engine_.capacity[0] < 0
    predict(potential, few)
    assert torch.equal(predict(potential, many).forces, expected)


def test_buffers_made_in_inference_mode_serve_later_calls(new_potential):
    potential = tabulated(new_potential("fast"))
    assert potential.compile_network()
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    with torch.inference_mode():
        predict(potential, many, forces=False)
    predict(potential, few)
    predict(potential, many)


def test_the_calculator_uses_it_and_learns_what_is_asked(new_potential):
    atoms = NAMED["ethanol"]()
    atoms.calc = SEGNNCalculator(new_potential("fast"), accelerate="require")
    plain = NAMED["ethanol"]()
    plain.calc = SEGNNCalculator(new_potential("fast"), accelerate="off")
    rng = np.random.default_rng(0)
    asked = [False, True, True, False, False]
    ready = [False, False, True, True, False]  # forces come with the energy if those before were asked for
    for forces, there in zip(asked, ready, strict=True):
        shift = rng.normal(scale=0.01, size=atoms.positions.shape)
        atoms.positions += shift
        plain.positions += shift
        assert atoms.get_potential_energy() == pytest.approx(plain.get_potential_energy(), abs=1e-6)
        assert ("forces" in atoms.calc.results) == there
        if forces:
            assert atoms.get_forces() == pytest.approx(plain.get_forces(), abs=1e-6)
    assert atoms.calc.potentials[0].engine is not None


def test_dynamics_is_that_of_plain_torch():
    """Acetylacetone at constant energy, float64: the same path, with the same fluctuation of the energy."""
    energies, ends = {}, {}
    for mode in ("require", "off"):
        atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "1")
        atoms.calc = SEGNNCalculator("acetylacetone-pbe", dtype="float64", accelerate=mode)
        atoms.set_momenta(np.random.default_rng(0).normal(scale=0.2, size=(len(atoms), 3)))
        dynamics, total = VelocityVerlet(atoms, 0.5 * units.fs), []
        for _ in range(60):
            dynamics.run(1)
            total.append(atoms.get_total_energy())
        energies[mode], ends[mode] = np.array(total), atoms.positions
    assert np.abs(energies["require"] - energies["off"]).max() < 1e-6
    assert np.ptp(energies["require"]) == pytest.approx(np.ptp(energies["off"]), rel=1e-3)
    assert np.abs(ends["require"] - ends["off"]).max() < 1e-6


@pytest.mark.parametrize("vectors", range(1, 40))
def test_panels_cover_all_columns(vectors):
    cut = panels(vectors)
    assert sum(cut) == vectors and max(cut) <= 4 and max(cut) - min(cut) <= 1


def test_positions_that_are_not_numbers_are_not_taken_for_far_away():
    potential = tabulated(odd_potential("odd_channels"))
    assert potential.compile_network()
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    positions = graph.positions.clone()
    positions[3, 1] = float("nan")
    assert not torch.isfinite(predict(potential, graph._replace(positions=positions)).energy).all()
    expected = predict(potential, graph).energy
    rounded = predict(potential, graph._replace(positions=graph.positions.float())).energy
    torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=1e-5)


def test_pairs_at_the_cutoff_do_not_upset_the_check():
    """Rounding may keep them on one path and not on another."""
    potential = odd_potential("odd_channels")
    atoms = bulk("Cu", "sc", a=CUTOFF / 2).repeat(3)
    for k in range(6):
        atoms.rotate(7.0 * (k + 1), (1, 2, 3 + k), rotate_cell=True)
        assert accelerate(potential, graph_from_atoms(atoms, CUTOFF), "require", tables=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("accelerate", ["auto", "off"])
def test_a_calculator_works_in_forked_processes(accelerate):
    """Threads of the parent do not follow there, and OpenMP would wait for them for ever."""
    code = f"""
import multiprocessing, torch
from ase.build import bulk
from segnn_ase import SEGNNCalculator
torch.set_num_threads(2)
calculator = SEGNNCalculator("silicon-pbe", accelerate={accelerate!r}, domain="ignore")

def energy(seed):
    atoms = bulk("Si", cubic=True, a=5.47).repeat(2)
    atoms.rattle(0.02, seed=seed)
    atoms.calc = calculator
    return atoms.get_potential_energy() + abs(atoms.get_forces()).sum()

here = [energy(seed) for seed in range(3)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    there = pool.map(energy, range(3))
print(max(abs(a - b) for a, b in zip(here, there)))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3
