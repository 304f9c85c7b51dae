"""Training on labels that contain dispersion: it is taken off, kept with the model, and added again."""

import sys

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import TOML, assert_one_line_error, segnn
from helpers.frames import emt_atoms
from helpers.trainings import configured, leave_out_plots, weights

from segnn_ase import SEGNNCalculator, inspection, load_potential, save_potential
from segnn_ase.base.errors import ConfigError, DataError, MissingExtraError
from segnn_ase.data.dispersed import taken_off, without_dispersion
from segnn_ase.data.frames import frame_from_atoms, read_frames
from segnn_ase.store.model_file import load_committee
from segnn_ase.structure.dispersion import dispersion_of
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.prepare import read_data
from segnn_ase.train.settings import DataConfig, TrainConfig
from segnn_ase.train.start import finetune, train

pytest.importorskip("dftd3")
NAME = "d3bj:pbe"


def copper() -> Atoms:
    return bulk("Cu", cubic=True)


def with_dispersion_added(images: list[Atoms], name: str = NAME) -> list[Atoms]:
    """The same with dispersion in their labels."""
    out = []
    for atoms in images:
        known, d = atoms.calc.results, dispersion_of(name, atoms)
        labels = {"energy": known["energy"] + d.energy, "forces": known["forces"] + d.forces}
        if "stress" in known:
            labels["stress"] = known["stress"] + (d.virial / atoms.get_volume()).flat[[0, 4, 8, 5, 2, 1]]
        copied = atoms.copy()
        copied.calc = SinglePointCalculator(copied, **labels)
        out.append(copied)
    return out


PLAIN = [*emt_atoms(6, copper), *emt_atoms(6, seed=1)]
FULL = with_dispersion_added(PLAIN)
DATA = {"dispersion": NAME, "valid_fraction": 0.25}


@pytest.fixture(scope="module", autouse=True)
def _no_plots():
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        yield


def plain_training(folder, frames=None, **options) -> TrainConfig:
    """Without compiled code, which a training this short does not need."""
    return configured(folder, frames, accelerate="off", **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Trainings on labels with dispersion, taken off, and on the same labels without."""
    full, plain = (tmp_path_factory.mktemp(name) for name in ("full", "plain"))
    train(
        plain_training(full, FULL, data={"dispersion": " D3BJ:PBE", "test": str(full / "train.traj")}), progress=False
    )
    train(plain_training(plain, PLAIN), progress=False)
    return full, plain


def test_labels_lose_what_dispersion_adds():
    frames = [frame_from_atoms(atoms) for atoms in FULL]
    for found, atoms in zip(without_dispersion(frames, NAME), PLAIN, strict=True):
        assert found.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-9)
        np.testing.assert_allclose(found.forces, atoms.calc.results["forces"], atol=1e-9)
        assert (found.stress is None) == (not atoms.pbc.all())
        if found.stress is not None:
            np.testing.assert_allclose(found.stress.flat[[0, 4, 8, 5, 2, 1]], atoms.calc.results["stress"], atol=1e-9)
    assert without_dispersion(frames, None) == frames
    assert taken_off(frames, without_dispersion(frames, NAME), NAME).startswith("dispersion d3bj:pbe taken off")


def test_labels_that_are_not_there_stay_away():
    atoms = molecule("H2O")
    frame = frame_from_atoms(atoms)._replace(forces=np.array([[1.0, 2, 3], [np.nan] * 3, [0, 0, 0]]))
    (found,) = without_dispersion([frame], NAME)
    assert found.energy is None and found.stress is None
    np.testing.assert_array_equal(np.isnan(found.forces), np.isnan(frame.forces))
    assert "there are none" in taken_off([frame._replace(forces=None)], [found._replace(forces=None)], NAME)


def test_the_network_learns_the_rest(pair):
    full, plain = pair
    for name, weight in weights(full / "model.pt").items():
        np.testing.assert_allclose(weight, weights(plain / "model.pt")[name], atol=2e-5, err_msg=name)
    a, b = (load_potential(folder / "model.pt") for folder in pair)
    assert (a.dispersion, b.dispersion) == (NAME, None)
    np.testing.assert_allclose(a.reference_energies, b.reference_energies, atol=1e-8)


def test_the_calculator_adds_it_again(pair):
    for atoms in (FULL[0], FULL[-1]):
        found = []
        for folder in pair:
            changed = atoms.copy()
            changed.calc = SEGNNCalculator(folder / "model.pt", dtype="float64", domain="ignore", accelerate="off")
            found.append((changed.get_potential_energy(), changed.get_forces()))
        added = dispersion_of(NAME, atoms)
        assert found[0][0] - found[1][0] == pytest.approx(added.energy, abs=1e-3)
        np.testing.assert_allclose(found[0][1] - found[1][1], added.forces, atol=1e-3)


def test_errors_and_domain_are_those_of_the_rest(pair):
    """Domain, uncertainty and errors are measured on what the network learns."""
    a, b = (load_potential(folder / "model.pt") for folder in pair)
    np.testing.assert_allclose(a.domain.binding, b.domain.binding, atol=1e-4)
    assert a.domain.max_force == pytest.approx(b.domain.max_force, abs=1e-3)
    errors = [load_committee(folder / "model.pt").metadata["errors"] for folder in pair]
    assert errors[0]["valid"]["forces_rmse"] == pytest.approx(errors[1]["valid"]["forces_rmse"], rel=1e-3)
    assert errors[0][str(pair[0] / "train.traj")]["forces_rmse"] < 2 * errors[0]["train"]["forces_rmse"]


def test_evaluate_compares_totals_with_labels(pair):
    """The errors of the calculator on the labels of the file: those of the network on labels without dispersion."""
    path = str(pair[0] / "train.traj")
    errors = evaluate_files(str(pair[0] / "model.pt"), [path], device="cpu")[path]
    calc = SEGNNCalculator(pair[0] / "model.pt", domain="ignore", accelerate="off")
    found = calc.evaluate(FULL)
    off = np.concatenate([(f["forces"] - a.calc.results["forces"]).ravel() for f, a in zip(found, FULL, strict=True)])
    assert errors["forces_rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-3)
    off = [(f["energy"] - a.calc.results["energy"]) / len(a) for f, a in zip(found, FULL, strict=True)]
    assert errors["energy_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(off))), rel=1e-3)


def test_isolated_atoms_and_tables(tmp_path):
    lone = [Atoms(s, cell=[12.0] * 3, pbc=True) for s in ("Cu", "H", "O")]
    for n, atoms in enumerate(lone):
        atoms.calc = SinglePointCalculator(atoms, energy=-float(n + 1))
    ase.io.write(tmp_path / "lone.traj", lone)
    config = plain_training(tmp_path, FULL, data={**DATA, "isolated_atoms": str(tmp_path / "lone.traj")})
    data = read_data(config, print)
    for n, z in enumerate((29, 1, 8)):
        expected = -float(n + 1) - dispersion_of(NAME, lone[n]).energy  # that of its own images
        assert data.references.values[z] == pytest.approx(expected, abs=1e-12) != -float(n + 1)
    table = {"Cu": -1.0, "H": -2.0, "O": -3.0}
    data = read_data(plain_training(tmp_path, FULL, data={**DATA, "reference_energies": table}), print)
    assert data.references.values == {1: -2.0, 8: -3.0, 29: -1.0}


def test_the_report_says_it(tmp_path):
    told = []
    read_data(plain_training(tmp_path, FULL, data=DATA), told.append)
    assert any("dispersion d3bj:pbe taken off the labels: " in text and "meV/atom" in text for text in told)


def test_what_is_judged_are_the_labels_of_the_file(tmp_path):
    """Energies that are equal to the digit on atoms that have moved: differences of dispersion would hide them."""
    images = [atoms.copy() for atoms in PLAIN[:6]]
    for atoms in images:
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=PLAIN[0].calc.results["forces"])
    config = plain_training(tmp_path, images, data=DATA)
    with pytest.raises(DataError, match="equal"):
        train(config, progress=False)


def test_going_on_with_another_dispersion_is_refused(pair, tmp_path):
    folder = pair[0]
    before = (folder / "model.pt").read_bytes()
    for other in ("d3zero:pbe", None):
        config = plain_training(folder, data={"dispersion": other, "test": str(folder / "train.traj")})
        with pytest.raises(ConfigError, match=r"data\.dispersion = 'd3bj:pbe' \(now "):
            train(config, progress=False)
    assert (folder / "model.pt").read_bytes() == before


def test_fine_tuning_keeps_it(pair, tmp_path):
    config = plain_training(tmp_path, FULL[:6], model={}, epochs=1)
    finetune(str(pair[0] / "model.pt"), config, progress=False)
    potential = load_potential(tmp_path / "model.pt")
    assert potential.dispersion == NAME
    assert load_committee(tmp_path / "model.pt").metadata["training"]["data"]["dispersion"] == NAME
    (tmp_path / "plain").mkdir()
    finetune(
        str(pair[1] / "model.pt"), plain_training(tmp_path / "plain", PLAIN[:6], model={}, epochs=1), progress=False
    )
    other = load_potential(tmp_path / "plain" / "model.pt")
    np.testing.assert_allclose(potential.reference_energies, other.reference_energies, atol=1e-3)
    assert other.dispersion is None


@pytest.mark.parametrize("start, asked, known", [(0, "d3zero:pbe", "'d3bj:pbe' was"), (1, NAME, "no dispersion was")])
def test_fine_tuning_with_another_one_is_refused(pair, tmp_path, start, asked, known):
    config = plain_training(tmp_path, FULL[:6], data={"dispersion": asked}, model={})
    with pytest.raises(
        ConfigError, match=rf"setting 'data\.dispersion' is '{asked}', but {known} taken off the labels"
    ):
        finetune(str(pair[start] / "model.pt"), config, progress=False)
    assert not (tmp_path / "model.pt").exists()


def test_fine_tuning_with_its_own_is_the_same(pair, tmp_path):
    finetune(
        str(pair[0] / "model.pt"), plain_training(tmp_path, FULL[:6], data=DATA, model={}, epochs=1), progress=False
    )
    assert load_potential(tmp_path / "model.pt").dispersion == NAME


def test_a_committee_has_it_in_all_its_members(tmp_path):
    train(plain_training(tmp_path, FULL, data=DATA, committee=2, epochs=1), progress=False)
    assert [p.dispersion for p in load_committee(tmp_path / "model.pt").potentials] == [NAME, NAME]


def test_short_dynamics_of_a_training_have_it(tmp_path, monkeypatch):
    asked = []

    def counted(name, *arguments, **options):
        asked.append(name)
        return dispersion_of(name, *arguments, **options)

    monkeypatch.setattr(inspection, "dispersion_of", counted)
    train(plain_training(tmp_path, FULL, data=DATA, epochs=1, rollout_steps=4), progress=False)
    assert len(asked) >= 2 * 4 and set(asked) == {NAME}


NOT_SETTINGS = {
    "word": "pbe",
    "empty": "",
    "blank": "  ",
    "only_damping": "d3bj",
    "no_functional": "d3bj:",
    "other_method": "mbd:pbe",
    "with_text": "add d3bj:pbe",
    "too_long": "d3bj:" + "p" * 40,
}


@pytest.mark.parametrize("value", NOT_SETTINGS.values(), ids=NOT_SETTINGS)
def test_settings_that_are_none(value):
    with pytest.raises(
        ConfigError, match=r"setting 'data\.dispersion' is .*: expected a damping .* such as 'd3bj:pbe'"
    ):
        TrainConfig.parse({"data": {"train": "frames.xyz", "dispersion": value}})


@pytest.mark.parametrize("value", [True, 3, ["d3bj:pbe"], {"d3bj": "pbe"}])
def test_settings_of_another_type(value):
    with pytest.raises(ConfigError, match=r"'dispersion' is .*: Input should be a valid string"):
        DataConfig(train="frames.xyz", dispersion=value)


def test_a_functional_that_is_unknown_is_refused_before_frames_are_read(tmp_path):
    config = plain_training(tmp_path, data={"dispersion": "d3bj:pbee", "train": str(tmp_path / "none.xyz")})
    with pytest.raises(ConfigError, match="no parameters of d3bj for 'pbee'"):
        train(config, progress=False)


def test_elements_without_parameters_are_refused(tmp_path):
    heavy = [Atoms([104] * 4, atoms.positions, cell=atoms.cell, pbc=True) for atoms in PLAIN[:4]]
    for atoms, like in zip(heavy, PLAIN, strict=False):
        atoms.calc = SinglePointCalculator(atoms, **like.calc.results)
    with pytest.raises(ConfigError, match="no parameters for Rf"):
        train(plain_training(tmp_path, heavy, data=DATA), progress=False)


def test_a_frame_that_has_no_dispersion_is_named(tmp_path):
    (frame,) = read_frames(_written(tmp_path, PLAIN[:1]))
    spot = frame._replace(atoms=Atoms("H2", [[0, 0, 0], [0, 0, 0]]))
    with pytest.raises(DataError, match=r"train\.traj.*[Tt]oo close"):
        without_dispersion([frame._replace(energy=1.0), spot], NAME)


def _written(folder, images) -> str:
    ase.io.write(folder / "train.traj", images)
    return str(folder / "train.traj")


def test_a_missing_library_is_told_before_frames_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dftd3", None)
    config = plain_training(tmp_path, data={"dispersion": NAME, "train": str(tmp_path / "none.xyz")})
    with pytest.raises(MissingExtraError, match=r"pip install 'segnn-ase\[dispersion\]'"):
        train(config, progress=False)


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("train.xyz", FULL)
    (tmp_path / "c.toml").write_text(TOML.replace('train = "train.xyz"', f'train = "train.xyz"\ndispersion = "{NAME}"'))
    assert_one_line_error(segnn("train", "c.toml", "--dispersion", "d3:pbe"), "setting 'data.dispersion' is 'd3:pbe'")
    result = segnn("train", "c.toml", "--epochs", "1", "--rollout-steps", "0", "--accelerate", "off")
    assert result.exit_code == 0, result.output
    assert "dispersion d3bj:pbe taken off the labels" in result.output
    assert "dispersion  d3bj:pbe" in segnn("info", "model.pt").stdout
    ase.io.write("a.xyz", PLAIN[-1])
    done = segnn("md", "a.xyz", "--model", "model.pt", "--steps", "2", "--out", "run", "--dispersion", "d3zero:pbe")
    assert_one_line_error(done, "'d3zero:pbe', but 'd3bj:pbe' was taken off")
    run = ["md", "a.xyz", "--model", "model.pt", "--steps", "2", "--out", "run", "--domain", "ignore"]
    assert segnn(*run, "--accelerate", "off").exit_code == 0
    assert_one_line_error(
        segnn("finetune", "model.pt", "--train", "train.xyz", "--out", "t.pt", "--dispersion", "d3zero:pbe"),
        "fine-tuning keeps that",
    )


def test_a_potential_keeps_it_when_it_is_saved_again(pair, tmp_path):
    save_potential(tmp_path / "again.pt", load_potential(pair[0] / "model.pt"))
    assert load_potential(tmp_path / "again.pt").dispersion == NAME
