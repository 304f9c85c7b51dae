"""The network in compiled code against plain PyTorch with the same radial tables (T16)."""

import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet
from helpers.kernels import TOLERANCE, tabulated_twin
from helpers.potentials import LAYERS_ONLY, ODD_CASES, VARIANTS, everything_at_once, in_two_precisions, odd_potential
from helpers.systems import CUTOFF, NAMED, SPECIES

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled import cpu, cpu_evaluation
from segnn_ase.compiled.build import pointers
from segnn_ase.compiled.choose import choose_evaluator
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.network_steps import supported
from segnn_ase.compiled.steps import MatrixProduct
from segnn_ase.store.shipped import find_model
from segnn_ase.structure.graph import collate, graph_from_atoms

KNOWN = [v for v in VARIANTS if v not in LAYERS_ONLY]


def assert_equal(potential, graph, tolerance: float) -> None:
    """Energies, descriptors, edge gradients, forces and stress are those of the slow twin."""
    expected = tabulated_twin(potential)(graph, stress=True)
    evaluate = CpuEvaluator(potential)
    found, alone = evaluate(graph, stress=True), evaluate(graph, forces=False)
    assert torch.equal(alone.energies, found.energies) and torch.equal(alone.features, found.features)
    for name in ("energies", "features", "edge_gradients", "forces", "stress"):
        x, y = (getattr(r, name).nan_to_num().double() for r in (found, expected))
        size = max(float(y.abs().max()) if y.numel() else 0.0, 1e-3)
        assert not y.numel() or (x - y).abs().max() <= tolerance * size, name


@pytest.mark.parametrize(("variant", "dtype"), in_two_precisions(KNOWN))
def test_T16_compiled_network_equals_plain_torch(variant, dtype, new_potential):
    assert_equal(new_potential(variant, dtype), everything_at_once(), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ODD_CASES)
def test_T16_compiled_network_equals_plain_torch_for_odd_settings(name):
    assert_equal(odd_potential(name), everything_at_once(), 1e-10)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without large pages")
def test_large_pages_hold_the_same_and_are_of_one_process(new_potential, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 0)
    assert_equal(new_potential("fast"), everything_at_once(), 1e-10)
    evaluate = CpuEvaluator(new_potential("fast"))
    evaluate(everything_at_once())
    at = evaluate._held.memory.features.data_ptr()
    maps = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines())
    (rights,) = (r for span, r in maps if int(span.split("-")[0], 16) <= at < int(span.split("-")[1], 16))
    assert rights == "rw-p"  # not shared: a process that is forked has its own


@pytest.mark.parametrize("name", NAMED)
def test_T16_compiled_network_equals_plain_torch_on_each_structure(name, new_potential):
    assert_equal(new_potential("fast"), graph_from_atoms(NAMED[name](), CUTOFF), 1e-10)


@pytest.mark.parametrize("variant", LAYERS_ONLY)
def test_what_it_does_not_know_goes_layer_by_layer(variant, new_potential):
    potential = new_potential(variant)
    assert not supported(potential)
    evaluate = choose_evaluator(potential, graph_from_atoms(NAMED["ethanol"](), CUTOFF), "require")
    assert evaluate.name == "compiled layers"


@pytest.mark.parametrize("variant", ["fast", "uneven"])
def test_threads_agree(variant, new_potential, monkeypatch):
    graph = graph_from_atoms(NAMED["diamond"]().repeat((4, 2, 2)), CUTOFF)
    potential = new_potential(variant)
    alone, together = CpuEvaluator(potential), CpuEvaluator(potential)
    one = alone(graph, stress=True)
    monkeypatch.setattr(cpu_evaluation, "EDGES_PER_THREAD", 1)
    torch.set_num_threads(3)
    try:
        three = together(graph, stress=True)
    finally:
        torch.set_num_threads(1)
    assert (alone._held.c.threads, together._held.c.threads) == (1, 3)
    assert torch.equal(one.energies, three.energies)
    torch.testing.assert_close(one.forces, three.forces, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.stress, three.stress, atol=1e-12, rtol=0)


def test_a_molecule_wakes_no_second_thread(new_potential):
    evaluate = CpuEvaluator(new_potential("fast"))
    torch.set_num_threads(2)
    try:
        evaluate(graph_from_atoms(NAMED["ethanol"](), CUTOFF))
    finally:
        torch.set_num_threads(1)
    assert evaluate._held.c.threads == 1


def test_results_depend_on_no_call_before(new_potential):
    """Memory is kept and grows: after a large structure a small one has the same bits as before."""
    evaluate = CpuEvaluator(new_potential("segnn"))
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    first = evaluate(few)
    evaluate(many)
    again = evaluate(few)
    assert torch.equal(first.energies, again.energies) and torch.equal(first.forces, again.forces)


def test_one_evaluator_serves_several_python_threads(new_potential):
    """Compiled code lets go of the interpreter's lock; the memory is shared."""
    evaluate = CpuEvaluator(new_potential("fast"))
    graphs = [graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper", "ethanol", "diamond")]
    expected = [evaluate(g).forces for g in graphs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, right in zip(pool.map(lambda g: evaluate(g).forces, graphs), expected, strict=True):
                assert torch.equal(found, right)


def test_a_lonely_atom_has_exactly_its_reference_energy(new_potential):
    potential = new_potential("fast")
    graph = graph_from_atoms(NAMED["one_atom"](), CUTOFF)
    result = CpuEvaluator(potential)(graph)
    kind = SPECIES.index(int(graph.numbers[0]))
    assert float(result.energy) == potential.reference_energies[kind] and not bool(result.forces.any())


def test_unsorted_edges_give_the_same(new_potential):
    evaluate = CpuEvaluator(new_potential("fast"))
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    order = torch.randperm(len(graph.edge_src), generator=torch.Generator().manual_seed(0))
    shuffled = graph._replace(
        edge_src=graph.edge_src[order], edge_dst=graph.edge_dst[order], edge_shift=graph.edge_shift[order]
    )
    found, expected = evaluate(shuffled), evaluate(graph)
    torch.testing.assert_close(found.forces, expected.forces)
    torch.testing.assert_close(found.edge_gradients, expected.edge_gradients[order])


def test_a_snapshot_does_not_follow_the_potential(new_potential):
    """Changes in place, weights loaded into a part, another precision: what was made before stays what it was."""
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    for change in (
        lambda p: [w.data.mul_(1.5) for w in p.parameters()],
        lambda p: p.segnn.messages[1].load_state_dict(new_potential("fast", seed=5).segnn.messages[1].state_dict()),
        lambda p: p.to(torch.float32),
        lambda p: p.reference_energies.__setitem__(0, 99.0),
    ):
        potential = new_potential("fast")
        evaluate = choose_evaluator(potential, graph, "require")
        before = evaluate(graph)
        change(potential)
        after = evaluate(graph)
        assert torch.equal(before.energies, after.energies) and torch.equal(before.forces, after.forces)


def test_a_wrong_step_is_caught(new_potential, monkeypatch):
    """The sign of one path's weights is flipped in the compiled network only."""
    potential, make = new_potential("fast"), cpu_evaluation.make_steps

    def flipped(*given):
        network = make(*given)
        steps = network.segments[4].steps
        at, step = next((at, step) for at, step in enumerate(steps) if isinstance(step, MatrixProduct))
        steps[at] = replace(step, weight=replace(step.weight, scale=-step.weight.scale))
        return network

    monkeypatch.setattr(cpu_evaluation, "make_steps", flipped)
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    with pytest.warns(AccelerationWarning, match="network in C: not used, as .* differ by"):
        assert choose_evaluator(potential, graph).name == "compiled layers"  # they were right
    lonely, rattled = NAMED["one_atom"](), NAMED["ethanol"]()
    lonely.calc = rattled.calc = SEGNNCalculator(potential, accelerate="require")
    lonely.get_potential_energy()  # without neighbours there is nothing to compare
    with pytest.raises(AccelerationError, match="differ by"):
        rattled.get_potential_energy()
    contact = NAMED["ethanol"]()
    contact.positions[1] = contact.positions[0] + [0.3, 0, 0]
    with pytest.raises(AccelerationError, match="differ by"):
        choose_evaluator(potential, graph_from_atoms(contact, CUTOFF), "require")


def test_a_failed_allocation_leaves_nothing_half_made(new_potential, monkeypatch):
    evaluate = CpuEvaluator(new_potential("fast"))
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    expected, larger = evaluate(many).forces, collate([many] * 5)
    original = torch.zeros

    def failing(*shape, **keywords):
        if shape[0] > 10_000:  # all the memory of the passes
            raise RuntimeError("out of memory")
        return original(*shape, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(cpu.torch, "zeros", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(larger)
    evaluate(few)
    assert torch.equal(evaluate(many).forces, expected)


def test_memory_made_in_inference_mode_serves_later_calls(new_potential):
    evaluate = CpuEvaluator(new_potential("fast"))
    few, many = (graph_from_atoms(NAMED[n](), CUTOFF) for n in ("water", "copper"))
    with torch.inference_mode():
        evaluate(many, forces=False)
    evaluate(few)
    evaluate(many)


def test_an_address_keeps_its_tensor():
    """A contiguous copy that is made on the way must live until it has been read."""
    strided = torch.arange(10.0)[::2]
    array = pointers([strided, None])
    copy, _ = array.kept
    assert array[0] == copy.data_ptr() and array[1] is None and copy.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


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
    assert atoms.calc.evaluators == ("the network in C",)


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


def test_positions_that_are_not_numbers_are_not_taken_for_far_away():
    evaluate = CpuEvaluator(odd_potential("odd_channels"))
    graph = graph_from_atoms(NAMED["ethanol"](), CUTOFF)
    positions = graph.positions.clone()
    positions[3, 1] = float("nan")
    assert not torch.isfinite(evaluate(graph._replace(positions=positions)).energy).all()
    expected = evaluate(graph).energy
    rounded = evaluate(graph._replace(positions=graph.positions.float())).energy
    torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=1e-5)


def test_pairs_at_the_cutoff_do_not_upset_the_check():
    """Rounding may keep them on one path and not on another."""
    potential = odd_potential("odd_channels")
    atoms = bulk("Cu", "sc", a=CUTOFF / 2).repeat(3)
    for k in range(6):
        atoms.rotate(7.0 * (k + 1), (1, 2, 3 + k), rotate_cell=True)
        choose_evaluator(potential, graph_from_atoms(atoms, CUTOFF), "require")


@pytest.mark.slow
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
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # waiting costs no time
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3
