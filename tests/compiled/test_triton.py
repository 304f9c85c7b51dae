"""The Triton kernels against plain PyTorch (T16), on a GPU where there is one and in Triton's interpreter elsewhere."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from ase import units
from ase.md.verlet import VelocityVerlet
from helpers.domains import characterized, contact, training_set
from helpers.kernels import (
    IRREPS,
    TOLERANCE,
    assert_close,
    assert_fused_message_is_the_slow_one,
    everything,
    random_edges,
)
from helpers.systems import CUTOFF, NAMED, SPECIES, ethanol, squeezed, tiny_cell, water

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationError, AccelerationWarning
from segnn_ase.compiled import build, choose, gpu_recording, kernels
from segnn_ase.compiled.choose import choose_evaluator
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.formulas import message
from segnn_ase.compiled.gpu_evaluation import GpuEvaluator
from segnn_ase.compiled.gpu_recording import RecordingEvaluator
from segnn_ase.compiled.gpu_training import GpuLossGradient
from segnn_ase.compiled.kernels import kernel
from segnn_ase.compiled.layers import FUSED
from segnn_ase.compiled.sorted_edges import sorted_edges
from segnn_ase.model.interactions import Message
from segnn_ase.model.irreps import parse_irreps, spherical_kinds
from segnn_ase.model.newness import newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator, PlainLossGradient
from segnn_ase.model.settings import model_config
from segnn_ase.structure.graph import collate, graph_from_atoms, with_pairs

pytest.importorskip("triton")
SHORT = 2.0  # Å: few edges, as the interpreter takes milliseconds for each


@pytest.fixture
def device(monkeypatch):
    """A GPU, or the CPU made to use Triton's interpreter."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)  # one program for the edges of a receiver, a few for atoms
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setattr(kernels, "runs_on_triton", lambda device: True)
    return torch.device("cpu")


TINY = {"lmax_attr": 1, "interactions": 1}  # where it is the recording that is tested


def small(hidden: str = "3x0e+3x1o", dtype=torch.float64, **settings) -> Potential:
    settings = {"lmax_attr": 2, "radial_hidden": (4,), "cutoff": SHORT, **settings}
    config = model_config(hidden_irreps=hidden, **settings)
    made = Potential(config, SPECIES, reference_energies=[-0.5, -1.25, 0.75, 2.0], scales=[1.0, 1.1, 0.9, 1.2])
    return made.to(dtype).eval()


def batch(*names: str, cutoff: float = SHORT):
    return collate([with_pairs(graph_from_atoms(NAMED[name](), cutoff)) for name in names])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "settings", "dtype"),
    [
        ("3x0e+3x1o", {}, torch.float64),
        pytest.param("3x0e+3x1o", {}, torch.float32, marks=pytest.mark.proof),
        ("2x0e+2x1o+2x2e", {"body_order": 2, "interactions": 1}, torch.float64),
        pytest.param("2x0e+2x1o+2x2e", {"body_order": 2}, torch.float64, marks=pytest.mark.proof),
        ("4x0e+2x1o", {}, torch.float32),
        ("3x0e+3x1o", {"message": "linear", "body_order": 1}, torch.float64),
    ],
)
def test_energies_forces_stress_and_gradient_of_a_loss(hidden, settings, dtype, device):
    model = small(hidden, dtype, **settings).to(device)
    graph = batch("water", "one_atom", "tiny_cell").to(device)
    expected = everything(model, graph)
    assert_close(everything(model, graph, FUSED), expected, TOLERANCE[dtype] * 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "settings"),
    [
        pytest.param("3x0e+3x1o", {}, marks=pytest.mark.proof),
        ("2x0e+2x1o+2x2e", {"body_order": 2, "interactions": 1}),
        pytest.param("4x0e+2x1o", {}, marks=pytest.mark.proof),
        ("3x0e+3x1o", {"message": "linear", "body_order": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that are none
def test_gradient_of_a_loss_by_all_passes(hidden, settings, device):
    """With fewer atoms than there is room for, with as many, recorded, and with more, for which room is made; with
    other weights each time, and after a loss that was no number."""
    model = small(hidden, **settings).requires_grad_(True).to(device)
    gradient = GpuLossGradient(model)
    for names in (("one_atom", "water"), ("one_atom",), ("water",), ("water", "one_atom", "tiny_cell"), ("tiny_cell",)):
        graph, found = batch(*names).to(device), []
        gradient(graph, lambda p: torch.nan * loss_of(p), forces=True, stress=True)
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.03)
        for way in (gradient, PlainLossGradient(model)):
            model.zero_grad(set_to_none=True)
            loss = way(graph, loss_of, forces=True, stress=True)
            found.append(
                {"loss": loss} | {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
            )
        assert_close(*found, 1e-9)


def loss_of(p):
    return p.energies.square().sum() + p.forces.square().sum() + p.stress.nan_to_num().square().sum()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("irreps", [irreps for irreps in IRREPS if "33" not in irreps and "20" not in irreps])
@pytest.mark.parametrize(("n_atoms", "n_edges"), [(4, 9), (3, 1), (2, 0), (0, 0)])
def test_message_unsorted_few_or_no_edges(irreps, n_atoms, n_edges, parts, device, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", n_atoms * parts)
    assert_fused_message_is_the_slow_one(irreps, n_atoms, n_edges, device=device)


@pytest.mark.parametrize("parts", [1, 2])
def test_first_and_second_derivatives_are_those_of_the_c_kernels(parts, device, monkeypatch):
    torch.manual_seed(0)
    layer = Message(parse_irreps("3x0e+3x1o"), spherical_kinds(1), linear=False, n_radial=2, hidden=(3,)).double()
    vectors, src, dst = random_edges(3, 5)
    topology = sorted_edges(vectors, src, dst, 3, cutoff=4.0, lmax=1, n_radial=2).topology
    c = layer.couplings[0]
    shapes = [(3, 1, 6), (3, 3, 6), (5, len(c.paths), 3), (5, 4), (5, 1), (2, c.paths_into(0), 3), (2, 3)]
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    run = kernel(message(c, 3, 1.3, 1.2))

    def derivatives(where):
        there = [x.to(where).requires_grad_() for x in inputs]
        out = run(type(topology)(*(x.to(where) if isinstance(x, torch.Tensor) else x for x in topology)), *there)
        first = torch.autograd.grad(sum(o.sin().sum() for o in out), there, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), there)
        return [x.detach().cpu() for x in (*out, *first, *second)]

    monkeypatch.setattr(kernels, "PROGRAMS", 3 * parts)
    found = derivatives(device)
    monkeypatch.setattr(kernels, "runs_on_triton", lambda device: False)
    for a, b in zip(found, derivatives("cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["3x0e+3x1o", "4x0e+2x1o"])
def test_network_is_that_of_the_cpu_and_pairs_beyond_the_cutoff_do_nothing(hidden, device):
    reference, evaluate = CpuEvaluator(small(hidden)), GpuEvaluator(small(hidden).to(device))
    for names in (("water", "one_atom", "tiny_cell"), ("one_atom",)):
        expected = reference(batch(*names), stress=True)
        for cutoff in (SHORT, 1.3 * SHORT):
            graph = batch(*names, cutoff=cutoff).to(device)
            found = evaluate(graph, stress=True)
            assert bool(found.close) == expected.close
            for name in ("energy", "energies", "forces", "stress", "features"):
                a, b = getattr(found, name).cpu(), getattr(expected, name)
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
            receivers = batch(*names).edge_dst
            assert torch.equal(found.neighbors.cpu(), torch.bincount(receivers, minlength=len(graph.numbers)))
            alone = evaluate(graph, forces=False)
            assert alone.forces is None
            torch.testing.assert_close(alone.energies.cpu(), expected.energies, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("spin_orbit", [False, True])
def test_cues_are_those_of_the_cpu_and_of_plain_pytorch(spin_orbit, device):
    """One by one, recorded, and in the gradient of a loss."""
    cues = [{"name": "initial_magmoms", "spin_orbit": spin_orbit}, "initial_charges"]
    model, rng = small(cues=cues, **TINY).requires_grad_(True), torch.Generator().manual_seed(0)
    graph = batch("water", "one_atom", "tiny_cell")
    graph = graph._replace(cues=torch.randn(len(graph.numbers), 4, generator=rng, dtype=torch.float64))
    expected = CpuEvaluator(model)(graph)
    model, graph = model.to(device), graph.to(device)
    recording = RecordingEvaluator(model, require=True)
    for found in (GpuEvaluator(model)(graph), *(recording(graph) for _ in range(3))):
        for name in ("energies", "forces", "cue_gradients"):
            a, b = getattr(found, name).cpu(), getattr(expected, name)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    gradients = []
    for way in (GpuLossGradient(model), PlainLossGradient(model)):
        model.zero_grad(set_to_none=True)
        way(graph, lambda p: loss_of(p) + p.cue_gradients.square().sum(), forces=True, stress=True)
        gradients.append({n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None})
    assert_close(*gradients, 1e-9)


@pytest.mark.slow
def test_charges_are_those_of_the_cpu_and_of_plain_pytorch(device):
    """Of crystals and molecules together, and in the gradient of a loss."""
    model = small(electrostatics="latent", cues=["charge"], **TINY).requires_grad_(True)
    graph = batch("water", "one_atom", "tiny_cell")
    told = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)[graph.batch]
    graph = graph._replace(cues=told[:, None])
    expected = CpuEvaluator(model)(graph, stress=True)
    model, graph = model.to(device), graph.to(device)
    found = GpuEvaluator(model)(graph, stress=True)
    for name in ("energies", "forces", "stress", "charges", "cue_gradients"):
        a, b = getattr(found, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    gradients = []
    for way in (GpuLossGradient(model), PlainLossGradient(model)):
        model.zero_grad(set_to_none=True)
        way(graph, lambda p: loss_of(p) + p.cue_gradients.square().sum(), forces=True, stress=True)
        gradients.append({n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None})
    assert_close(*gradients, 1e-9)


@pytest.mark.slow
def test_pairs_in_the_core_are_those_of_plain_pytorch(device):
    """With the gradients of pairs, which the recorded step leaves out and `pairwise` has."""
    model, crowd = small(), graph_from_atoms(squeezed()[0], SHORT)
    step = RecordingEvaluator(model.to(device), require=True)
    expected = PlainEvaluator(small())(crowd, stress=True)
    found, g = step(crowd.to(device), stress=True), step.pairwise(crowd.to(device))
    assert bool(found.close)
    for a, b in ((found.energies, expected.energies), (found.forces, expected.forces), (g, expected.edge_gradients)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.slow
def test_newness_is_that_of_plain_pytorch_also_where_it_is_recorded(device):
    model = characterized(small(**TINY, cutoff=3.0), training_set()).to(device)
    step, known = RecordingEvaluator(model, require=True), model.domain.surroundings
    for k, atoms in enumerate([*training_set()[:3], contact()]):
        graph = graph_from_atoms(atoms, CUTOFF).to(device)
        kind = model.species_index[graph.numbers]
        step(graph)
        found, expected = step.newness(graph, kind, known), newness(known, graph, kind, 3.0)
        assert (step._newness is not None) == (k > 0)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_is_recorded_serves_other_structures(device, monkeypatch):
    """Moving atoms, other pairs, other elements, more pairs than there is room for, other numbers of atoms."""
    model = small(**TINY).to(device)
    step, plain = RecordingEvaluator(model, require=True), GpuEvaluator(model)
    recordings = []
    monkeypatch.setattr(gpu_recording, "HEADROOM", 1.0)
    pad = gpu_recording.padded  # once for a recording, with and without the core
    monkeypatch.setattr(gpu_recording, "padded", lambda *given: recordings.append(given) or pad(*given))
    rng = np.random.default_rng(0)
    atoms = water()
    for k, n_recordings in enumerate((0, 1, 1, 2, 2, 3, 3, 4, 4, 4)):
        atoms.positions += rng.normal(0, 0.02, (len(atoms), 3))
        if k == 2:
            atoms.numbers[0] = 6
        if k == 6:
            atoms = tiny_cell()
        graph = graph_from_atoms(atoms, 2.6 if k == 3 else 1.2).to(device)  # k = 3: more pairs than there is room for
        wanted = {"forces": k != 8, "stress": k in (4, 5, 6, 7)}
        found, expected = step(graph, **wanted), plain(graph, **wanted)
        assert bool(found.close) == bool(expected.close)
        for name in ("energy", "energies", "forces", "stress", "features", "neighbors"):
            a, b = getattr(found, name), getattr(expected, name)
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
        assert len(recordings) == n_recordings, k
    step(graph, **wanted)
    with pytest.raises(ValueError, match="not of"):
        step(graph._replace(numbers=graph.numbers + 40), **wanted)


@pytest.mark.slow
def test_a_recording_that_was_interrupted_is_not_used(device, monkeypatch):
    model = small(**TINY).to(device)
    step, record, plain = RecordingEvaluator(model), RecordingEvaluator._record, GpuEvaluator(model)

    def graph(shift: float):
        atoms = water()
        atoms.positions[0, 0] += shift
        return graph_from_atoms(atoms, 1.8).to(device)

    for _ in range(2):
        step(graph(0.0))
    monkeypatch.setattr(RecordingEvaluator, "_record", lambda *wanted: 1 / 0)
    step(graph(0.0), forces=False)
    with pytest.raises(ZeroDivisionError):
        step(graph(0.0), forces=False)
    monkeypatch.setattr(RecordingEvaluator, "_record", record)
    for shift in (0.1, 0.2):
        torch.testing.assert_close(step(graph(shift)).forces, plain(graph(shift)).forces, rtol=0, atol=1e-10)


@pytest.fixture
def chosen(device, monkeypatch):
    """Lets the code for a GPU be chosen, also where there is none."""
    if device.type == "cpu":  # the interpreter takes long for each pair
        samples = choose.samples
        monkeypatch.setattr(choose, "samples", lambda *given: samples(*given)[:1])
    first, *others = choose.BACKENDS
    monkeypatch.setattr(choose, "BACKENDS", (first._replace(fits=lambda p, tables: True), *others))


@pytest.mark.slow
def test_dynamics_is_that_of_the_cpu(device, chosen, monkeypatch):
    model, paths = small(**TINY), []
    for accelerate in ("off", "require"):
        atoms = water()
        where = str(device) if accelerate == "require" else "cpu"
        atoms.calc = SEGNNCalculator(model, device=where, accelerate=accelerate, neighbor_backend="matscipy")
        atoms.set_velocities(np.random.default_rng(0).normal(0, 0.05, (len(atoms), 3)))
        VelocityVerlet(atoms, 0.5 * units.fs).run(5)
        paths.append(np.concatenate([atoms.positions, atoms.get_forces()]))
    assert atoms.calc.evaluators == ("the network by Triton, recorded",)
    np.testing.assert_allclose(*paths, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_recording_that_fails_is_left_out(device, chosen, monkeypatch):
    def fails(*args, **keywords):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_recording.RecordingEvaluator, "_record", fails)
    atoms = water()
    atoms.calc = SEGNNCalculator(small(**TINY), device=str(device), accelerate="require")
    atoms.get_forces()
    atoms.positions[0, 0] += 0.01
    with pytest.raises(AccelerationError, match=r"cannot be recorded.*stream is capturing"):
        atoms.get_forces()
    atoms.calc = SEGNNCalculator(small(**TINY), device=str(device))
    atoms.get_forces()
    atoms.positions[0, 0] += 0.01
    with pytest.warns(AccelerationWarning, match=r"started one by one.*stream is capturing"):
        assert np.isfinite(atoms.get_forces()).all()


@pytest.mark.parametrize("what", ["sign", "absent"])
def test_a_broken_or_missing_kernel_falls_back(what, device, chosen, monkeypatch):
    model, graph = small().to(device), batch("water").to(device)
    expected = PlainEvaluator(model)(graph).forces
    if what == "sign":
        write = kernels.triton_source

        def flipped(operation, order):
            source = write(operation, order)
            return source.replace(" * in", " * -in").replace(" + r", " - r", 1).replace(" + v", " - v", 1)

        monkeypatch.setattr(kernels, "triton_source", flipped)
        reason = "differ by"
    else:
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
        reason = "Triton is not installed"
    kernel.cache_clear()
    with pytest.warns(AccelerationWarning, match=reason):
        evaluate = choose_evaluator(model, graph, tables=False)
    assert evaluate.name == "plain PyTorch"
    torch.testing.assert_close(evaluate(graph).forces, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_evaluator(model, graph, "off").name == "plain PyTorch"
    kernel.cache_clear()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from segnn_ase.compiled import formulas
from segnn_ase.compiled.build import load_triton
from segnn_ase.model.interactions import Message, SelfProduct
from segnn_ase.model.irreps import parse_irreps, spherical_kinds
from segnn_ase.compiled.triton_code import triton_source

irreps = parse_irreps("3x0e+3x1o")
coupling = Message(irreps, spherical_kinds(1), linear=False, n_radial=2, hidden=(3,)).couplings[0]
product = SelfProduct(irreps, 3)
made = [
    formulas.message(coupling, 3, 1.3, 1.2, tabulated=True),
    formulas.message(coupling, 3, 1.3, 1.2),
    formulas.self_product((product.square[0], product.cube[0]), 3, product.scales),
]
for operation in made:
    for order in (0, 1) if operation is made[0] else (0, 1, 2, "tangent", "dual"):
        kernel = load_triton(triton_source(operation, order))
        for number in ("*fp32", "*fp64"):
            types = {"n": "i32", **dict.fromkeys(("first", "src", "pair", "knot"), "*i64")}
            signature = {name: types.get(name, number) for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs={})
            options = {"num_warps": 1, "maxnreg": 128}
            compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
            assert f".visible .entry {operation.name}_{order}" in compiled.asm["ptx"]
"""


@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_takes(tmp_path):
    """Compiled for a GPU that need not be there: the interpreter is not strict about types."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "SEGNN_ASE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["water-pbe0", "acetylacetone-pbe"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_500_replayed_steps_are_those_without_recording(name, dtype):
    paths = []
    for captured_steps in (True, False):
        atoms = ethanol() if name == "acetylacetone-pbe" else NAMED["water"]()
        atoms.calc = SEGNNCalculator(name, device="cuda", dtype=dtype, accelerate="require")
        atoms.get_forces()
        if not captured_steps:
            atoms.calc._evaluators = [GpuEvaluator(atoms.calc.potentials[0])]
        atoms.set_velocities(np.random.default_rng(0).normal(0, 0.01, (len(atoms), 3)))
        VelocityVerlet(atoms, 0.5 * units.fs).run(500)
        paths.append(atoms.positions)
    np.testing.assert_allclose(*paths, rtol=0, atol=1e-8 if dtype == "float64" else 1e-3)
