"""Dispersion in the calculator, in model files and in verify: total = network + dispersion, or refused by name."""

import copy
import pickle
import sys
from functools import partial

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from helpers.command_line import assert_one_line_error, segnn
from helpers.potentials import tiny_potential
from helpers.systems import copper, ethanol, rattled, slab

from segnn_ase import SEGNNCalculator, inspection, load_potential, save_potential
from segnn_ase.base.errors import ConfigError, MissingExtraError, ModelFileError
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.model.potential import Potential
from segnn_ase.store.description import describe_model
from segnn_ase.store.model_file import Committee, load_committee, read_committee, save_committee
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.structure.dispersion import dispersion_hessian, dispersion_of
from segnn_ase.verify import added, checks, run
from segnn_ase.verify.run import verify

pytest.importorskip("dftd3")
NAME = "d3bj:pbe"
SYSTEMS = {"molecule": ethanol, "crystal": lambda: rattled(copper()), "slab": lambda: rattled(slab())}


def dispersed(seed: int = 0, name: str | None = NAME) -> Potential:
    potential = tiny_potential(seed)
    potential.dispersion = name
    return potential


def calculator(potential, **options) -> SEGNNCalculator:
    return SEGNNCalculator(potential, device="cpu", accelerate="off", **options)


def both(atoms: Atoms, **options) -> tuple[Atoms, Atoms]:
    """The structure with dispersion and without."""
    with_it, without = atoms.copy(), atoms.copy()
    with_it.calc, without.calc = calculator(dispersed(), **options), calculator(tiny_potential(), **options)
    return with_it, without


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_total_is_the_sum(system):
    atoms, network = both(SYSTEMS[system]())
    added = dispersion_of(NAME, network)
    assert abs(atoms.get_potential_energy() - network.get_potential_energy() - added.energy) < 1e-9
    assert atoms.calc.results["free_energy"] == atoms.calc.results["energy"]
    np.testing.assert_allclose(atoms.get_forces(), network.get_forces() + added.forces, atol=1e-9)
    if atoms.pbc.all():
        expected = network.get_stress(voigt=False) + added.virial / atoms.get_volume()
        np.testing.assert_allclose(atoms.get_stress(voigt=False), expected, atol=1e-9)
    assert abs(atoms.get_potential_energies().sum() - atoms.get_potential_energy()) < 1e-9
    assert np.abs(atoms.get_potential_energies() - network.get_potential_energies()).max() > 1e-4


def test_the_energy_alone_is_the_same():
    atoms, network = both(ethanol())
    assert atoms.get_potential_energy() - network.get_potential_energy() == pytest.approx(
        dispersion_of(NAME, network).energy, abs=1e-9
    )
    assert "forces" not in atoms.calc.results


@pytest.mark.parametrize("system", SYSTEMS)
def test_forces_and_stress_are_derivatives_of_the_total(system):
    atoms, _ = both(SYSTEMS[system]())
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=1e-4)
    if atoms.pbc.all():
        np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-4), atol=1e-5)


def test_many_structures_at_once():
    structures, potential = [build() for build in SYSTEMS.values()], dispersed()
    found = calculator(potential).evaluate(structures, ("energy", "energies", "forces", "stress"))
    for atoms, results in zip(structures, found, strict=True):
        atoms.calc = calculator(potential)
        assert results["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(results["energies"], atoms.get_potential_energies(), atol=1e-9)
        np.testing.assert_allclose(results["forces"], atoms.get_forces(), atol=1e-9)
        assert ("stress" in results) == bool(atoms.pbc.all())
    assert "energies" not in calculator(potential).evaluate(structures[:1])[0]  # never those of the network


def test_the_hessian_has_both():
    atoms, network = both(ethanol())
    expected = network.calc.get_hessian(network) + dispersion_hessian(NAME, network)
    np.testing.assert_allclose(atoms.calc.get_hessian(atoms), expected, atol=1e-9)
    atoms.get_forces()
    np.testing.assert_allclose(atoms.calc.get_hessian(), expected, atol=1e-9)


def test_what_cannot_be_shared_out_is_refused_by_name():
    atoms, _ = both(SYSTEMS["crystal"]())
    for get, what in (
        (atoms.get_stresses, "stresses"),
        (lambda: atoms.calc.get_virials(atoms), "virials"),
        (lambda: atoms.calc.get_heat_flux(atoms), "heat flux"),
        (lambda: atoms.calc.evaluate([atoms], ["stresses"]), "stresses"),
    ):
        with pytest.raises(PropertyNotImplementedError, match=f"{what}.* with dispersion 'd3bj:pbe': dftd3 does not"):
            get()


def test_what_is_of_the_network_stays():
    atoms, network = both(ethanol(), domain="ignore")
    np.testing.assert_array_equal(atoms.calc.get_descriptors(atoms), network.calc.get_descriptors(network))
    shipped = "silicon-pbe", Atoms("Si8", np.random.default_rng(0).uniform(0, 9, (8, 3)), cell=[9, 9, 9], pbc=True)
    found = [SEGNNCalculator(shipped[0], dispersion=d, domain="ignore", accelerate="off") for d in (None, NAME)]
    ways = []
    for calc in found:
        calc.calculate(shipped[1], ["forces"])
        ways.append((calc.results["outside_domain"], calc.results["energy_std"], calc.results["forces_std"].tolist()))
    assert ways[0] == ways[1] and ways[0][0]


def test_the_calculator_is_copied_with_it():
    atoms, _ = both(ethanol())
    energy = atoms.get_potential_energy()
    for other in (pickle.loads(pickle.dumps(atoms.calc)), copy.deepcopy(atoms.calc)):
        changed = ethanol()
        changed.calc = other
        assert changed.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    assert atoms.calc.todict()["dispersion"] == NAME
    assert "dispersion" not in calculator(tiny_potential()).todict()


def test_labels_without_it_get_it_where_the_calculator_is_told():
    atoms, network = both(ethanol())
    network.calc = calculator(tiny_potential(), dispersion=" D3BJ:PBE")
    assert network.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    assert calculator(dispersed(), dispersion=NAME).todict() == atoms.calc.todict()  # not twice


def test_files(tmp_path):
    potential, path, old = dispersed(), tmp_path / "m.pt", tmp_path / "old.pt"
    save_potential(path, potential)
    assert load_potential(path).dispersion == NAME
    assert "dispersion  d3bj:pbe, taken off the labels" in describe_model(*read_committee(path))
    loaded, given = ethanol(), ethanol()
    loaded.calc, given.calc = calculator(path), calculator(potential)
    assert loaded.get_potential_energy() == given.get_potential_energy()
    content = load_tensors(path)
    del content["dispersion"]
    save_tensors(old, content)  # as files were before
    assert load_potential(old).dispersion is None
    assert "dispersion" not in describe_model(*read_committee(old))


def test_committees(tmp_path):
    members = [dispersed(seed) for seed in (0, 1)]
    save_committee(tmp_path / "c.pt", Committee(members, {"energy": 1.0}, {}))
    assert [p.dispersion for p in load_committee(tmp_path / "c.pt").potentials] == [NAME, NAME]
    atoms = ethanol()
    atoms.calc = calculator(tmp_path / "c.pt")
    mean = np.mean([calculator(tiny_potential(seed)).evaluate([atoms])[0]["energy"] for seed in (0, 1)])
    assert atoms.get_potential_energy() == pytest.approx(mean + dispersion_of(NAME, atoms).energy, abs=1e-9)
    assert atoms.calc.results["energy_std"] > 0


def forged(tmp_path, value):
    save_potential(tmp_path / "m.pt", dispersed())
    save_tensors(tmp_path / "m.pt", {**load_tensors(tmp_path / "m.pt"), "dispersion": value})
    return tmp_path / "m.pt"


def mixed_file(tmp_path):
    save_committee(tmp_path / "c.pt", Committee([dispersed(0), dispersed(1)], {}, {}))
    content = load_tensors(tmp_path / "c.pt")
    content["members"][1]["dispersion"] = None
    save_tensors(tmp_path / "c.pt", content)
    return tmp_path / "c.pt"


def heavy() -> Potential:
    potential = Potential(tiny_potential().config, [1, 104])
    potential.dispersion = NAME
    return potential


MISTAKES = {
    "keyword": (lambda _: calculator(tiny_potential(), dispersion="pbe"), ConfigError, "dispersion is 'pbe'; expected"),
    "keyword_number": (lambda _: calculator(tiny_potential(), dispersion=3), ConfigError, "dispersion is 3; expected"),
    "misspelt": (lambda _: calculator(tiny_potential(), dispersal=NAME), ConfigError, "did you mean 'dispersion'"),
    "functional": (
        lambda _: calculator(tiny_potential(), dispersion="d3bj:pbee"),
        ConfigError,
        "no parameters of d3bj for 'pbee'",
    ),
    "another": (
        lambda _: calculator(dispersed(), dispersion="d3zero:pbe"),
        ConfigError,
        "dispersion is 'd3zero:pbe', but 'd3bj:pbe' was taken off the labels",
    ),
    "attribute": (lambda _: calculator(dispersed(name="d4:pbe")), ConfigError, "dispersion is 'd4:pbe'; expected"),
    "too_heavy": (lambda _: calculator(heavy()), ConfigError, "no parameters for Rf"),
    "members": (
        lambda _: calculator([dispersed(), tiny_potential()]),
        ConfigError,
        r"members of the committee have different dispersion: \['d3bj:pbe', None\]; expected the same",
    ),
    "saved": (
        lambda d: save_potential(d / "m.pt", dispersed(name="yes")),
        ConfigError,
        "dispersion is 'yes'; expected",
    ),
    "saved_members": (
        lambda d: save_committee(d / "c.pt", Committee([dispersed(), tiny_potential()], {}, {})),
        ConfigError,
        "same elements, cutoff and dispersion",
    ),
    "mixed_file": (lambda d: load_committee(mixed_file(d)), ModelFileError, "other elements, cutoffs or dispersion"),
    "forged_name": (lambda d: load_potential(forged(d, "d3bj:" + "p" * 600)), ModelFileError, "dispersion is 'd3bj:pp"),
    "forged_empty": (lambda d: load_potential(forged(d, "")), ModelFileError, "dispersion is ''; expected"),
    "forged_zero": (lambda d: load_potential(forged(d, 0)), ModelFileError, "dispersion is 0; expected"),
    "forged_false": (lambda d: load_potential(forged(d, False)), ModelFileError, "dispersion is False; expected"),
    "forged_list": (lambda d: load_potential(forged(d, [NAME])), ModelFileError, r"dispersion is \['d3bj:pbe'\]"),
    "forged_functional": (lambda d: load_potential(forged(d, "d3bj:walrus")), ConfigError, "d3bj for 'walrus'"),
    "verify": (
        lambda _: verify(dispersed(), ethanol(), dispersion="d3bj:pbe0"),
        ConfigError,
        "'d3bj:pbe0', but 'd3bj:pbe' was taken off",
    ),
}


@pytest.mark.parametrize("mistake, error, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(tmp_path, mistake, error, message):
    with pytest.raises(error, match=message):
        mistake(tmp_path)


def test_without_the_library_it_is_refused_when_the_model_is_loaded(tmp_path, monkeypatch):
    save_potential(tmp_path / "m.pt", dispersed())
    save_potential(tmp_path / "plain.pt", tiny_potential())
    ase.io.write(tmp_path / "a.xyz", ethanol())
    monkeypatch.setitem(sys.modules, "dftd3", None)
    for load in (load_potential, load_committee, calculator, lambda path: verify(path, ethanol())):
        with pytest.raises(MissingExtraError, match=r"pip install 'segnn-ase\[dispersion\]'"):
            load(tmp_path / "m.pt")
    with pytest.raises(MissingExtraError, match="needs dftd3"):
        calculator(tmp_path / "plain.pt", dispersion=NAME)
    for command in ("md", "verify"):
        model = ["--model", tmp_path / "m.pt"] if command == "md" else []
        arguments = [tmp_path / "a.xyz", *model] if model else [tmp_path / "m.pt", tmp_path / "a.xyz"]
        assert_one_line_error(segnn(command, *arguments, *(["--out", tmp_path / "x"] * bool(model))), "needs dftd3")
    assert "dispersion  d3bj:pbe" in segnn("info", tmp_path / "m.pt").stdout
    calculator(tmp_path / "plain.pt").calculate(ethanol())


def test_dynamics_go_on_with_the_same_dispersion_only(tmp_path):
    atoms = ethanol()
    atoms.calc = calculator(tiny_potential(), dispersion=NAME)
    files = {"trajectory": "t.xyz", "log": "l.csv", "restart": "r.npz"}
    settings = {name: str(tmp_path / file) for name, file in files.items()}
    run_md(atoms, MDConfig(steps=3, timestep=0.1, **settings), progress=False)
    for other in ("d3zero:pbe", None):
        again = ethanol()
        again.calc = calculator(tiny_potential(), dispersion=other)
        with pytest.raises(ConfigError, match=r"calculator.dispersion was .*d3bj:pbe"):
            run_md(again, MDConfig(steps=5, timestep=0.1, **settings), progress=False)


def test_verify_checks_the_sum_and_all_else_without_it():
    certificate = verify(dispersed(), rattled(copper()), accelerate="off", steps=20)
    assert not certificate.failed
    lines = {check.name: check for check in certificate.checks}
    assert all(lines[f"total = network + dispersion, {x}"].tolerance == 1e-9 for x in ("energy", "forces", "stress"))
    assert certificate.context["dispersion"].startswith(NAME)


@pytest.fixture
def quick_verify(monkeypatch):
    """Of a molecule, with the lines about isolated atoms and the sum alone."""
    monkeypatch.setattr(run, "CHECKS", (checks.isolated_atoms, added.dispersion))
    return partial(verify, atoms=ethanol(), accelerate="off", steps=20)


def test_verify_of_a_molecule(quick_verify):
    assert not quick_verify(dispersed()).failed
    asked = quick_verify(tiny_potential(), dispersion="d3zero:pbe")
    assert not asked.failed and asked.context["dispersion"].startswith("d3zero:pbe")


@pytest.mark.parametrize("wrong", ["energy", "forces"])
def test_verify_finds_a_total_that_is_not_the_sum(quick_verify, monkeypatch, wrong):
    def less(*arguments, **options):
        found = dispersion_of(*arguments, **options)
        value = getattr(found, wrong)
        return found if value is None else found._replace(**{wrong: 0.99999 * value})

    monkeypatch.setattr(inspection, "dispersion_of", less)
    assert f"total = network + dispersion, {wrong}" in quick_verify(dispersed()).failed


def test_verify_without_dispersion_has_no_line_about_it(quick_verify):
    certificate = quick_verify(tiny_potential())
    assert not [check for check in certificate.checks if "dispersion" in check.name]
    assert "dispersion" not in certificate.context
