"""The fused kernels against plain PyTorch (T16), their cache, and the guard that switches them on."""

import threading
import warnings

import pytest
import torch
from helpers.kernels import (
    IRREPS,
    TOLERANCE,
    assert_close,
    assert_fused_message_is_the_slow_one,
    everything,
    random_edges,
)
from helpers.potentials import VARIANTS, in_two_precisions
from helpers.systems import NAMED

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationError, AccelerationWarning, ConfigError
from segnn_ase.compiled import build, c_code, kernels, runtime
from segnn_ase.compiled.build import load_library
from segnn_ase.compiled.cache import CompilerError
from segnn_ase.compiled.choose import choose_evaluator
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.cpu_training import CpuLossGradient
from segnn_ase.compiled.formulas import message, self_product
from segnn_ase.compiled.kernels import Topology, kernel
from segnn_ase.compiled.layers import FUSED
from segnn_ase.compiled.sorted_edges import sorted_edges
from segnn_ase.compiled.splines import DEGREE, spline_pieces, tabulate
from segnn_ase.model.interactions import Message, SelfProduct
from segnn_ase.model.irreps import parse_irreps, spherical_kinds
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.structure.graph import collate, fragment, graph_from_atoms, with_pairs


@pytest.mark.parametrize(("variant", "dtype"), in_two_precisions(VARIANTS))
def test_T16_fast_path_equals_slow_twin(variant, dtype, new_potential):
    potential = new_potential(variant, dtype)
    graph = collate([with_pairs(graph_from_atoms(make(), potential.cutoff)) for make in NAMED.values()])
    expected = everything(potential, graph)
    # a sum of many squares of forces of 1e3 eV/Å: the gradient loses two digits more in float32
    found = everything(potential, graph, FUSED)
    gradient = {"gradient": found.pop("gradient")}, {"gradient": expected.pop("gradient")}
    assert_close(found, expected, TOLERANCE[dtype])
    assert_close(*gradient, TOLERANCE[dtype] * 10)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_agree(threads, new_potential, monkeypatch):
    potential = new_potential("uneven")
    graph = collate([with_pairs(graph_from_atoms(make(), potential.cutoff)) for make in NAMED.values()])
    expected = everything(potential, graph)
    monkeypatch.setattr(kernels, "WORK_PER_THREAD", 1)
    torch.set_num_threads(threads)
    try:
        assert_close(everything(potential, graph, FUSED), expected, 1e-10)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("linear", [False, True], ids=["steerable", "linear"])
@pytest.mark.parametrize("irreps", IRREPS)
@pytest.mark.parametrize(("n_atoms", "n_edges"), [(6, 25), (3, 1), (4, 0), (0, 0)])
def test_message_unsorted_few_or_no_edges(irreps, linear, n_atoms, n_edges):
    assert_fused_message_is_the_slow_one(irreps, n_atoms, n_edges, linear=linear)


def test_message_first_and_second_derivatives():
    torch.manual_seed(0)
    layer = Message(parse_irreps("3x0e+3x1o"), spherical_kinds(1), linear=False, n_radial=2, hidden=(3,)).double()
    vectors, src, dst = random_edges(3, 5)
    edges = sorted_edges(vectors, src, dst, 3, cutoff=4.0, lmax=1, n_radial=2)
    c = layer.couplings[0]
    shapes = [(3, 1, 6), (3, 3, 6), (5, len(c.paths), 3), (5, 4), (5, 1), (2, c.paths_into(0), 3), (2, 3)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    run = kernel(message(c, 3, 1.3, 1.2))

    def function(*tensors):
        return run(edges.topology, *tensors)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_self_product_first_and_second_derivatives(bound):
    torch.manual_seed(0)
    layer = SelfProduct(parse_irreps("2x0e+2x1o"), 3, bound).double()
    couplings = (layer.square[0], layer.cube[0])
    shapes = [(2, 1, 2), (2, 3, 2), *((len(c.paths), 2) for c in couplings)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    run = kernel(self_product(couplings, 2, layer.scales, bound))

    def function(*tensors):
        return run(Topology(2), *tensors)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gate_is_accurate_and_finite_for_any_argument(dtype):
    """The kernels' own logistic function, through a message whose bias is the argument."""
    c = Message(parse_irreps("8x0e"), spherical_kinds(0), linear=False, n_radial=1, hidden=(1,)).couplings[0]
    run = kernel(message(c, 8, 1.0, 1.0))
    topology = Topology(1, torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0]))
    one = torch.ones(1, 1, dtype=dtype)
    zero = torch.zeros(1, 1, 16, dtype=dtype)
    for x in (0.0, 1e-30, 0.3, -0.3, 5.0, -5.0, 19.0, -19.0, 90.0, -90.0, 1e4, -1e4):
        bias = torch.full((1, 8), x, dtype=dtype)
        (y,) = run(topology, zero, one[:, :, None].expand(1, 1, 8), one, one, one.expand(1, 8)[:, None], bias)
        expected = torch.nn.functional.silu(bias.double())
        assert float((y.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * max(
            float(expected.abs().max()), 1e-3
        )


def test_tables_reproduce_the_radial_functions_and_their_slopes():
    def rough(d):
        return torch.sin(torch.cat([3 * d, 20 * d], 1)) + torch.exp(-d)

    tables = tabulate([rough], 5.0, 1e-8)
    (c,) = tables.coefficients
    assert tables.error <= 1e-8
    d = torch.linspace(0, 5 - 1e-9, 999, dtype=torch.float64)[:, None].requires_grad_()
    place = (d.detach() / tables.step).long()
    t = d / tables.step - place
    powers = torch.cat([t**n for n in range(DEGREE + 1)], 1)
    weights = powers @ torch.from_numpy(spline_pieces()).T
    found = sum(weights[:, q, None] * c[place[:, 0] + q] for q in range(DEGREE + 1))
    torch.testing.assert_close(found, rough(d), rtol=0, atol=1e-8)
    for k in range(2):
        (slope,) = torch.autograd.grad(found[:, k].sum(), d, retain_graph=True)
        (expected,) = torch.autograd.grad(rough(d)[:, k].sum(), d)
        torch.testing.assert_close(slope, expected, rtol=0, atol=2e-7)


def test_functions_too_rough_for_a_table_are_refused():
    with pytest.raises(ValueError, match="too rough"):
        tabulate([lambda d: torch.sin(1e4 * d)], 5.0, 1e-8)


@pytest.mark.parametrize("variant", ["segnn", "uneven", "tfn", "schnet"])
def test_tables_change_little_and_forces_stay_the_gradient(variant, new_potential):
    potential = new_potential(variant).requires_grad_(False)
    graph = graph_from_atoms(NAMED["triclinic"](), potential.cutoff)
    expected, evaluate = PlainEvaluator(potential)(graph, stress=True), CpuEvaluator(potential)
    found = evaluate(graph, stress=True)
    size = float(expected.forces.abs().max())
    assert float((found.forces - expected.forces).abs().max()) < 1e-7 * size
    assert float((found.energies - expected.energies).abs().max()) < 1e-8
    # the tabulated energy has exactly the forces that are given: central differences
    h = 1e-5
    for atom, axis in ((0, 0), (1, 2)):
        shifted = []
        for sign in (1, -1):
            positions = graph.positions.clone()
            positions[atom, axis] += sign * h
            shifted.append(float(evaluate(graph._replace(positions=positions), forces=False).energy[0]))
        force = -(shifted[0] - shifted[1]) / (2 * h)
        assert abs(force - float(found.forces[atom, axis])) < 1e-6 * max(size, 1.0)


def test_pairs_join_both_directions(small_potential):
    for make in NAMED.values():
        graph = with_pairs(graph_from_atoms(make(), 4.0))
        i, j, s, pair = graph.edge_dst, graph.edge_src, graph.edge_shift, graph.edge_pair
        other = (i == j[pair]) & (j == i[pair]) & (s == -s[pair]).all(1)
        same = (i == i[pair]) & (j == j[pair]) & (s == s[pair]).all(1)
        assert bool((same | other).all())
        assert len(torch.unique(pair)) * 2 == len(pair)


def test_fragment_is_a_connected_part_of_the_structure():
    graph = graph_from_atoms(NAMED["diamond"]().repeat((2, 2, 2)), 4.0)
    part = fragment(graph, 10)
    assert len(part.numbers) == min(10, len(graph.numbers))
    assert len(part.edge_src) > 0
    assert int(part.edge_src.max()) < len(part.numbers)


def test_guard_falls_back_and_says_what_differs(new_potential, monkeypatch):
    potential = new_potential("segnn")
    graph = graph_from_atoms(NAMED["ethanol"](), potential.cutoff)
    original = kernels.Kernel.run

    def wrong(self, *arguments):
        first, *others = original(self, *arguments)
        return (first * 1.001, *others)

    monkeypatch.setattr(kernels.Kernel, "run", wrong)
    with pytest.warns(AccelerationWarning, match="compiled layers: not used, as .* differ by"):
        assert choose_evaluator(potential, graph, tables=False).name == "plain PyTorch"
    with pytest.raises(AccelerationError, match="differ by"):
        choose_evaluator(potential, graph, "require", tables=False)


def test_without_a_compiler_plain_torch_does_the_work(new_potential, monkeypatch, tmp_path):
    potential = new_potential("uneven", torch.float64, 1)
    atoms = NAMED["ethanol"]()
    atoms.calc = SEGNNCalculator(potential, accelerate="off")
    expected = atoms.get_potential_energy()
    monkeypatch.setenv("SEGNN_ASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    forget_compiled_code()
    atoms.calc = SEGNNCalculator(potential)
    with pytest.warns(AccelerationWarning, match="no C compiler"):
        assert atoms.get_potential_energy() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        atoms.rattle(0.01)
        atoms.get_potential_energy()
    atoms.calc = SEGNNCalculator(potential, accelerate="require")
    with pytest.raises(AccelerationError, match="no C compiler"):
        atoms.get_potential_energy()


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CC", "/no/such/cc -m64")
    with pytest.raises(CompilerError, match="CC is '/no/such/cc -m64'"):
        build.compiler()


def test_overlapping_atoms_do_not_fool_the_guard(new_potential):
    """Energies of thousands of eV differ by more than those of a sound structure, not relative to their size."""
    atoms = NAMED["ethanol"]()
    atoms.positions[1] = atoms.positions[0] + [0.4, 0, 0]
    potential = new_potential("segnn", torch.float32)
    assert choose_evaluator(potential, graph_from_atoms(atoms, potential.cutoff), "require").name == "the network in C"


def test_bad_mode_is_refused(new_potential):
    with pytest.raises(ConfigError, match="accelerate is 'always'"):
        SEGNNCalculator(new_potential("segnn"), accelerate="always")


def test_cache_survives_damage_and_missing_rights(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGNN_ASE_CACHE", str(tmp_path))
    assert load_library("int answer(void) { return 41; }").answer() == 41
    (library,) = tmp_path.glob("*.so")
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:100])
    assert load_library("int answer(void) { return 41; }").answer() == 41
    with pytest.raises(CompilerError, match="does not compile"):
        load_library("int answer(void) { return }")
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]
    monkeypatch.setenv("SEGNN_ASE_CACHE", str(tmp_path / next(tmp_path.glob("*.so")).name / "below"))
    with pytest.raises(CompilerError, match="cannot be kept"):
        load_library("int answer(void) { return 42; }")


@pytest.mark.parametrize("make", [CpuEvaluator, CpuLossGradient])
def test_only_the_compiler_runs_in_threads(make, new_potential, monkeypatch):
    """In a process that was forked, PyTorch fails when two new threads enter it at once."""
    forget_compiled_code()
    threads, derive = set(), c_code.derive
    monkeypatch.setattr(c_code, "derive", lambda *given: threads.add(threading.get_ident()) or derive(*given))
    make(new_potential("segnn"))
    assert threads == {threading.get_ident()}


def forget_compiled_code() -> None:
    """What this process has loaded and derived."""
    for cached in (kernels.kernel, c_code.c_source, runtime.load_runtime):
        cached.cache_clear()
