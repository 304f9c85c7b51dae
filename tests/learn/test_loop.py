"""The whole loop, small: it ends, goes on exactly after any kill, and notices a reference that changes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.command_line import segnn
from helpers.loops import loop_settings

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DataError, LabelError, ReferenceStartError
from segnn_ase.learn.labelled import LabelledFrames, read_whole
from segnn_ase.learn.labeller import Labeller
from segnn_ase.learn.loop import DRAWN, learn
from segnn_ase.learn.pool import LabelPool
from segnn_ase.learn.rounds import round_folder
from segnn_ase.learn.settings import ConditionsConfig, LearnConfig, ReferenceConfig
from segnn_ase.learn.starts import relaxed_by_reference
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.train.start import train

TESTS = Path(__file__).parent.parent
STILL = ConditionsConfig()
pytestmark = pytest.mark.usefixtures("few_epochs")
SLOW = {"calculator": "helpers.references:Slow"}


def test_a_loop_ends_and_leaves_everything(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, budget={"labels": 150})
    found = learn(LearnConfig.parse(values), progress=False)
    assert not found.reached and "rounds are over" in found.why
    assert found.errors["forces"] > 0 and found.errors["drawn"] > 0
    folder = tmp_path / "cu.learn"
    frames = ase.io.read(folder / "frames.xyz", ":")
    assert found.labels == len(frames) == len({frame.info["key"] for frame in frames})
    of_dynamics = [frame for frame in frames if frame.info["key"].split("/")[1] in ("drawn", "chosen")]
    assert len({frame.positions.tobytes() for frame in of_dynamics}) == len(of_dynamics) > 10  # none twice
    assert {frame.info["reason"].partition(" ")[0] for frame in frames} >= {"relaxation", "rattled", "drawn", "control"}
    rows = json.loads((folder / "state.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [1, 2] and all(row["forces"] > 0 for row in rows)
    crystal.calc = SEGNNCalculator(found.model)
    assert np.isfinite(crystal.get_forces()).all()
    _, metadata = load_with_metadata(found.model)
    assert metadata["learned_from"]["reference"] == "emt" and metadata["verified"]
    text = Path(found.report).read_text()
    assert "LGPL" in text and "| 2 |" in text and "checks hold" in text and (tmp_path / "cu.report.png").exists()
    assert "| mode 5 / cm⁻¹ |" in text and "effective sample size" in text
    assert " minima of the potential" not in text  # all are one
    assert "labels      " in segnn("info", found.model).output
    written = Path(found.model).stat().st_mtime_ns
    assert learn(LearnConfig.parse(values), progress=False) == found  # nothing is left to do
    assert Path(found.model).stat().st_mtime_ns == written
    more = loop_settings(tmp_path, crystal, budget={"rounds": 3, "labels": 250})
    assert learn(LearnConfig.parse(more), progress=False).labels > found.labels
    assert len(json.loads((folder / "state.json").read_text())["rounds"]) == 3
    with pytest.raises(ConfigError, match=r"temperature' is \[500.0\], but the loop .* begun with \[300.0\]"):
        learn(LearnConfig.parse(loop_settings(tmp_path, crystal, conditions={"temperature": 500})), progress=False)


def test_it_ends_where_it_is_good_enough(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, aim={"forces": 1e5}, budget={"rounds": 12, "labels": 200})
    found = learn(LearnConfig.parse(values), progress=False)
    rows = json.loads((tmp_path / "cu.learn" / "state.json").read_text())["rounds"]
    assert found.reached == (not rows[-1]["stops"]) and found.reached and found.why == ""
    last = tmp_path / "cu.learn" / f"round-{len(rows):03d}"
    assert not (last / "chosen.xyz").exists()
    first, more = (read_whole(last / f"{name}.xyz") for name in DRAWN)
    assert len(more) > len(first) > 0 and rows[-1]["drawn"] == len(first) + len(more)  # it is measured before believed
    assert {frame.info["key"] for frame in [*first, *more]} <= {frame.info["key"] for frame in last_learned(tmp_path)}
    assert f"± {rows[-1]['scatter']:.1f}" in Path(found.report).read_text()


def last_learned(folder: Path) -> list[Atoms]:
    return read_whole(next((folder / "cu.learn").glob("final-*/train.xyz")))


def interrupted(*args):
    raise KeyboardInterrupt


def test_cheap_labels_fill_the_last_training(tmp_path, crystal, monkeypatch):
    """With frames of the last round's dynamics that were not labelled yet; a loop that goes on learns them, too."""
    monkeypatch.setattr("segnn_ase.learn.filling.PASSES", 0.01)
    budget = {"minutes": 0.5, "rounds": 1, "first_labels": 8, "round_labels": 6}
    values = {**loop_settings(tmp_path, crystal), "budget": budget, "training": {"device": "cpu"}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("segnn_ase.learn.finish.last_training", interrupted)
        learn(LearnConfig.parse(values), progress=False)
    (last,) = (tmp_path / "cu.learn").glob("final-001-*")
    (last / "train.xyz").unlink()  # stopped while these were labelled
    learn(LearnConfig.parse(values), progress=False)
    more = {frame.info["key"] for frame in read_whole(last / "more.xyz")}
    learned = read_whole(last / "train.xyz")
    assert len(more) > 5 and more <= {frame.info["key"] for frame in learned}
    assert len({frame.positions.round(3).tobytes() for frame in learned}) == len(learned)
    learn(LearnConfig.parse({**values, "budget": {**budget, "rounds": 2, "minutes": 1.0}}), progress=False)
    second = read_whole(tmp_path / "cu.learn" / "round-002" / "train.xyz")
    assert more <= {frame.info["key"] for frame in second}


def test_frames_that_are_there(tmp_path, crystal):
    known = []
    for n in range(6):
        frame = crystal.copy()
        frame.rattle(0.1, seed=n)
        frame.calc = EMT()
        frame.calc = SinglePointCalculator(frame, energy=frame.get_potential_energy(), forces=frame.get_forces())
        known.append(frame)
    lone = Atoms("Cu", calculator=EMT())
    lone.calc = SinglePointCalculator(lone, energy=lone.get_potential_energy(), forces=np.zeros((1, 3)))
    ase.io.write(tmp_path / "known.xyz", [*known, lone])
    values = loop_settings(tmp_path, crystal, budget={"rounds": 1}) | {"frames": [str(tmp_path / "known.xyz")]}
    found = learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    first = ase.io.read(folder / "round-001" / "train.xyz", ":")
    assert np.allclose(first[0].positions, known[0].positions) and sum(f.info["reason"] == "given" for f in first) == 7
    assert found.labels == len(read_whole(folder / "frames.xyz"))  # they cost nothing
    assert "given: 7" in Path(found.report).read_text()
    (tmp_path / "known.xyz").unlink()  # they are in the folder
    more = {**values, "budget": {**values["budget"], "rounds": 2, "labels": 90}}
    assert learn(LearnConfig.parse(more), progress=False).labels > found.labels


def test_frames_of_another_reference_are_noticed(tmp_path, crystal):
    crystal.calc = SinglePointCalculator(crystal, energy=1.0, forces=np.zeros((4, 3)))
    ase.io.write(tmp_path / "other.xyz", crystal)
    values = loop_settings(tmp_path, crystal) | {"frames": str(tmp_path / "other.xyz")}
    with pytest.raises(LabelError, match=r"'frames' has labels of another reference than 'emt': energy .* frame 0"):
        learn(LearnConfig.parse(values), progress=False)
    crystal.calc = SinglePointCalculator(crystal, energy=1.0)
    ase.io.write(tmp_path / "bare.xyz", crystal)
    values |= {"frames": str(tmp_path / "bare.xyz"), "out": str(tmp_path / "bare.pt")}
    with pytest.raises(DataError, match="without forces: expected the energy and the whole forces"):
        learn(LearnConfig.parse(values), progress=False)


def test_the_command(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crystal.write("cu.xyz")
    result = segnn("learn", "cu.xyz", "--reference", "empt")
    assert result.exit_code == 1 and "did you mean 'emt'?" in result.stderr
    assert "expected one TOML file" in segnn("learn", "a.toml", "cu.xyz").stderr
    assert "reference is missing: give --reference, gfn2-xtb" in segnn("learn", "cu.xyz").stderr
    assert "several temperatures: 300,600" in segnn("learn", "cu.xyz", "600", "--reference", "emt").stderr
    ion = crystal.copy()
    ion.info["charge"] = 1
    ion.write("ion.xyz")
    assert "charge = 1, which 'emt' knows nothing of" in segnn("learn", "ion.xyz", "--reference", "emt").stderr
    values = loop_settings(tmp_path, crystal)
    lines = ['out = "cu.pt"', 'structures = "cu.xyz"']
    for name in ("reference", "conditions", "budget", "start", "model", "training", "aim"):
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values[name].items())]
    Path("learn.toml").write_text("\n".join(lines))
    result = segnn("learn", "learn.toml", "--labels", 20, "--temperature", "300:500", "--out", "other.pt")
    assert result.exit_code == 0, result.stderr
    assert "wrote other.pt and other.report.md" in result.stdout and "the aim is not reached" in result.stdout
    assert "300 K, 400 K, 500 K" in Path("other.report.md").read_text()


LOOP = """
import sys, torch
import segnn_ase.learn.choice as choice
import segnn_ase.learn.rounds as rounds
rounds.EPOCHS = (2, 2)
choice.OF_MINIMA, choice.LONGEST = 2, 3
torch.set_num_threads(1)
from segnn_ase.learn import LearnConfig, learn
import json
learn(LearnConfig.parse(json.loads(sys.argv[1])), progress=False)
"""


def run_loop(values: dict) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([sys.executable, "-c", LOOP, json.dumps(values)], cwd=TESTS, env=environment)


def counted(folder: Path, crystal: Atoms) -> dict:
    folder.mkdir()
    arguments = {"counts": str(folder / "counts.txt"), "shift": str(folder / "shifted")}
    reference = {"calculator": "helpers.references:Counting", "arguments": arguments}
    return loop_settings(folder, crystal, reference=reference)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.proof)])
def test_kills_lose_nothing(tmp_path, crystal, kills):
    whole, killed = (counted(tmp_path / name, crystal) for name in ("whole", "killed"))
    for values in (whole, killed):
        values["budget"] |= {"rounds": 2 if kills < 10 else 5, "labels": 200}
    begin = time.monotonic()
    assert run_loop(whole).wait(timeout=600) == 0
    seconds, rng = time.monotonic() - begin, random.Random(0)
    done = 0
    while done < kills:
        process = run_loop(killed)
        time.sleep(rng.uniform(0.1, 0.5) * seconds)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
    assert done >= 2
    print(f"{done} kills")
    assert run_loop(killed).wait(timeout=600) == 0
    lines = Path(killed["reference"]["arguments"]["counts"]).read_text().splitlines()
    assert max(Counter(lines).values()) == 1
    assert len(lines) == len(Path(whole["reference"]["arguments"]["counts"]).read_text().splitlines())
    frames = [ase.io.read(tmp_path / name / "cu.learn" / "frames.xyz", ":") for name in ("whole", "killed")]
    assert any(frame.info["reason"] == "minimum of the potential" for frame in frames[0])
    assert [frame.info["key"] for frame in frames[0]] == [frame.info["key"] for frame in frames[1]]
    for one, other in zip(*frames, strict=True):
        assert np.array_equal(one.positions, other.positions) and np.array_equal(one.get_forces(), other.get_forces())
    weights = [dict(load_with_metadata(tmp_path / name / "cu.pt")[0].state_dict()) for name in ("whole", "killed")]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_a_reference_that_changes_is_noticed(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(TESTS)
    values = counted(tmp_path / "loop", crystal)
    values["budget"]["labels"] = 200
    first = {**values, "budget": {**values["budget"], "rounds": 1}}
    learn(LearnConfig.parse(first), progress=False)
    folder = tmp_path / "loop" / "cu.learn"
    before = len(read_whole(folder / "frames.xyz"))
    (tmp_path / "loop" / "shifted").touch()
    with pytest.raises(LabelError, match=r"answers otherwise than in the beginning: energy 250 meV/atom off"):
        learn(LearnConfig.parse(values), progress=False)
    assert len(read_whole(folder / "frames.xyz")) == before
    assert len(read_whole(folder / "set_aside.xyz")) > 1
    (tmp_path / "loop" / "shifted").unlink()
    assert learn(LearnConfig.parse(values), progress=False).labels > before


def test_a_reference_that_changes_among_the_first_labels(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(TESTS)
    values = counted(tmp_path / "loop", crystal)
    folder = tmp_path / "loop" / "cu.learn"
    with LabelPool(ReferenceConfig(**values["reference"]), folder / "workers") as pool:  # stopped after the relaxation
        relaxed_by_reference(
            Labeller(pool, LabelledFrames(folder)),
            ase.io.read(values["structures"][0]),
            lambda: 2,
            "0/relax/1",
            ConditionsConfig(),
        )
    (tmp_path / "loop" / "shifted").touch()
    with pytest.raises(LabelError, match="labels of the beginning are set aside"):
        learn(LearnConfig.parse(values), progress=False)
    (tmp_path / "loop" / "shifted").unlink()
    values["budget"]["rounds"] = 1
    learn(LearnConfig.parse(values), progress=False)
    frames = read_whole(folder / "frames.xyz")
    assert np.ptp([frame.get_potential_energy() for frame in frames]) < 1.0


def test_what_is_missing_may_be_installed(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = loop_settings(tmp_path, crystal, reference={"calculator": "not_yet:Calculator"}, budget={"rounds": 1})
    with pytest.raises(ReferenceStartError, match="No module named 'not_yet'"):
        learn(LearnConfig.parse(values), progress=False)
    (tmp_path / "not_yet.py").write_text("from ase.calculators.emt import EMT as Calculator")
    assert learn(LearnConfig.parse(values), progress=False).labels > 10


def test_a_last_training_goes_on_though_its_time_has_passed(tmp_path, crystal, monkeypatch):
    values = loop_settings(tmp_path, crystal, budget={"rounds": 1, "minutes": 0.6})
    values["training"] = {"device": "cpu", "teachers": 0}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("segnn_ase.learn.finish.OFTEN", 0)  # by the clock, whatever it allows
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("segnn_ase.learn.finish.verify", killed)
        learn(LearnConfig.parse(values), progress=False)
    assert Path(learn(LearnConfig.parse(values), progress=False).model).exists()


def test_flaws_are_let_pass_by_the_setting_that_is_advised(tmp_path, crystal, monkeypatch):
    def strict(config, **kwargs):
        if config.data.refuse_flaws:
            raise DataError("labels are wrong (refuse_flaws = false under [data])")
        return train(config, **kwargs)

    monkeypatch.setattr("segnn_ase.learn.pretraining.train", strict)
    values = loop_settings(tmp_path, crystal, budget={"rounds": 1})
    with pytest.raises(DataError, match="refuse_flaws = false in the TOML file of the loop"):
        learn(LearnConfig.parse(values), progress=False)
    assert learn(LearnConfig.parse({**values, "refuse_flaws": False}), progress=False).labels


def test_another_trial_has_dynamics_of_its_own(tmp_path, crystal, monkeypatch):
    """Of the first one frames are learned; and where its rounds were good enough, there is one more round."""
    monkeypatch.setattr("segnn_ase.learn.finish.why_not_good", lambda *_: "it was not")
    values = loop_settings(tmp_path, crystal, aim={"forces": 1e5}, budget={"rounds": 9, "labels": 200})
    learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    rounds = len(list(folder.glob("round-*")))
    learn(LearnConfig.parse(loop_settings(tmp_path, crystal, **{**values, "aim": {"forces": 9e4}})), progress=False)
    assert len(list(folder.glob("round-*"))) == rounds + 1
    first, second = sorted(folder.glob("final-*"))
    assert first.name[:9] == f"final-{rounds:03d}" and second.name[:9] == f"final-{rounds + 1:03d}"
    learned = {frame.info["key"] for frame in read_whole(second / "train.xyz")}
    drawn_before = read_whole(first / "drawn.xyz")
    drawn_before += read_whole(round_folder(LearnConfig.parse(values), rounds) / "drawn_more.xyz")
    assert len(drawn_before) > 5 and {frame.info["key"] for frame in drawn_before} <= learned
    for name in ("s1-300K-1.xyz", "s1-300K-2.xyz"):
        momenta = [read_whole(place / name)[0].get_momenta() for place in (first, second)]
        assert np.abs(momenta[0] - momenta[1]).max() > 1e-3


def test_relaxations_have_a_tenth_of_the_minutes(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(TESTS)
    values = loop_settings(tmp_path, crystal, reference=SLOW, start={"relax_steps": 30})
    values["budget"] = {"minutes": 0.35, "rounds": 1, "round_labels": 4}  # 21 s
    learn(LearnConfig.parse(values), progress=False)
    decided = json.loads((tmp_path / "cu.learn" / "state.json").read_text())["decided"]
    assert 2 <= decided["relax_steps"] <= 4


def test_threads_are_those_of_the_reference_too(tmp_path, crystal, monkeypatch):
    seen = []
    monkeypatch.setattr("segnn_ase.learn.loop.learn", lambda config: seen.append(config) or 1 / 0)
    crystal.write(tmp_path / "cu.xyz")
    for options in ((), ("--threads", 4), ("--threads", 4, "--workers", 2)):
        segnn("learn", tmp_path / "cu.xyz", "--reference", "emt", *options)
    assert [config.reference.threads for config in seen] == [None, 4, 2]


def test_a_structure_that_was_replaced_is_noticed(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, budget={"rounds": 1})
    learn(LearnConfig.parse(values), progress=False)
    crystal.rattle(0.05, seed=5)
    with pytest.raises(ConfigError, match="'files' is"):
        learn(LearnConfig.parse(loop_settings(tmp_path, crystal, budget={"rounds": 2})), progress=False)
    (tmp_path / "cu.learn" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json cannot be read"):
        learn(LearnConfig.parse(values), progress=False)


def test_a_reference_that_always_fails_ends_it(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, reference={"calculator": "no_module:Calculator"})
    with pytest.raises(ReferenceStartError, match="no_module:Calculator does not start: ModuleNotFoundError"):
        learn(LearnConfig.parse(values), progress=False)
    xenon = loop_settings(tmp_path, Atoms("Xe2", [[0, 0, 0], [0, 0, 4]]), out=str(tmp_path / "xe.pt"))
    with pytest.raises(LabelError, match="No EMT-potential for Xe"):
        learn(LearnConfig.parse(xenon), progress=False)


def test_what_is_there_is_not_overwritten(tmp_path, crystal):
    (tmp_path / "cu.pt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is of no loop"):
        learn(LearnConfig.parse(loop_settings(tmp_path, crystal)), progress=False)


@pytest.mark.parametrize("npt_cell", ["isotropic", "full"])
def test_cells_move_where_a_pressure_is_given(tmp_path, crystal, npt_cell):
    moved = {"pressure": [0.0, 5.0], "npt_cell": npt_cell, "starts": 1}
    values = loop_settings(tmp_path, crystal, conditions=moved, budget={"rounds": 1})
    values["budget"]["labels"] = None
    values["start"]["dynamics_steps"] = None
    values["budget"]["minutes"] = 60.0
    learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    frames = {path.stem: read_whole(path) for path in (folder / "round-001").glob("s1-*GPa-1.xyz")}
    assert set(frames) == {"s1-300K-0GPa-1", "s1-300K-5GPa-1"}
    assert all(abs(run[-1].cell.volume - run[0].cell.volume) > 1e-6 for run in frames.values())
    keys = [frame.info["key"] for frame in read_whole(folder / "frames.xyz")]
    decided = json.loads((folder / "state.json").read_text())["decided"]["dynamics_steps"]
    assert decided >= 200 and f"0/dynamics/1/{decided}" in keys
    relaxed = [frame for frame in read_whole(folder / "frames.xyz") if frame.info["key"].startswith("0/relax/1/")]
    assert len({round(frame.cell.volume, 6) for frame in relaxed}) == len(relaxed) > 1  # by the stress
    for last in (relaxed[-1], *(run[-1] for run in frames.values())):
        assert bool(np.ptp(last.cell.cellpar()[:3]) > 1e-6) is (npt_cell == "full")


def test_a_crystal_at_a_pressure_beside_a_slab(tmp_path, crystal):
    """The cell of the slab stays, and so does its lowest layer; both are learned by one potential."""
    slab = fcc111("Cu", (1, 1, 3), vacuum=6.0)
    slab.pbc, slab.info = (True, True, False), {}
    slab.set_constraint(FixAtoms([0]))
    slab.write(tmp_path / "slab.xyz")
    values = loop_settings(tmp_path, crystal, conditions={"pressure": [1.0], "starts": 1}, budget={"rounds": 1})
    values["structures"].append(str(tmp_path / "slab.xyz"))
    found = learn(LearnConfig.parse(values), progress=False)
    folder = tmp_path / "cu.learn"
    runs = {path.stem: read_whole(path) for path in (folder / "round-001").glob("s*-1.xyz")}
    assert set(runs) == {"s1-300K-1GPa-1", "s2-300K-1"}
    first, last = runs["s2-300K-1"][0], runs["s2-300K-1"][-1]
    assert np.array_equal(first.cell.array, last.cell.array) and list(last.pbc) == [True, True, False]
    moved = np.linalg.norm(last.positions - first.positions, axis=1)
    assert moved[0] == 0.0 and moved[1:].min() > 1e-3
    learned = ase.io.read(folder / "round-001" / "train.xyz", ":")
    assert {len(frame) for frame in learned} == {3, 4}
    assert "structure 2, 300 K: " in Path(found.report).read_text()


def test_few_labels_are_shared_out(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, budget={"first_labels": None, "round_labels": None, "rounds": 20})
    values["budget"]["labels"] = 30
    found = learn(LearnConfig.parse(values), progress=False)
    frames = read_whole(tmp_path / "cu.learn" / "frames.xyz")
    reasons = Counter(frame.info["reason"].partition(" ")[0] for frame in frames)
    assert found.labels == len(frames) <= 30 and reasons["rattled"] == 8
    last = [frame.info["key"] for frame in frames if frame.info["key"].startswith("final-")]
    assert 4 <= len(last) <= 8 and "0 of the last round held out" in Path(found.report).read_text()
    rows = json.loads((tmp_path / "cu.learn" / "state.json").read_text())["rounds"]
    assert len(rows) >= 2
    more = {**values, "budget": {**values["budget"], "labels": 45}}
    assert learn(LearnConfig.parse(more), progress=False).labels > 30
    rounds = json.loads((tmp_path / "cu.learn" / "state.json").read_text())["rounds"]
    assert len(rounds) > len(rows)
    source = tmp_path / "cu.learn" / f"round-{len(rows) + 1:03d}" / "train.xyz"
    assert {frame.info["key"] for frame in read_whole(source)} >= {key for key in last if "/drawn/" in key}


def test_a_stress_that_nobody_knows(tmp_path, crystal):
    crystal.pbc = (True, True, False)
    values = loop_settings(tmp_path, crystal, aim={"stress": 1.0})
    with pytest.raises(ConfigError, match=r"aim.stress is 1, but 'emt' gives no stress of these structures"):
        learn(LearnConfig.parse(values), progress=False)


def test_labels_that_take_too_long_are_refused(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(TESTS)
    values = loop_settings(tmp_path, crystal, reference=SLOW, start={"relax_steps": 0})
    values["budget"] = {"minutes": 0.1}
    with pytest.raises(ConfigError, match=r"budget.minutes is 0.1, of which a quarter allows \d labels"):
        learn(LearnConfig.parse(values), progress=False)
