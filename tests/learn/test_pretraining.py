"""A loop that begins with a potential: of a cheaper reference, or one that is there."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import segnn
from helpers.loops import SMALL, loop_settings
from helpers.trainings import configured

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError
from segnn_ase.learn.labelled import read_whole
from segnn_ase.learn.loop import learn
from segnn_ase.learn.settings import LearnConfig
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import Committee, load_with_metadata, save_committee, save_potential
from segnn_ase.train.start import train

TESTS = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("few_epochs")
BOTH = {"reference": "emt", "model": "cu.pt"}


@pytest.fixture(autouse=True)
def in_tests(monkeypatch):
    monkeypatch.chdir(TESTS)  # where references are imported from


def settings(folder: Path, crystal, **sections) -> dict:
    stiffer = {"reference": {"calculator": "helpers.references:Stiffer"}}
    return loop_settings(folder, crystal, **stiffer) | sections


def test_a_cheaper_reference_is_learned_first(tmp_path, crystal):
    budget = {"labels": 40, "minutes": 1.0, "rounds": 1, "first_labels": 8, "round_labels": 6}
    values = settings(tmp_path, crystal, pretraining={"reference": "emt", "share": 0.1}, budget=budget)
    found = learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    reasons = {frame.info["key"]: frame.info["reason"] for frame in read_whole(folder / "frames.xyz")}
    assert found.labels == len(reasons) <= 40 and not any(told.startswith("rattled") for told in reasons.values())
    assert sum(key.startswith("0/chosen/") for key in reasons) == 8  # by the dynamics of the pretrained potential
    cheap = read_whole(folder / "pretrained.learn" / "frames.xyz")
    assert len(cheap) > 20 and any(frame.info["reason"].startswith("rattled") for frame in cheap)
    _, metadata = load_with_metadata(found.model)
    origin = metadata["learned_from"]
    assert (origin["reference"], origin["pretrained_on"]["reference"]) == ("helpers.references:Stiffer", "emt")
    assert metadata["fine_tuned_from"]["learned_from"]["reference"] == "emt"
    assert metadata["training"]["training"]["epochs"] == 3  # those of the last training, not of the first loop
    assert metadata["training"]["finetune"]["keep"] == "nothing"  # of the cheaper reference
    text = Path(found.report).read_text()
    assert "from a potential of emt: effective medium theory" in text and "](cu.learn/pretrained.report.md)" in text
    assert (folder / "pretrained.report.md").exists()
    pretrained = (folder / "pretrained.pt").read_bytes()
    assert learn(LearnConfig.parse(values), progress=False) == found
    more = {**values, "budget": {**budget, "rounds": 2, "minutes": 1.5, "labels": 60}}
    assert learn(LearnConfig.parse(more), progress=False).labels > found.labels
    assert (folder / "pretrained.pt").read_bytes() == pretrained  # what it began with stays
    another = {**values, "pretraining": {"model": found.model}, "model": {}}
    with pytest.raises(
        ConfigError, match=r"'pretraining.reference' is None, but the loop .* begun with {'calculator': 'emt'"
    ):
        learn(LearnConfig.parse(another), progress=False)


def test_a_potential_that_is_there(tmp_path, crystal):
    begin = tmp_path / "begin.pt"
    train(configured(tmp_path, labelled(crystal, 8), model=SMALL), progress=False)
    (tmp_path / "model.pt").rename(begin)
    values = settings(tmp_path, crystal, pretraining=str(begin), model={})
    values["budget"] |= {"rounds": 1}
    found = learn(LearnConfig.parse(values), progress=False)
    assert load_with_metadata(found.model)[0].config == model_config(**SMALL)
    assert f"Trainings go on from {begin}" in Path(found.report).read_text()
    begin.unlink()  # it is in the folder
    values["budget"] |= {"rounds": 2, "labels": 90}
    more = learn(LearnConfig.parse(values), progress=False)
    assert more.labels > found.labels
    crystal.calc = SEGNNCalculator(more.model, domain="ignore")
    assert np.isfinite(crystal.get_forces()).all()


def labelled(crystal: Atoms, count: int) -> list[Atoms]:
    found = []
    for n in range(count):
        frame = crystal.copy()
        frame.rattle(0.1, seed=n)
        frame.calc = EMT()
        energy, forces = frame.get_potential_energy(), frame.get_forces()
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        found.append(frame)
    return found


def test_it_goes_on_after_the_first_loop(tmp_path, crystal, monkeypatch):
    """Stopped between the two, its clock is that of the loop itself, and nothing is asked for twice."""
    budget = {"labels": 40, "minutes": 1.0, "rounds": 1, "first_labels": 8, "round_labels": 6}
    values = settings(tmp_path, crystal, pretraining={"reference": "emt", "share": 0.1}, budget=budget)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("segnn_ase.learn.loop.dynamics_of_pretrained", interrupted)
        learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    state = json.loads((folder / "state.json").read_text())
    first = json.loads((folder / "pretrained.learn" / "state.json").read_text())
    assert state["decided"]["seconds of pretraining"] == 6 and state["seconds"] < first["seconds"]
    assert state["decided"]["seconds that pretraining took"] == pytest.approx(first["seconds"], abs=10)
    before = (folder / "pretrained.pt").stat().st_mtime_ns, len(read_whole(folder / "frames.xyz"))
    assert learn(LearnConfig.parse(values), progress=False).minutes >= round(first["seconds"] / 60, 1)
    assert before == ((folder / "pretrained.pt").stat().st_mtime_ns, 3)  # two steps of a relaxation


def test_dynamics_that_end_at_once_are_filled_up(tmp_path, crystal, monkeypatch):
    """The first frames are then displaced structures, as without a potential."""
    train(configured(tmp_path, labelled(crystal, 8), model=SMALL), progress=False)
    values = settings(tmp_path, crystal, pretraining=str(tmp_path / "model.pt"), model={})
    values["budget"] |= {"rounds": 1}
    monkeypatch.setattr("segnn_ase.learn.loop.chosen", lambda *args, **kwargs: [])
    learn(LearnConfig.parse(values), progress=False)
    begun = read_whole(tmp_path / "cu.learn" / "start.xyz")
    assert len(begun) == 8 and all(frame.info["reason"].startswith("rattled") for frame in begun)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"pretraining": {}}, "setting 'pretraining' is {}: expected a reference or a model, got neither"),
        ({"pretraining": BOTH}, "got both, model is 'cu.pt'"),
        (
            {"pretraining": {"reference": {"calculator": "helpers.references:Stiffer", "workers": 2}}},
            "the reference itself, 'helpers",
        ),
        ({"pretraining": "gfn-xtb"}, "did you mean 'gfn2-xtb'"),
        ({"pretraining": {"refrence": "emt"}}, "unknown setting 'pretraining.refrence': did you mean 'reference'"),
        ({"pretraining": {"reference": {"worker": 2}}}, "pretraining.reference.worker': did you mean 'workers'"),
        ({"pretraining": "emt", "training": {"teachers": 2}}, "teachers is 2, .* has no teachers: leave it out"),
        ({"pretraining": {"reference": "emt", "share": 0.9}}, "less than or equal to 0.8"),
        ({"pretraining": "copper.pt"}, "is that of copper.pt, which pretraining names: leave it out"),
    ],
)
def test_settings_that_cannot_be(tmp_path, crystal, sections, told):
    with pytest.raises(ConfigError, match=told):
        LearnConfig.parse(settings(tmp_path, crystal, **sections))


def test_potentials_that_cannot_be(tmp_path, crystal):
    small = model_config(**SMALL)
    save_potential(tmp_path / "bare.pt", Potential(small, [29]))
    save_potential(tmp_path / "jumps.pt", Potential(model_config(preset="segnn2022"), [29]))
    save_committee(tmp_path / "two.pt", Committee([Potential(small, [29]), Potential(small, [29])], {}, {}))
    for name, told in {
        "bare": "does not say what it was trained on",
        "jumps": "energy jumps at the cutoff",
        "two": "of 2 potentials; expected one",
    }.items():
        values = settings(tmp_path, crystal, pretraining=str(tmp_path / f"{name}.pt"), model={})
        with pytest.raises(ConfigError, match=rf"pretraining has '.*{name}\.pt'.*{told}"):
            learn(LearnConfig.parse({**values, "out": str(tmp_path / f"of-{name}.pt")}), progress=False)
    with pytest.raises(ConfigError, match=r"pretraining has '.*', which does not know Cu"):
        learn(LearnConfig.parse(settings(tmp_path, crystal, pretraining="lithium-pbe", model={})), progress=False)
    with pytest.raises(FileNotFoundError, match=r"no such file .*shipped are"):
        learn(LearnConfig.parse(settings(tmp_path, crystal, pretraining="none.pt", model={})), progress=False)


def test_what_a_cheaper_reference_does_not_hear_is_told_before_anything_is_done(tmp_path):
    ion = molecule("H2O")
    ion.info["charge"] = 1
    ion.write(tmp_path / "ion.xyz")
    values = {"structures": str(tmp_path / "ion.xyz"), "out": str(tmp_path / "ion.pt"), "reference": "gfn2-xtb"}
    with pytest.raises(ConfigError, match="charge = 1, which 'sevennet-0' knows nothing of"):
        learn(LearnConfig.parse({**values, "pretraining": "sevennet-0"}), progress=False)
    assert not (tmp_path / "ion.learn" / "frames.xyz").exists()


def test_the_option(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crystal.write("cu.xyz")
    result = segnn("learn", "cu.xyz", "--reference", "emt", "--pretraining", "none.pt")
    assert result.exit_code == 1 and "'none.pt': there is no such file" in result.stderr
    assert "did you mean 'emt'?" in segnn("learn", "cu.xyz", "--reference", "emt", "--pretraining", "empt").stderr
    seen = []
    monkeypatch.setattr("segnn_ase.learn.loop.learn", lambda config: seen.append(config.pretraining) or 1 / 0)
    table = """structures = "cu.xyz"
reference = {calculator = "emt"}
pretraining = {share = 0.5, reference = {calculator = "sevennet-0", workers = 2}}
"""
    Path("learn.toml").write_text(table)
    for options in ((), ("--threads", 4), ("--pretraining", "chgnet"), ("--pretraining", "lithium-pbe")):
        segnn("learn", "learn.toml", *options)
    found = [each.reference and (each.reference.calculator, each.reference.threads) for each in seen]
    assert found == [("sevennet-0", None), ("sevennet-0", 2), ("chgnet", None), None]
    assert [each.share for each in seen] == 4 * [0.5] and seen[2].reference.workers == 2
    assert seen[3].model == "lithium-pbe"
