"""A potential in torch-sim: its own checks, many systems at once, dynamics, what it is told."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from helpers.potentials import build_potential, tiny_potential
from helpers.systems import NAMED, rattled_copper, triclinic, water

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DomainWarning
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what torch-sim imports
]
CPU = torch.device("cpu")


def model_of(potential, **settings):
    from segnn_ase.torchsim import SEGNNModel

    return SEGNNModel(potential, device="cpu", **{"domain": "ignore", **settings})


def state_of(systems: list[Atoms]):
    import torch_sim

    return torch_sim.io.atoms_to_state(systems, CPU, torch.float64)


def test_its_own_validation_passes():
    from torch_sim.models.interface import validate_model_outputs

    potential = Potential(model_config("fast", hidden_irreps="4x0e+4x1o"), [14, 26]).double()
    validate_model_outputs(model_of(potential), CPU, torch.float64)


@pytest.mark.parametrize("periodic", [True, False])
def test_many_systems_at_once_are_what_each_is(periodic):
    """64 of all named systems; one state is periodic or not."""
    named = [build() for build in NAMED.values()]
    named = [atoms for atoms in named if atoms.pbc.all() == periodic and (atoms.pbc.all() or not atoms.pbc.any())]
    systems = []
    for n in range(64):
        atoms = named[n % len(named)].copy()
        atoms.rattle(0.02, seed=n)
        systems.append(atoms)
    potential = build_potential("segnn")
    found, calculator = model_of(potential)(state_of(systems)), SEGNNCalculator(potential, domain="ignore")
    ends = np.cumsum([len(atoms) for atoms in systems])[:-1]
    for n, (atoms, forces) in enumerate(zip(systems, np.split(found["forces"].numpy(), ends), strict=True)):
        assert float(found["energy"][n]) == pytest.approx(calculator.get_property("energy", atoms), abs=1e-10)
        np.testing.assert_allclose(forces, calculator.get_property("forces", atoms), rtol=0, atol=1e-10)
        stress = np.zeros(6) if not periodic else calculator.get_property("stress", atoms)
        np.testing.assert_allclose(found["stress"][n], voigt_6_to_full_3x3_stress(stress), rtol=0, atol=1e-10)


def test_only_what_is_asked_is_computed():
    model = model_of(tiny_potential(), compute_stress=False, dtype=torch.float32)
    found = model(state_of([water(), water()]))
    assert set(found) == {"energy", "forces", "outside"} and found["forces"].dtype == torch.float32
    assert not model.compute_stress and model.compute_forces and model.memory_scales_with == "n_atoms"
    model.compute_forces = False
    assert set(model(state_of([water()]))) == {"energy", "outside"}
    with pytest.raises(ConfigError, match=r"dtype is 'float64'; expected torch\.float64"):
        model_of(tiny_potential(), dtype="float64")


@pytest.mark.parametrize("bad", [np.nan, 1e-4])
def test_one_that_cannot_be_evaluated_leaves_the_others_alone(bad):
    potential, systems = build_potential("segnn"), [water(), water(), water()]
    systems[1].positions[1] = systems[1].positions[0] + bad
    model = model_of(potential)
    with pytest.warns(DomainWarning, match="a system of OH2 has no energy, which is NaN"):
        found = model(state_of(systems))
    assert found["energy"].isnan().tolist() == found["outside"].tolist() == [False, True, False]
    assert found["forces"].isnan().any(dim=1).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert torch.equal(found["energy"][[0]], model(state_of(systems[:1]))["energy"])


def test_what_is_no_state_is_refused():
    model, state = model_of(tiny_potential()), vars(state_of([water(), water()]))
    for changed, told in (
        ({"pbc": None}, "without which it is none"),
        ({"system_idx": torch.tensor([0, 1, 0, 1, 0, 1])}, "the atoms of one system after those of another"),
        ({"system_idx": torch.zeros(6, dtype=int)}, "atoms in each system"),
        ({"pbc": torch.tensor([True, True, False])}, "such systems have no stress"),
    ):
        with pytest.raises(ConfigError, match=told):
            model({**state, **changed})


def test_dynamics_of_many_conserve_the_energy():
    import torch_sim

    systems = [rattled_copper(), triclinic()]
    model, state = model_of(build_potential("segnn")), state_of(systems)
    init, step = torch_sim.integrators.nve(model=model, dt=torch.tensor(1e-4), kT=torch.tensor(0.02))
    state = init(state, seed=0)
    total = []
    for _ in range(60):
        kinetic = torch_sim.quantities.calc_kinetic_energy(
            masses=state.masses, momenta=state.momenta, system_idx=state.system_idx
        )
        total.append((state.energy + kinetic).numpy())
        state = step(state, dt=torch.tensor(1e-4))
    assert np.ptp(np.array(total), axis=0).max() < 1e-4 and (state.energy.numpy() != total[0]).all()


def test_a_potential_is_told_of_its_systems():
    config = model_config(cues=["charge", "external_field"], hidden_irreps="4x0e+4x1o+4x2e", cutoff=3.0)
    potential, systems = Potential(config, [1, 8]).double(), [water() for _ in range(2)]
    field, state = np.array([0.0, 0.01, 0.02]), state_of(systems)
    found = model_of(potential, told={"external_field": field, "charge": 1})(state)
    given = {**vars(state), "charge": torch.tensor([1.0, 0.0]), "spin": torch.zeros(2)}
    apart = model_of(potential, told={"external_field": field})(given)
    calculator = SEGNNCalculator(potential)
    for atoms, charge, energy in zip(systems, (1, 0), apart["energy"], strict=True):
        atoms.info |= {"external_field": field, "charge": charge}
        assert float(energy) == pytest.approx(calculator.get_property("energy", atoms), abs=1e-10)
    assert found["energy"][0] == found["energy"][1] == apart["energy"][0] != apart["energy"][1]
