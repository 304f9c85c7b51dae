"""The calculator's contract: ASE's properties, only what is asked, nothing mutated, typed errors."""

import copy
import gc
import pickle

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import FiniteDifferenceCalculator, calculate_numerical_forces
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress
from helpers.potentials import REFERENCES, tiny_potential
from helpers.systems import NAMED, PERFECT, left_handed, rattled, rotation, transformed, triclinic, water

from segnn_ase import calculator
from segnn_ase.base.errors import ConfigError, DeviceError, StructureError, UnusedInputWarning
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.model.potential import Potential
from segnn_ase.store.model_file import Committee, save_committee, save_potential

everywhere = pytest.mark.parametrize("name", NAMED)


def ethanol() -> Atoms:
    return rattled(molecule("CH3CH2OH"))


def copper() -> Atoms:
    return rattled(bulk("Cu", cubic=True))


@pytest.fixture(scope="module")
def potential():
    return tiny_potential()


def evaluated(atoms: Atoms, calc) -> dict:
    atoms = atoms.copy()
    atoms.calc = calc
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    return results


def assert_same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert np.allclose(a[name], b[name], rtol=0, atol=tolerance), name


def count_calls(monkeypatch) -> list:
    """A list that grows with every evaluation of a potential."""
    calls, choose = [], calculator.choose_evaluator

    def counted(*given, **keywords):
        evaluator = choose(*given, **keywords)

        class Counted(type(evaluator)):
            def __call__(self, graph, **wanted):
                calls.append(wanted)
                return super().__call__(graph, **wanted)

        evaluator.__class__ = Counted
        return evaluator

    monkeypatch.setattr(calculator, "choose_evaluator", counted)
    return calls


@everywhere
def test_energy_forces_and_stress_against_finite_differences(potential, name):
    atoms = NAMED[name]()
    atoms.calc = SEGNNCalculator(potential)
    forces = atoms.get_forces()
    still = name in (*PERFECT, "dimer_at_cutoff", "tiny_cell")
    assert (np.abs(forces).max() > 0.01) != still
    if not atoms.pbc.all():
        assert np.abs(calculate_numerical_forces(atoms, eps=1e-5) - forces).max() < 1e-6
        return
    stress = atoms.get_stress()
    atoms.calc = FiniteDifferenceCalculator(atoms.calc, eps_disp=1e-5, eps_strain=1e-5)
    assert np.abs(atoms.get_forces() - forces).max() < 1e-6
    assert np.abs(atoms.get_stress() - stress).max() < 1e-7 * max(1.0, np.abs(stress).max())


@pytest.mark.parametrize("name", NAMED)
def test_pairs_are_those_of_ase(potential, name):
    atoms = NAMED[name]()
    pairs = SEGNNCalculator([potential, tiny_potential(1, cutoff=5.0)]).get_pairs(atoms)
    i, j, S = neighbor_list("ijS", atoms, potential.cutoff)
    assert sorted(zip(*pairs[:2], *pairs.S.T, strict=True)) == sorted(zip(i, j, *S.T, strict=True))
    assert all(x.dtype == int for x in pairs)


def test_every_property_and_its_type(potential):
    atoms = copper()
    atoms.calc = SEGNNCalculator(tiny_potential(dtype=torch.float32))
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    assert atoms.get_potential_energy(force_consistent=True) == energy
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=1e-10)
    assert atoms.get_stress(voigt=False).shape == (3, 3)
    assert type(energy) is float
    for array, shape in ((forces, (4, 3)), (stress, (6,)), (atoms.get_potential_energies(), (4,))):
        assert type(array) is np.ndarray and array.dtype == np.float64 and array.shape == shape
    for value in atoms.calc.results.values():
        assert not isinstance(value, torch.Tensor)


def test_float32_and_float64_in_one_process(potential):
    both = [SEGNNCalculator(potential, dtype=dtype) for dtype in ("float32", "float64")]
    for build in NAMED.values():
        single, double = (evaluated(build(), calc) for calc in both)
        assert_same(single, double, 1e-4)
        assert single["energy"] != double["energy"] or not double["forces"].any()
        assert_same(evaluated(build(), both[0]), single)
    assert torch.get_default_dtype() == torch.float32
    assert potential.dtype == torch.float64 and next(potential.parameters()).requires_grad


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_call_is_like_any_other_to_the_last_bit(dtype):
    """A restarted simulation meets a new calculator and must go on as the old one would have."""
    old, atoms = SEGNNCalculator(tiny_potential(), dtype=dtype), ethanol()
    evaluated(copper(), old)
    assert_same(evaluated(atoms, SEGNNCalculator(tiny_potential(), dtype=dtype)), evaluated(atoms, old))


@pytest.mark.parametrize("dtype", ["float32", "float64", torch.float64, None])
def test_dtype_by_name_and_by_object(dtype):
    calc = SEGNNCalculator(tiny_potential(), dtype=dtype)
    assert calc.potentials[0].dtype == (torch.float32 if dtype == "float32" else torch.float64)
    assert not any(parameter.requires_grad for parameter in calc.potentials[0].parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda calc: pickle.loads(pickle.dumps(calc))])
def test_copies_give_the_same_bits_and_go_their_own_way(potential, duplicate):
    for build in (ethanol, copper):
        fresh = SEGNNCalculator([potential, tiny_potential(1)])
        expected = evaluated(build(), fresh)
        other = duplicate(fresh)
        assert_same(evaluated(build(), duplicate(SEGNNCalculator([potential, tiny_potential(1)]))), expected)
        moved = build()
        moved.rattle(0.05)
        evaluated(moved, other)
        assert_same(evaluated(build(), fresh), expected)


def test_committee_mean_and_standard_deviation(potential):
    members = [potential, tiny_potential(1), tiny_potential(2, cutoff=3.0)]
    single = [evaluated(copper(), SEGNNCalculator(member)) for member in members]
    atoms = copper()
    atoms.calc = SEGNNCalculator(members)
    found = evaluated(atoms, atoms.calc)
    for name, values in found.items():
        assert np.allclose(values, np.mean([s[name] for s in single], axis=0), rtol=0, atol=1e-12)
        spread = np.std([s[name] for s in single], axis=0, ddof=1)
        assert np.allclose(atoms.calc.results[f"{name}_std"], spread, rtol=0, atol=1e-12)
    assert atoms.calc.results["forces_std"].shape == (4, 3) and atoms.calc.results["energy_std"] > 0


def test_committee_of_one_has_no_spread(potential):
    calc = SEGNNCalculator([potential])
    evaluated(copper(), calc)
    assert not [name for name in calc.results if name.endswith("_std")]


def test_models_by_path_by_name_and_by_object(potential, tmp_path):
    save_potential(tmp_path / "a.pt", potential)
    expected = evaluated(ethanol(), SEGNNCalculator(potential))
    assert_same(evaluated(ethanol(), SEGNNCalculator(tmp_path / "a.pt")), expected)
    assert_same(evaluated(ethanol(), SEGNNCalculator([str(tmp_path / "a.pt"), potential])), expected, 1e-12)


def test_a_model_file_can_be_written_while_its_calculator_lives(tmp_path):
    """The calculator holds its own copy: later changes of the potential do not reach it."""
    potential = tiny_potential()
    calc = SEGNNCalculator(potential)
    expected = evaluated(ethanol(), calc)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.zero_()
    calc.reset()
    assert_same(evaluated(ethanol(), calc), expected)


@pytest.mark.parametrize("name", [name for name, build in NAMED.items() if not build().pbc.all()])
def test_stress_where_it_is_not_defined_is_refused(potential, name):
    atoms = NAMED[name]()
    atoms.calc = SEGNNCalculator(potential)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        atoms.get_stress()
    atoms.get_forces()


def test_one_lonely_atom(potential):
    calc = SEGNNCalculator(potential)
    for z, energy in REFERENCES.items():
        atoms = Atoms([z], positions=[[1, 2, 3]])
        found = evaluated(atoms, calc)
        assert found["energy"] == pytest.approx(energy, abs=1e-12) and not found["forces"].any()
        atoms.set_cell([20, 20, 20])
        atoms.pbc = True
        found = evaluated(atoms, calc)
        assert found["energy"] == pytest.approx(energy, abs=1e-12)
        assert not found["forces"].any() and not found["stress"].any()
        assert not calc.get_hessian(atoms).any()


def test_left_handed_cells_have_the_same_stress(potential):
    calc = SEGNNCalculator(potential)
    assert_same(evaluated(left_handed(), calc), evaluated(triclinic(), calc), 1e-10)


def test_only_what_is_asked_is_computed(potential, monkeypatch):
    atoms = copper()
    atoms.calc = SEGNNCalculator(potential)
    calls = count_calls(monkeypatch)
    atoms.get_potential_energy()
    assert calls == [{"forces": False, "stress": False}]
    assert {"energy", "free_energy", "energies"} == set(atoms.calc.results)
    atoms.get_forces()
    assert calls[1] == {"forces": True, "stress": True}
    atoms.get_stress()
    atoms.get_potential_energy()
    assert len(calls) == 2


def test_energy_alone_needs_no_derivative(potential, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a derivative was computed")

    atoms = copper()
    atoms.calc = SEGNNCalculator(potential)
    atoms.get_potential_energy()  # the kernels are checked once, with forces
    monkeypatch.setattr(torch.autograd, "grad", refused)
    atoms.rattle(0.01)
    atoms.get_potential_energy()
    with pytest.raises(AssertionError, match="derivative"):
        atoms.get_forces()


def test_only_a_change_of_the_structure_is_computed_again(potential, monkeypatch):
    atoms, calls = triclinic(), count_calls(monkeypatch)
    atoms.calc = SEGNNCalculator(potential)
    seen = [atoms.get_forces()]
    changes = {
        "nothing": lambda: None,
        "info": lambda: atoms.info.update(note="not an input"),
        "positions": lambda: atoms.positions.__setitem__((0, 0), 0.01),
        "numbers": lambda: atoms.numbers.__setitem__(0, 8),
        "cell": lambda: atoms.set_cell(atoms.cell * 1.01),
        "pbc": lambda: atoms.set_pbc((True, True, False)),
    }
    for name, change in changes.items():
        change()
        calls.clear()
        seen.append(atoms.get_forces())
        changed = name not in ("nothing", "info")
        assert len(calls) == changed and np.array_equal(seen[-1], seen[-2]) != changed, name
        assert np.array_equal(seen[-1], evaluated(atoms, SEGNNCalculator(potential))["forces"]), name


def test_results_are_not_shared_with_the_caller(potential):
    atoms = copper()
    atoms.calc = SEGNNCalculator(potential)
    atoms.get_forces()[:] = 0.0
    assert atoms.get_forces().any()


def test_atoms_are_not_changed_and_nothing_is_printed(potential, capsys):
    calc = SEGNNCalculator(potential)
    for build in NAMED.values():
        atoms = build()
        atoms.info["note"] = {"a": 1}
        atoms.set_tags(range(len(atoms)))
        atoms.positions += 50.0
        before = copy.deepcopy(atoms)
        atoms.calc = calc
        atoms.get_forces()
        calc.get_hessian(atoms)
        calc.get_descriptors(atoms)
        assert atoms.calc is calc
        for name in before.arrays:
            assert np.array_equal(atoms.arrays[name], before.arrays[name]), name
        assert np.array_equal(atoms.cell.array, before.cell.array) and np.array_equal(atoms.pbc, before.pbc)
        assert repr(atoms.info) == repr(before.info) and atoms.arrays.keys() == before.arrays.keys()
    assert capsys.readouterr() == ("", "")


def test_global_state_is_left_alone(potential):
    def state():
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()

    before, random = state(), torch.get_rng_state()
    evaluated(copper(), SEGNNCalculator(potential))
    assert state() == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
def test_no_tensor_outlives_a_call(potential):
    def alive() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    atoms = copper()
    atoms.calc = SEGNNCalculator([potential, tiny_potential(1)], skin=0.1)
    counts = []
    for seed in range(6):
        atoms.rattle(0.05, seed=seed)
        atoms.get_stress()
        atoms.calc.get_hessian()
        counts.append(alive())
    assert len(set(counts[1:])) == 1


def test_it_works_without_gradients(potential):
    expected = evaluated(copper(), SEGNNCalculator(potential))
    with torch.no_grad():
        assert_same(evaluated(copper(), SEGNNCalculator(potential)), expected)
        assert SEGNNCalculator(potential).get_hessian(ethanol()).any()


@pytest.mark.slow
def test_hessian_is_symmetric_and_the_derivative_of_the_forces(potential):
    calc = SEGNNCalculator([potential, tiny_potential(1)])
    for build in NAMED.values():
        assert_hessian(build(), calc)


def assert_hessian(atoms: Atoms, calc) -> None:
    hessian = calc.get_hessian(atoms)
    assert hessian.shape == (3 * len(atoms), 3 * len(atoms)) and hessian.dtype == np.float64
    assert np.abs(hessian - hessian.T).max() < 1e-9 * max(1.0, np.abs(hessian).max())
    step = 1e-5
    for k in {0, 1, hessian.shape[0] - 1}:
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions.flat[k] += sign * step
            ends.append(evaluated(moved, calc)["forces"].ravel())
        assert np.abs(hessian[k] + (ends[0] - ends[1]) / (2 * step)).max() < 1e-5 * max(1.0, np.abs(hessian).max())


@pytest.mark.parametrize("improper", [False, True])
def test_descriptors_are_invariant_and_follow_permutations(potential, improper):
    atoms, calc = ethanol(), SEGNNCalculator(potential)
    expected = calc.get_descriptors(atoms)
    assert expected.shape == (9, 4) and expected.std(axis=0).min() > 0
    moved = transformed(atoms, rotation(3, improper=improper), shift=[1, 2, 3])
    assert np.allclose(calc.get_descriptors(moved), expected, atol=1e-10)
    order = np.random.default_rng(0).permutation(9)
    assert np.allclose(calc.get_descriptors(atoms[order]), expected[order], atol=1e-10)


def test_hessian_and_descriptors_of_the_structure_computed_last(potential):
    calc = SEGNNCalculator(potential)
    evaluated(ethanol(), calc)
    assert np.array_equal(calc.get_descriptors(), calc.get_descriptors(ethanol()))
    assert np.array_equal(calc.get_hessian(), calc.get_hessian(ethanol()))


@pytest.mark.parametrize("method", ["get_hessian", "get_descriptors", "get_virials", "get_heat_flux"])
def test_an_empty_structure_is_not_taken_for_the_last_one(potential, method):
    calc = SEGNNCalculator(potential)
    with pytest.raises(StructureError, match="atoms is empty"):
        getattr(calc, method)()
    evaluated(ethanol(), calc)
    with pytest.raises(StructureError, match="atoms is empty"):
        getattr(calc, method)(Atoms())


def test_torch_cluster_finds_the_same(potential):
    pytest.importorskip("torch_cluster")
    matscipy, cluster = (SEGNNCalculator(potential, neighbor_backend=name) for name in ("matscipy", "torch_cluster"))
    for build in NAMED.values():
        assert_same(evaluated(build(), cluster), evaluated(build(), matscipy), 1e-10)


@pytest.mark.parametrize("build, skin", [(ethanol, 0.8), (lambda: copper().repeat((2, 1, 1)), 0.2)])
def test_md_with_a_skin_is_that_without(potential, build, skin):
    paths = []
    for used in (0.0, skin):
        atoms = build()
        atoms.positions += 0.3
        atoms.calc = SEGNNCalculator(potential, skin=used)
        atoms.set_velocities(np.random.default_rng(0).normal(0, 0.05, (len(atoms), 3)))
        dynamics, seen = VelocityVerlet(atoms, 1.0 * units.fs), []
        for _ in range(25):
            dynamics.run(1)
            seen.append(atoms.get_forces())
        atoms.wrap()
        seen.append(atoms.get_forces())
        if used:
            (graphs,) = atoms.calc._graphs.values()
            assert 1 < graphs.neighbors.rebuilds < 20
        paths.append(seen)
    assert np.abs(np.array(paths[0]) - np.array(paths[1])).max() < 1e-9


@pytest.mark.slow
def test_one_calculator_for_many_structures(potential):
    shared = SEGNNCalculator(potential)
    expected = [evaluated(build(), SEGNNCalculator(potential)) for build in NAMED.values()]
    for _ in range(2):
        for build, known in zip(NAMED.values(), expected, strict=True):
            assert_same(evaluated(build(), shared), known, 1e-12)


@pytest.mark.parametrize("name", ["a.xyz", "a.traj", "a.db"])
def test_a_committee_structure_can_be_written(potential, tmp_path, name):
    atoms = copper()
    atoms.calc = SEGNNCalculator([potential, tiny_potential(1)])
    expected = evaluated(atoms, atoms.calc)
    atoms.get_stress()
    ase.io.write(tmp_path / name, atoms)
    back = ase.io.read(tmp_path / name)
    assert back.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-6)
    assert np.allclose(back.get_forces(), expected["forces"], atol=1e-6)
    assert np.allclose(back.get_stress(), expected["stress"], atol=1e-6)


def with_position(value) -> Atoms:
    atoms = ethanol()
    atoms.positions[5, 1] = value
    return atoms


def on_one_spot() -> Atoms:
    atoms = ethanol()
    atoms.positions[7] = atoms.positions[2] + 1e-6
    return atoms


def image_on_one_spot() -> Atoms:
    return Atoms("CuH", [[0, 0, 0], [3.0, 0, 0]], cell=[3, 4, 5], pbc=True)


def flat_cell() -> Atoms:
    return Atoms("Cu", cell=[[3, 0, 0], [0, 3, 0], [3, 3, 0]], pbc=True)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: molecule("CH3Cl"), r"atom 1 is Cl, which this potential does not know; .* H, C, O, Cu"),
        (lambda: with_position(np.nan), r"positions of atom 5 are \[.*nan.*\]; expected finite"),
        (lambda: with_position(np.inf), r"positions of atom 5 are \[.*inf.*\]; expected finite"),
        (on_one_spot, r"atoms O 2 and H 7|atoms H 7 and O 2"),
        (image_on_one_spot, r"atoms Cu 0 and H 1|atoms H 1 and Cu 0"),
        (flat_cell, "span no volume"),
        (lambda: Atoms("Cu", pbc=True), "span no volume"),
        (lambda: Atoms("Cu", cell=[np.nan, 3, 3], pbc=True), "cell is"),
        (lambda: Atoms(), "atoms is empty"),
    ],
    ids=["element", "nan", "inf", "one spot", "one spot by periodicity", "flat", "no cell", "nan cell", "empty"],
)
@pytest.mark.parametrize("skin", [0.0, 0.5])
def test_structures_that_cannot_be_evaluated(potential, build, message, skin):
    calc = SEGNNCalculator(potential, skin=skin)
    expected = evaluated(ethanol(), calc)
    atoms = build()
    atoms.calc = calc
    for get in (atoms.get_potential_energy, atoms.get_forces, lambda: calc.get_hessian(atoms)):
        with pytest.raises(StructureError, match=message):
            get()
    assert_same(evaluated(ethanol(), calc), expected, 1e-12)  # it goes on with the next one


@pytest.mark.parametrize("accelerate", ["off", "require"])
def test_many_structures_in_one_pass(accelerate, monkeypatch):
    """All named systems in batches, by a committee of two cutoffs; results as one by one."""
    monkeypatch.setattr(calculator, "BATCH_ATOMS", 12)
    committee = [tiny_potential(0), tiny_potential(1, cutoff=3.0)]
    structures = [*(build() for build in NAMED.values()), copper().repeat(2)]
    calc = SEGNNCalculator(committee, accelerate=accelerate)
    results = calc.evaluate(iter(structures), properties=("energy", "stress"))
    assert len(results) == len(structures)
    alone = SEGNNCalculator(committee, accelerate=accelerate)
    for atoms, found in zip(structures, results, strict=True):
        atoms.calc = alone
        atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()
        assert_same(found, alone.results, 1e-10)
    energies = SEGNNCalculator(committee).evaluate(structures, properties=["energy"])
    assert [r["energy"] for r in energies] == pytest.approx([r["energy"] for r in results])
    assert all("forces" not in r for r in energies)
    assert calc.evaluate([]) == []


def test_writing_what_is_there_asks_for_nothing(potential, tmp_path):
    """A trajectory of energies does not turn on the forces."""
    atoms = ethanol()
    atoms.calc = SEGNNCalculator(potential)
    with Trajectory(tmp_path / "energies.traj", "w", atoms) as trajectory:
        for seed in range(3):
            atoms.rattle(0.01, seed=seed)
            atoms.get_potential_energy()
            trajectory.write()
            assert "forces" not in atoms.calc.results


def test_one_structure_and_one_property_are_many_too(potential):
    calc = SEGNNCalculator(potential)
    assert len(calc.evaluate(ethanol(), "forces")) == 1


def test_devices_that_are_not_there(potential):
    if not torch.cuda.is_available():
        assert SEGNNCalculator(potential, device="auto").device == torch.device("cpu")
        with pytest.raises(DeviceError, match="sees 0 CUDA devices"):
            SEGNNCalculator(potential, device="cuda")


def test_a_model_that_jumps_is_refused_unless_allowed():
    published = tiny_potential(message="published", smooth=False, body_order=1)
    with pytest.raises(ConfigError, match=r"not smooth.*allow_nonsmooth=True"):
        SEGNNCalculator(published)
    assert evaluated(ethanol(), SEGNNCalculator(published, allow_nonsmooth=True))["forces"].any()


def test_slab_of_ase(potential):
    """A cell vector of zero length along the vacuum, as `fcc111` makes it."""
    atoms = fcc111("Cu", (1, 1, 2))
    atoms.calc = SEGNNCalculator(potential)
    assert np.isfinite(atoms.get_forces()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same(potential):
    here, there = (SEGNNCalculator(potential, device=device) for device in ("cpu", "cuda"))
    for build in NAMED.values():
        assert_same(evaluated(build(), there), evaluated(build(), here), 1e-8)


def test_a_committee_has_one_set_of_elements(potential):
    other = Potential(potential.config, [1, 8])
    with pytest.raises(ConfigError, match="different elements"):
        SEGNNCalculator([potential, other])


CHANGES = {
    "in place": lambda p: p.readout.last.last.weight.mul_(1.5),
    "behind autograd's back": lambda p: p.segnn.messages[0].pair[0].weight.data.mul_(1.5),
    "loaded into a part": lambda p: p.segnn.updates[0].load_state_dict(tiny_potential(3).segnn.updates[0].state_dict()),
    "another tensor": lambda p: setattr(p.readout.last, "last", tiny_potential(4).readout.last.last),
    "another precision": lambda p: p.to(torch.float32),
    "E0": lambda p: p.reference_energies.__setitem__(0, 7.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_those_that_count(change):
    atoms = rattled(copper())
    atoms.calc = calc = SEGNNCalculator(tiny_potential(), accelerate="require")
    before = atoms.get_forces().copy()
    with torch.no_grad():
        CHANGES[change](calc.potentials[0])
    atoms.positions += 1e-12  # ASE keeps what it has for the same structure
    fresh = atoms.copy()
    fresh.calc = SEGNNCalculator(calc.potentials[0], accelerate="off")
    tolerance = 1e-3 if change == "another precision" else 1e-5
    assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=tolerance)
    assert np.abs(atoms.get_forces() - fresh.get_forces()).max() < tolerance
    assert change in ("another precision", "E0") or np.abs(before - fresh.get_forces()).max() > 1e-3
    assert calc.evaluators == ("the network in C",)


def test_moving_to_the_own_precision_changes_nothing():
    atoms = rattled(copper())
    atoms.calc = calc = SEGNNCalculator(tiny_potential(), accelerate="require")
    before = atoms.get_forces()
    calc.potentials[0].to(torch.float64)
    chosen = calc._evaluators
    atoms.positions += 1e-12
    assert np.abs(atoms.get_forces() - before).max() < 1e-8 and calc._evaluators is chosen


def test_a_list_of_one_committee_keeps_its_factors(tmp_path):
    members = [tiny_potential(seed) for seed in range(2)]
    save_committee(tmp_path / "c.pt", Committee(members, {"forces": 5.0, "energy": 3.0}, {}))
    found = []
    for model in (tmp_path / "c.pt", [tmp_path / "c.pt"]):
        atoms = rattled(copper())
        atoms.calc = SEGNNCalculator(model)
        atoms.get_forces()
        found.append(atoms.calc.results)
    assert found[0]["energy_std"] == found[1]["energy_std"] > 0
    assert np.array_equal(found[0]["forces_std"], found[1]["forces_std"])


@pytest.mark.parametrize("accelerate", ["off", "require"])
@pytest.mark.parametrize("name", NAMED)
def test_stresses_of_atoms_sum_to_the_stress_times_the_volume(small_potential, name, accelerate):
    atoms = NAMED[name]()
    calc = atoms.calc = SEGNNCalculator(small_potential("segnn"), accelerate=accelerate, domain="ignore")
    found, virials = atoms.get_stresses(), calc.get_virials(atoms)
    assert found.shape == (len(atoms), 6) and virials.shape == (len(atoms), 3, 3)
    assert np.array_equal(found, full_3x3_to_voigt_6_stress(virials))
    plain = SEGNNCalculator(small_potential("segnn"), accelerate="off", domain="ignore").get_virials(atoms)
    assert np.abs(virials - plain).max() < 1e-7 * max(1.0, np.abs(plain).max())
    size = max(1e-9, 1e-11 * np.abs(virials).max())
    assert np.abs(virials.sum(0) - virials.sum(0).T).max() < size  # no torque
    if atoms.pbc.all():
        assert np.abs(found.sum(0) - atoms.get_stress() * atoms.get_volume()).max() < size
    elif not atoms.pbc.any():
        work = -np.einsum("ia,ib->ab", atoms.positions, atoms.get_forces())
        assert np.abs(virials.sum(0) - work).max() < size


def test_stresses_of_committees_batches_and_dimers(small_potential):
    """A dimer has half for either end; both members and all structures of a pass have their own pairs."""
    members = [small_potential("segnn"), tiny_potential(1)]
    frames = [NAMED["triclinic"](), ethanol(), NAMED["tiny_cell"]()]
    both = SEGNNCalculator(members, domain="ignore")
    for atoms, results in zip(frames, both.evaluate(frames, ["stresses"]), strict=True):
        alone = [SEGNNCalculator(p, domain="ignore").get_virials(atoms) for p in members]
        expected = full_3x3_to_voigt_6_stress(np.mean(alone, axis=0))
        np.testing.assert_allclose(results["stresses"], expected, rtol=1e-6, atol=1e-7)
    dimer = Atoms("C2", [[0, 0, 0], [0, 0, 1.6]], calculator=both)
    push = dimer.get_forces()[1, 2]
    np.testing.assert_allclose(dimer.get_stresses(), [[0, 0, -0.8 * push, 0, 0, 0]] * 2, rtol=1e-6, atol=1e-9)


def test_the_ideal_gas_of_the_atoms_is_that_of_the_structure(potential):
    atoms = NAMED["triclinic"]()
    atoms.calc = SEGNNCalculator(potential)
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    expected = atoms.get_stress(include_ideal_gas=True) * atoms.get_volume()
    np.testing.assert_allclose(atoms.get_stresses(include_ideal_gas=True).sum(0), expected, rtol=1e-10)


def with_info(**info) -> Atoms:
    atoms = water()
    atoms.info.update(info)
    return atoms


def with_array(name: str, values) -> Atoms:
    atoms = water()
    atoms.set_array(name, np.array(values))
    return atoms


UNUSED = {
    "charges": (with_array("initial_charges", [-0.8, 0.4, 0.4]), "charges"),
    "moments": (with_array("initial_magmoms", [2.0, 0.0, 0.0]), "magnetic moments"),
    "vector moments": (with_array("initial_magmoms", np.eye(3)), "magnetic moments"),
    "partial charges": (with_array("partial_charges", [-0.8, 0.4, 0.4]), "partial_charges"),
    "charge": (with_info(charge=1), "charge = 1"),
    "Total_Charge": (with_info(Total_Charge=-1.0), "Total_Charge = -1.0"),
    "spin": (with_info(spin=2), "spin = 2"),
    "multiplicity": (with_info(multiplicity=3), "multiplicity = 3"),
    "field": (with_info(electric_field=[0, 0, 0.1]), r"electric_field = \[0, 0, 0.1\]"),
    "a word": (with_info(spin="up"), "spin = up"),
    "two": (with_info(charge=1, spin=2), "charge = 1, spin = 2"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_a_potential_does_not_know_is_named_once(potential, name):
    atoms, words = UNUSED[name]
    expected = evaluated(water(), SEGNNCalculator(potential))["energy"]
    calc = SEGNNCalculator(potential)
    with pytest.warns(
        UnusedInputWarning, match=f"the structure has {words}: this potential knows nothing of that"
    ) as told:
        assert evaluated(atoms.copy(), calc)["energy"] == expected
        calc.evaluate([atoms, atoms])
        calc.get_hessian(atoms)
    assert len(told) == 1
    with pytest.warns(UnusedInputWarning, match=words):
        SEGNNCalculator(potential).evaluate([water(), atoms])


def test_what_says_nothing_gives_no_warning(potential):
    atoms = with_info(charge=0, total_charge=0.0, spin=0, multiplicity=1, field=[0, 0, 0], note="charge 1", Charge=None)
    atoms.set_initial_charges([0, 0, 0])
    atoms.set_initial_magnetic_moments([0, 0, 0])
    evaluated(atoms, SEGNNCalculator(potential))  # warnings are errors
