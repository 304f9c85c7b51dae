"""The domain: silent where the data are, and one named reason for each way of leaving them."""

import copy
import pickle
import re
import warnings

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from helpers.domains import characterized, contact, copper, training_set
from helpers.potentials import build_potential
from helpers.systems import NAMED

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import DomainError, DomainWarning, MDError
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.model_file import load_potential, save_potential
from segnn_ase.trust import domain


@pytest.fixture(scope="module")
def known():
    return characterized(build_potential("segnn"), training_set())


def kinds(calculator: SEGNNCalculator, atoms: Atoms) -> list[str]:
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.get_forces()
    return [way.kind for way in atoms.calc.results["outside_domain"]]


def test_training_frames_and_their_like_are_inside(known):
    calculator = SEGNNCalculator(known, domain="raise")
    for atoms in [*training_set(), copper(99), copper(98, 1.01), copper(97).repeat(2)]:
        assert kinds(calculator, atoms) == []


def test_lone_atoms_are_inside(known):
    assert kinds(SEGNNCalculator(known), Atoms("Cu")) == []
    assert kinds(SEGNNCalculator(known), Atoms("CuO", [[0, 0, 0], [0, 0, 40]])) == []


def never_met() -> Atoms:
    return molecule("CO") + Atoms("Cu", [[0, 1.3, 0]])


def crowd() -> Atoms:
    return Atoms("COCOCO", [[x, y, 0] for y in (0.0, 2.6, -2.6) for x in (0.0, 1.13)])


OUTSIDE = {
    "distance": (contact, r"Cu \d and Cu \d are 1.2\d Å apart; the closest in training were 2"),
    "met": (never_met, r"they never met in training"),
    "neighbors": (crowd, "neighbours; in training it had 1 to 1"),
    "element": (lambda: Atoms("HC", [[0, 0, 0], [0, 0, 1.1]]), "there was none of its element in training"),
    "density": (lambda: copper(0, 0.9), r"the density is [\d.]+ amu/Å\^3; in training it was"),
    "surface": (lambda: Atoms("Cu4", [[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0], [0, 0, 2.6]]), "Cu 0 has 3 neighbours"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_way_out_is_named_with_what_would_help(known, name):
    build, message = OUTSIDE[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kinds(SEGNNCalculator(known), build())
    assert {w.category for w in caught} == {DomainWarning}
    texts = [str(w.message) for w in caught]
    assert any(re.search(message, text) for text in texts), texts
    assert all("What would help: frames" in text for text in texts)
    with pytest.raises(DomainError, match="outside the training data"):
        kinds(SEGNNCalculator(known, domain="raise"), build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(SEGNNCalculator(known, domain="ignore"), build())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("energy", {"binding": (1e3, 1e3)}, r"eV/atom from the sum of E0; in training 1000.000"),
        ("forces", {"max_force": 1e-9}, r"a force on \w+ \d is .* the largest in training was 1e-09"),
        ("features", {"max_leverage": 1e-3}, r"the surroundings of \w+ \d are new"),
    ],
)
def test_ranges_of_what_is_predicted(known, kind, change, message):
    potential = copy.deepcopy(known)
    potential.domain = known.domain._replace(**change)
    with pytest.warns(DomainWarning, match=message):
        assert kinds(SEGNNCalculator(potential), copper(3)) == [kind]


def test_ranges_of_few_frames_are_wider(known):
    def limits(frames: int) -> domain.Limits:
        potential = copy.deepcopy(known)
        potential.domain = known.domain._replace(frames=frames, binding=(-3.0, -2.0), virial=(-1.0, 1.0))
        return domain.DomainCheck(potential).limits(torch.tensor([29, 29]))

    few, some, many = limits(6), limits(20), limits(100)
    for a, b in ((few, some), (some, many)):
        assert a.force > b.force and a.leverage > b.leverage
        assert a.energy[1] > b.energy[1] and a.virial[0] < b.virial[0] and a.virial[1] > b.virial[1]
    assert many.force == domain.FORCE * known.domain.max_force
    np.testing.assert_equal(limits(1000)[1:], many[1:])


@pytest.mark.parametrize("mode", ["require", "off"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_path_finds_the_same(known, mode, dtype):
    calculator = SEGNNCalculator(known, accelerate=mode, dtype=dtype, domain="ignore")
    exact = SEGNNCalculator(known, accelerate="off", domain="ignore")
    for build in [lambda: copper(5), *(build for build, _ in OUTSIDE.values())]:
        assert kinds(calculator, build()) == kinds(exact, build())
        results = [calculator.results, exact.results]
        for name in ("energy_std", "forces_std"):
            np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-2 if dtype == "float32" else 1e-6)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_system_is_judged_alike_by_every_path(known, name):
    atoms = NAMED[name]()
    found = [kinds(SEGNNCalculator(known, accelerate=mode, domain="ignore"), atoms) for mode in ("auto", "off")]
    assert found[0] == found[1]
    assert SEGNNCalculator(known, domain="ignore").evaluate([atoms])[0]["outside_domain"] is not None


def test_many_structures_at_once_are_judged_one_by_one(known):
    calculator = SEGNNCalculator(known, domain="ignore")
    structures = [copper(1), contact(), never_met(), copper(2)]
    found = calculator.evaluate(structures)
    for atoms, results in zip(structures, found, strict=True):
        assert [way.kind for way in results["outside_domain"]] == kinds(calculator, atoms)
        assert results["forces_std"].shape == (len(atoms), 3)
        assert results["energy_std"] == pytest.approx(calculator.results["energy_std"], rel=1e-6)
    with pytest.raises(DomainError, match="structure 1: outside"):
        SEGNNCalculator(known, domain="raise").evaluate(structures)


def test_said_once_of_its_kind(known):
    calculator = SEGNNCalculator(known)
    with pytest.warns(DomainWarning) as caught:
        for n in range(4):
            atoms = contact()
            atoms.positions[1, 2] += 0.01 * n
            kinds(calculator, atoms)
    texts = [str(w.message) for w in caught]
    assert len(texts) == len(set(texts)) and sum("apart" in text for text in texts) == 1


def assert_same(found, expected) -> None:
    """Of any depth."""
    assert type(found) is type(expected)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        if hasattr(a, "_fields"):
            assert_same(a, b)
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_the_file_keeps_it_and_a_copy_too(known, tmp_path):
    save_potential(tmp_path / "known.pt", known)
    loaded = load_potential(tmp_path / "known.pt")
    assert_same(loaded.domain, known.domain)
    assert_same(loaded.uncertainty, known.uncertainty)
    calculator = pickle.loads(pickle.dumps(SEGNNCalculator(loaded, domain="ignore")))
    assert kinds(calculator, contact())[0] == kinds(SEGNNCalculator(known, domain="ignore"), contact())[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda calc: pickle.loads(pickle.dumps(calc))])
def test_a_copy_of_a_calculator_that_was_used_goes_its_own_way(known, duplicate):
    calculator, atoms = SEGNNCalculator(known, domain="ignore"), copper(1)
    assert kinds(calculator, atoms) == []
    other = duplicate(calculator)
    calculator._monitor.check._last[1].neighbors[:] = -1.0  # its own, not those of the copy
    atoms.positions[0] += 1e-4
    assert kinds(other, atoms) == []
    assert kinds(calculator, atoms) == ["neighbors"]


def test_another_precision_is_refused_by_compiled_code(known):
    calculator = SEGNNCalculator(known, dtype="float32", domain="ignore")
    kinds(calculator, copper(1))
    monitor = calculator._monitor
    monitor._forms, monitor._last = monitor._forms.double(), (None, None)
    with pytest.raises(ValueError, match=r"forms are torch.float64 .* features of torch.float32"):
        kinds(calculator, copper(2))
    monitor._forms, monitor._last = monitor._forms.float()[:, :-1], (None, None)
    with pytest.raises(ValueError, match="forms are"):
        kinds(calculator, copper(3))


def test_lone_atoms_are_inside_only_where_their_energies_are_known(new_potential):
    fitted = characterized(new_potential("segnn"), training_set(), lone_atoms=False)
    assert "neighbors" in kinds(SEGNNCalculator(fitted, domain="ignore"), Atoms("Cu"))


def test_vacuum_in_the_cell_is_no_low_density(known):
    atoms = molecule("CO", vacuum=8.0, pbc=True)
    assert kinds(SEGNNCalculator(known), atoms) == []


def test_what_was_refused_is_refused_again(known):
    atoms = contact()
    atoms.calc = SEGNNCalculator(known, domain="raise")
    for _ in range(2):
        with pytest.raises(DomainError):
            atoms.get_potential_energy()


def test_warnings_point_at_the_caller(known):
    atoms = contact()
    atoms.calc = SEGNNCalculator(known)
    with pytest.warns(DomainWarning) as caught:
        atoms.get_potential_energy()
    assert {w.filename for w in caught} == {__file__}


def test_properties_of_ase_are_not_disturbed(known):
    atoms = copper(3)
    atoms.calc = SEGNNCalculator(known)
    assert set(atoms.get_properties(["energy", "forces"])) >= {"energy", "forces"}
    assert "forces_std" in atoms.calc.results


def test_a_run_does_not_start_outside(known, tmp_path):
    atoms = crowd()
    atoms.calc = SEGNNCalculator(known, domain="ignore")
    with pytest.raises(MDError, match="the run does not start: this is outside"):
        run_md(atoms, MDConfig(steps=5, stop_outside_domain=True, log=tmp_path / "md.csv"), progress=False)
    assert not (tmp_path / "md.csv").exists()


def test_without_a_domain_there_is_nothing_to_say(small_potential):
    atoms = contact()
    atoms.calc = SEGNNCalculator(small_potential("segnn"), domain="raise")
    atoms.get_forces()
    assert not {"outside_domain", "energy_std", "forces_std"} & set(atoms.calc.results)


def test_fine_tuning_widens_the_domain(new_potential, known):
    other = characterized(new_potential("segnn"), [molecule("H2O"), molecule("CO"), copper(3, 1.1)]).domain
    both = domain.merged(other, known.domain)
    assert torch.equal(both.closest, torch.minimum(other.closest, known.domain.closest))
    species = known.symbols
    assert both.neighbors[species.index("H")].tolist() == [2, 2] and both.neighbors[species.index("C")].tolist() == [
        1,
        1,
    ]
    assert both.density == (other.density[0], known.domain.density[1])
    assert both.max_force == max(other.max_force, known.domain.max_force)
    assert both.max_leverage == max(other.max_leverage, known.domain.max_leverage)
    alone = characterized(new_potential("segnn"), [molecule("CO")]).domain
    assert domain.merged(alone, alone).neighbors[species.index("Cu")].tolist() == [1, 0]  # still never seen


def test_a_run_that_leaves_stops_with_both_frames(new_potential, tmp_path):
    soft = new_potential("segnn")
    soft.scales = [1e-3] * 4
    known = characterized(soft, training_set())
    atoms = molecule("CO")
    atoms.positions -= atoms.positions.mean(axis=0)
    other = atoms.copy()
    other.translate([0, 5.0, 0])
    pair = atoms + other
    pair.set_momenta(pair.get_masses()[:, None] * np.array([[0, 0.05, 0]] * 2 + [[0, -0.05, 0]] * 2))
    pair.calc = SEGNNCalculator(known, domain="ignore")
    names = {"trajectory": tmp_path / "md.xyz", "log": tmp_path / "md.csv", "restart": tmp_path / "md.npz"}
    settings = MDConfig(ensemble="nve", steps=400, timestep=0.5, velocities="keep", stop_outside_domain=True, **names)
    with pytest.raises(
        MDError,
        match=r"outside what the potential was trained on: .*What would help: labels for the refused frame, and frames",
    ) as caught:
        run_md(pair, settings, progress=False)
    assert "md_last_good.extxyz" in str(caught.value) and "md_refused.extxyz" in str(caught.value)
    refused, good = (ase.io.read(tmp_path / f"md_{name}.extxyz") for name in ("refused", "last_good"))
    calculator = SEGNNCalculator(known, domain="ignore")
    assert kinds(calculator, refused) and not kinds(calculator, good)
    assert refused.info["step"] == good.info["step"] + 1 and "surroundings" in refused.info["reason"]
    log = np.genfromtxt(tmp_path / "md.csv", delimiter=",", names=True)
    assert not log["outside"].any() and (log["forces_std"] > 0).all()
