"""A GPU gives what the CPU gives: shipped potentials, fields, properties, time-steppers, training.

Kernels: compiled/test_triton.py.
"""

import itertools
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from helpers.frames import water_frames
from helpers.kernels import assert_close
from helpers.systems import NAMED, rattled
from helpers.trainings import configured, history

from segnn_ase import SEGNNCalculator
from segnn_ase.compiled.gpu_training import GpuLossGradient
from segnn_ase.compiled.layers import FUSED
from segnn_ase.dynamics.settings import STEPPERS, stepper_config
from segnn_ase.dynamics.stepper import Scales, TimeStepper
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainLossGradient
from segnn_ase.model.settings import model_config
from segnn_ase.properties import PropertyModel
from segnn_ase.properties.targets import Target
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import collate, graph_from_atoms, with_pairs
from segnn_ase.train import loop
from segnn_ase.train.start import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SHIPPED = {
    "acetylacetone-pbe": lambda: rattled(NAMED["ethanol"](), stdev=0.05),
    "water-pbe0": lambda: rattled(NAMED["water"](), stdev=0.05),
    "silicon-pbe": lambda: rattled(bulk("Si", cubic=True, a=5.47).repeat(2), stdev=0.1),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_potentials_are_those_of_the_cpu(name, dtype):
    """Both against the other; twice running, so that the second step on the GPU is a recorded one."""
    results = {}
    for device in ("cpu", "cuda"):
        atoms = SHIPPED[name]()
        atoms.calc = SEGNNCalculator(name, device=device, dtype=dtype, accelerate="require", domain="ignore")
        for _ in range(3):
            atoms.positions[0, 0] += 0.01
            atoms.get_forces()
        results[device] = atoms.calc.results
    assert atoms.calc.evaluators == ("the network by Triton, recorded",)
    for key in ("energies", "forces", "stress"):
        if key in results["cpu"]:
            a, b = results["cuda"][key], results["cpu"][key]
            scale = max(1.0, np.abs(b).max()) if key != "stress" else max(0.01, np.abs(b).max())
            assert np.abs(a - b).max() <= TOLERANCE[dtype] * scale, key


@pytest.mark.parametrize("preset", ["fast", "segnn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_of_a_loss_is_that_of_the_cpu(preset, dtype):
    """Layer by layer, and by all passes."""
    torch.manual_seed(0)
    slow = Potential(model_config(preset, cutoff=4.0), [1, 8], reference_energies=[-0.5, -1.25], scales=[1.0, 1.1])
    graph = collate([with_pairs(graph_from_atoms(NAMED[name](), 4.0)) for name in ("water", "one_atom")])
    graph = graph._replace(numbers=torch.where(graph.numbers == 1, 1, 8))
    expected = gradients(PlainLossGradient, slow.double(), graph)
    for make in (partial(PlainLossGradient, operations=FUSED), GpuLossGradient):
        found = gradients(make, slow.to("cuda", dtype), graph.to("cuda"))
        assert_close({"all": found}, {"all": expected}, 1e-9 if dtype == torch.float64 else 2e-4)


def gradients(make, potential, graph) -> torch.Tensor:
    potential.requires_grad_(True).zero_grad(set_to_none=True)
    make(potential)(graph, lambda p: p.energies.square().sum() + p.forces.square().sum(), forces=True, stress=False)
    return torch.cat([w.grad.flatten() for w in potential.parameters() if w.grad is not None]).cpu().double()


def test_a_training_begun_on_a_gpu_goes_on_on_the_cpu(tmp_path, monkeypatch):
    def begun(device):
        return configured(tmp_path, water_frames(20), device=device, epochs=4)

    step, calls = loop.next_step, itertools.count()

    def counted(*arguments):
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "next_step", counted)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            train(begun("cuda"), progress=False)
    train(begun("cpu"), progress=False)
    assert [int(row["epoch"]) for row in history(tmp_path / "model.pt")] == [1, 2, 3, 4]


RESPONSES = ("energies", "forces", "dipole", "polarizability", "born_effective_charges")


def crystal_in_a_field():
    atoms = rattled(bulk("MgO", "rocksalt", 4.2, cubic=True))
    charges = np.random.default_rng(0).normal(0, 0.3, len(atoms))
    atoms.set_initial_charges(charges - charges.mean())
    atoms.info["external_field"] = np.array([0.1, -0.2, 0.05])
    return atoms


def potential_in_a_field() -> Potential:
    """With the widths of a default, charges, and a field."""
    torch.manual_seed(0)
    config = model_config("segnn", cutoff=4.0, cues=["initial_charges", "external_field"])
    made = Potential(config, [8, 12], scales=[0.1, 0.1], reference_energies=[-1.0, -2.0])
    made.responses.scales[:], made.responses.usual[:] = torch.tensor([0.7, 1.3]), torch.tensor([1.0, 2.0])
    atoms = crystal_in_a_field()
    made.calibrate(told(with_pairs(graph_from_atoms(atoms, 4.0)), atoms, config.cues))
    return made.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_responses_to_a_field_are_those_of_the_cpu(dtype):
    results = {}
    for device in ("cpu", "cuda"):
        calculator = SEGNNCalculator(potential_in_a_field(), device=device, dtype=dtype, accelerate="require")
        for n in range(3):  # the last is a recorded one
            atoms = crystal_in_a_field()
            atoms.positions[0, 0] += 0.01 * n
            results[device] = {name: calculator.get_property(name, atoms) for name in RESPONSES}
    assert calculator.evaluators == ("the network by Triton, recorded",)
    for name in RESPONSES:
        a, b = results["cuda"][name], results["cpu"][name]
        assert np.abs(a - b).max() <= 10 * TOLERANCE[dtype] * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize("preset", ["segnn", "tfn"])
def test_properties_are_those_of_the_cpu(preset):
    targets = [Target("dipole", "structure", (3,), "1x1o", "sum"), Target("charges", "atom", (), "1x0e", "free")]
    structures, results = [molecule(name) for name in ("CH3CHO", "H2O")], {}
    for device in ("cpu", "cuda"):
        model = PropertyModel(model_config(preset), [1, 6, 8], targets, seed=3).double()
        model.calibrate(graph_from_atoms(structures[0], model.cutoff))
        results[device] = model.eval().to(device).predict_all(structures)
    for there, here in zip(results["cuda"], results["cpu"], strict=True):
        for name, value in here.items():
            np.testing.assert_allclose(there[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", sorted(STEPPERS))
def test_time_steppers_are_those_of_the_cpu(preset):
    rng = np.random.default_rng(0)
    x, v, q = *rng.normal(size=(2, 8, 3)), rng.choice([-1.0, 1.0], size=8)
    made = TimeStepper(stepper_config(preset), scales=Scales(1.2, 0.7, 0.5), seed=1).double()
    here = made.step(x, v, q)
    np.testing.assert_allclose(made.to("cuda").step(x, v, q), here, rtol=1e-9, atol=1e-9)
