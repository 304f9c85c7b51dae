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
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import segnn

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DataError, LabelError, ReferenceStartError
from segnn_ase.learn.explore import LONGEST, OUTSIDE, Condition, Planned, Ran, patience, plan_runs
from segnn_ase.learn.finish import last_training, why_not_good
from segnn_ase.learn.labelled import LabelledFrames, asked_frame, read_whole
from segnn_ase.learn.labeller import AskingCalculator, Labeller, other_answer
from segnn_ase.learn.loop import is_good, learn, picoseconds_of, read_structures
from segnn_ase.learn.pool import LabelPool, ReferenceLabel
from segnn_ase.learn.report import Trial
from segnn_ase.learn.rounds import EPOCHS, RATE, STRONGEST, drawn, in_brief, is_sane, usable
from segnn_ase.learn.settings import AimConfig, ConditionsConfig, LearnConfig, ReferenceConfig, StartConfig
from segnn_ase.learn.starts import displaced, relaxed_by_reference, shortest
from segnn_ase.store.model_file import load_with_metadata

TESTS = Path(__file__).parent.parent
STILL = ConditionsConfig()
SMALL = {"hidden_irreps": "4x0e+4x1o", "lmax_attr": 1, "cutoff": 3.5, "n_radial": 4, "radial_hidden": [8]}


@pytest.fixture
def crystal():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.02, seed=0)
    return atoms


def settings(folder: Path, crystal: Atoms, **sections) -> dict:
    crystal.write(folder / "cu.xyz")
    values = {
        "out": str(folder / "cu.pt"),
        "structures": [str(folder / "cu.xyz")],
        "reference": {"calculator": "emt"},
        "conditions": {"temperature": [300.0], "picoseconds": 0.04, "starts": 2},
        "budget": {"labels": 60, "minutes": 600.0, "rounds": 2, "first_labels": 8, "round_labels": 6},
        "start": {"relax_steps": 2},
        "model": SMALL,
        "training": {"epochs": 3, "device": "cpu"},
        "aim": {"forces": 1.0},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return values


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (2, 2))


def test_a_loop_ends_and_leaves_everything(tmp_path, crystal):
    values = settings(tmp_path, crystal, budget={"labels": 150})
    found = learn(LearnConfig.parse(values), progress=False)
    assert not found.reached and "rounds are over" in found.why
    folder = tmp_path / "cu.learn"
    frames = ase.io.read(folder / "frames.xyz", ":")
    assert found.labels == len(frames) == len({frame.info["key"] for frame in frames})
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
    assert "labels      " in segnn("info", found.model).output
    written = Path(found.model).stat().st_mtime_ns
    assert learn(LearnConfig.parse(values), progress=False) == found  # nothing is left to do
    assert Path(found.model).stat().st_mtime_ns == written
    more = settings(tmp_path, crystal, budget={"rounds": 3, "labels": 250})
    assert learn(LearnConfig.parse(more), progress=False).labels > found.labels
    assert len(json.loads((folder / "state.json").read_text())["rounds"]) == 3
    with pytest.raises(ConfigError, match=r"temperature' is \[500.0\], but the loop .* begun with \[300.0\]"):
        learn(LearnConfig.parse(settings(tmp_path, crystal, conditions={"temperature": 500})), progress=False)


def test_it_ends_where_it_is_good_enough(tmp_path, crystal):
    values = settings(tmp_path, crystal, aim={"forces": 1e5}, budget={"rounds": 12, "labels": 200})
    found = learn(LearnConfig.parse(values), progress=False)
    rows = json.loads((tmp_path / "cu.learn" / "state.json").read_text())["rounds"]
    assert found.reached == (not rows[-1]["stops"]) and found.reached and found.why == ""
    assert not (tmp_path / "cu.learn" / f"round-{len(rows):03d}" / "chosen.xyz").exists()


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
    values = settings(tmp_path, crystal, budget={"rounds": 1}) | {"frames": [str(tmp_path / "known.xyz")]}
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
    values = settings(tmp_path, crystal) | {"frames": str(tmp_path / "other.xyz")}
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
    values = settings(tmp_path, crystal)
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
import segnn_ase.learn.rounds as rounds
rounds.EPOCHS = (2, 2)
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
    return settings(folder, crystal, reference=reference)


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
            2,
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
    values = settings(tmp_path, crystal, reference={"calculator": "not_yet:Calculator"}, budget={"rounds": 1})
    with pytest.raises(ReferenceStartError, match="No module named 'not_yet'"):
        learn(LearnConfig.parse(values), progress=False)
    (tmp_path / "not_yet.py").write_text("from ase.calculators.emt import EMT as Calculator")
    assert learn(LearnConfig.parse(values), progress=False).labels > 10


def test_a_last_training_goes_on_though_its_time_has_passed(tmp_path, crystal, monkeypatch):
    values = settings(tmp_path, crystal, budget={"rounds": 1, "minutes": 0.6})
    values["training"] = {"device": "cpu", "teachers": 0}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("segnn_ase.learn.finish.verify", killed)
    monkeypatch.setattr("segnn_ase.learn.finish.OFTEN", 0)  # by the clock, whatever it allows
    with pytest.raises(KeyboardInterrupt):
        learn(LearnConfig.parse(values), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", (2, 2))
    assert Path(learn(LearnConfig.parse(values), progress=False).model).exists()


@pytest.mark.parametrize(("minutes", "of_a_round"), [(0.01, True), (1000, False)])
def test_a_last_training_of_few_epochs_is_one_of_a_round(tmp_path, crystal, monkeypatch, minutes, of_a_round):
    monkeypatch.setattr("segnn_ase.learn.rounds.EPOCHS", EPOCHS)  # as they are
    values = {name: value for name, value in settings(tmp_path, crystal).items() if name != "training"}
    values["budget"] = {"minutes": minutes}
    training = last_training(LearnConfig.parse(values), [crystal] * 40, tmp_path, 0.0).training
    assert (training.epochs == EPOCHS[0] and training.learning_rate == RATE) is of_a_round
    assert (training.minutes is None) is of_a_round


def test_a_structure_that_was_replaced_is_noticed(tmp_path, crystal):
    values = settings(tmp_path, crystal, budget={"rounds": 1})
    learn(LearnConfig.parse(values), progress=False)
    crystal.rattle(0.05, seed=5)
    with pytest.raises(ConfigError, match="'files' is"):
        learn(LearnConfig.parse(settings(tmp_path, crystal, budget={"rounds": 2})), progress=False)
    (tmp_path / "cu.learn" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json cannot be read"):
        learn(LearnConfig.parse(values), progress=False)


def test_a_reference_that_always_fails_ends_it(tmp_path, crystal):
    values = settings(tmp_path, crystal, reference={"calculator": "no_module:Calculator"})
    with pytest.raises(ReferenceStartError, match="no_module:Calculator does not start: ModuleNotFoundError"):
        learn(LearnConfig.parse(values), progress=False)
    xenon = settings(tmp_path, Atoms("Xe2", [[0, 0, 0], [0, 0, 4]]), out=str(tmp_path / "xe.pt"))
    with pytest.raises(LabelError, match="No EMT-potential for Xe"):
        learn(LearnConfig.parse(xenon), progress=False)


def test_what_is_there_is_not_overwritten(tmp_path, crystal):
    (tmp_path / "cu.pt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is of no loop"):
        learn(LearnConfig.parse(settings(tmp_path, crystal)), progress=False)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"conditions": {"temperature": "hot"}}, "expected temperatures in K"),
        ({"conditions": {"temperature": "0:300"}}, "above 0"),
        ({"conditions": {"temperature": []}}, "at least 1"),
        ({"budget": {"labels": 20, "first_labels": 21}}, "more than budget.labels, 20"),
        ({"model": {"preset": "segnn2022"}}, "take another preset"),
        ({"training": {"committee": 3}}, "expected one potential"),
        ({"out": "model.pth"}, "ends in .pt"),
        ({"reference": {"calculator": "emt", "worker": 2}}, "did you mean 'workers'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, crystal, sections, told):
    values = settings(tmp_path, crystal)
    values = {**values, **{name: s if name == "out" else {**s} for name, s in sections.items()}}
    with pytest.raises(ConfigError, match=told):
        LearnConfig.parse(values)


def test_structures_that_cannot_be(tmp_path, crystal):
    for name, text, told in (("one.xyz", "1\n\nCu 0 0 0\n", "one atom"), ("bad.xyz", "x\n", "cannot read")):
        (tmp_path / name).write_text(text)
        values = {**settings(tmp_path, crystal), "structures": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=told):
            learn(LearnConfig.parse(values), progress=False)
    values = settings(tmp_path, Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]]), conditions={"pressure": [1.0]})
    with pytest.raises(ConfigError, match="no structure is periodic"):
        learn(LearnConfig.parse(values), progress=False)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("300:1200", (300, 750, 1200)),
        ("300,600", (300, 600)),
        (300, (300,)),
        (["300", "400:500"], (300, 400, 450, 500)),
    ],
)
def test_temperatures_in_words(tmp_path, crystal, given, meant):
    config = LearnConfig.parse(settings(tmp_path, crystal, conditions={"temperature": given}))
    assert config.conditions.temperature == meant


def test_frames_torn_by_a_kill_are_cut_off(tmp_path, crystal):
    labelled = LabelledFrames(tmp_path)
    label = ReferenceLabel(1.0, np.full((4, 3), 0.1), np.arange(6.0), 0.01)
    for n in range(3):
        labelled.add(asked_frame(crystal, f"0/{n}", 0, "", "test"), label)
    labelled.fail(asked_frame(crystal, "0/3", 0, "", "test"), 'it said "no"\n and went')
    whole = (tmp_path / "frames.xyz").read_bytes()
    for size in (len(whole) - 1, len(whole) - 30, len(whole) - 200):
        (tmp_path / "frames.xyz").write_bytes(whole[:size])
        again = LabelledFrames(tmp_path)
        assert list(again.frames) == ["0/0", "0/1"] and again.failed == {"0/3": "it said 'no' and went"}
        assert "0/3" in again and "0/2" not in again and again.count == 3
    assert (tmp_path / "frames.xyz").read_bytes() == whole[: len(whole) // 3 * 2]
    (tmp_path / "frames.xyz").write_bytes(whole + "4\n\u00c5".encode()[:-1])  # torn within a letter
    assert len(LabelledFrames(tmp_path).frames) == 3
    (tmp_path / "frames.xyz").write_text("what\n")
    with pytest.raises(DataError, match="damaged at line 1"):
        LabelledFrames(tmp_path)


def test_a_relaxation_is_read_where_it_was_made(tmp_path, crystal):
    with LabelPool(ReferenceConfig(calculator="emt"), tmp_path / "a") as pool:
        labeller = Labeller(pool, LabelledFrames(tmp_path))
        relaxed, keys = relaxed_by_reference(labeller, crystal, 20, "0/relax/1", STILL)
        crystal.calc = AskingCalculator(labeller, "0/relax/1", "relaxation")
        assert np.abs(relaxed.positions - crystal.positions).max() > 0.005
    with LabelPool(ReferenceConfig(calculator="no:Such"), tmp_path / "b") as pool:
        again, same = relaxed_by_reference(Labeller(pool, LabelledFrames(tmp_path)), crystal, 20, "0/relax/1", STILL)
    assert same == keys and np.array_equal(again.positions, relaxed.positions)


def test_first_frames_differ_and_keep_apart(crystal):
    found = displaced([crystal], 12, StartConfig(rattle=0.3, strain=0.1), seed=3)
    assert len({atoms.positions.tobytes() for atoms, _ in found}) == 12
    assert min(shortest(atoms) for atoms, _ in found) > 0.6 * shortest(crystal)
    strained = [atoms for atoms, told in found if "strained" in told]
    assert len(strained) == 6 and all(abs(a.cell.volume / crystal.cell.volume - 1) > 1e-4 for a in strained)
    again = displaced([crystal], 12, StartConfig(rattle=0.3, strain=0.1), seed=3)
    assert all(np.array_equal(a.positions, b.positions) for (a, _), (b, _) in zip(found, again, strict=True))


def test_frames_beyond_all_reason_are_left_out(crystal):
    near = crystal.copy()
    near.positions[1] = near.positions[0] + [0, 0, 0.5]
    gone = crystal.copy()
    gone.positions[0, 0] = np.nan
    assert [is_sane(atoms) for atoms in (crystal, near, gone)] == [True, False, False]
    labels = [np.full((4, 3), size) for size in (0.1, 2 * STRONGEST)]
    frames = []
    for forces in labels:
        frames.append(crystal.copy())
        frames[-1].calc = SinglePointCalculator(frames[-1], energy=0.0, forces=forces)
    assert usable(frames) == frames[:1]


def test_reasons_are_short():
    told = (
        "stopped at step 5 (2.5 fs): this is outside what the potential was trained on: H 3 has 2 H; more. What would "
    )
    assert in_brief(f"{told}help: x. The frame before is in atoms") == "H 3 has 2 H"
    assert in_brief("the run does not start: the forces are uncertain by 2 eV/Å, above 1").startswith("the forces are")


def test_other_answers(crystal):
    first, near = crystal.copy(), crystal.copy()
    near.positions += 1e-4
    near.positions[0, 0] += 3e-4
    for atoms in (first, near):
        atoms.calc = EMT()
        atoms.get_forces()
    assert other_answer(first, near) == ""
    for name, wrong in (("forces", 0.1), ("stress", 0.01), ("energy", 0.1)):
        right = near.calc.results.get(name, near.get_stress() if name == "stress" else None)
        first.get_stress()
        near.calc.results[name] = right + wrong
        assert name in other_answer(first, near)
        near.calc.results[name] = right


@pytest.mark.parametrize("npt_cell", ["isotropic", "full"])
def test_cells_move_where_a_pressure_is_given(tmp_path, crystal, npt_cell):
    moved = {"pressure": [0.0, 5.0], "npt_cell": npt_cell, "starts": 1}
    values = settings(tmp_path, crystal, conditions=moved, budget={"rounds": 1})
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


def test_a_cell_moves_at_a_pressure_only():
    with pytest.raises(ConfigError, match="npt_cell is 'full' without a pressure"):
        LearnConfig.parse({"structures": "a.cif", "reference": "emt", "conditions": {"npt_cell": "full"}})


def test_dynamics_go_further_where_errors_are_small():
    aim = AimConfig(forces=40.0)
    assert patience(aim, []) == patience(aim, [{"forces": None}]) == patience(aim, [{"forces": 90.0}]) == OUTSIDE
    assert patience(aim, [{"forces": 90.0}, {"forces": 20.0}]) == 2 * OUTSIDE
    assert patience(aim, [{"forces": 0.1}]) == LONGEST


def test_why_the_last_potential_is_not_good(crystal):
    planned = [Planned(Condition(0, t, None), 0, crystal, 100, 1.0, 0, 1.0, 50.0) for t in (300.0, 600.0)]
    ran = [Ran(each, 100, None, [], []) for each in planned]
    config = LearnConfig.parse({"structures": "cu.xyz", "reference": "emt", "aim": {"forces": 20, "energy": 2}})
    here = {run.planned.condition.name: 15.0 for run in ran}
    good = {"forces": 15.0, "energy": 1.0, "stress": None, "by_condition": here}
    assert why_not_good(config, Trial(ran, []), good) == ""
    stopped = [ran[0], ran[1]._replace(reason="the distance is new")]
    assert "were stopped" in why_not_good(config, Trial(stopped, []), good)
    assert "no time" in why_not_good(config, Trial([ran[0], ran[1]._replace(steps=5)], []), good)
    assert "not known at every" in why_not_good(config, Trial(ran, []), good | {"by_condition": {"there": 1.0}})
    assert "above it" in why_not_good(config, Trial(ran, []), good | {"energy": 3.0})
    assert "above it" in why_not_good(config, Trial(ran, []), good | {"by_condition": here | {"here": 30.0}})


def test_few_labels_are_shared_out(tmp_path, crystal):
    values = settings(tmp_path, crystal, budget={"first_labels": None, "round_labels": None, "rounds": 20})
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
    values = settings(tmp_path, crystal, aim={"stress": 1.0})
    with pytest.raises(ConfigError, match=r"aim.stress is 1, but 'emt' gives no stress of these structures"):
        learn(LearnConfig.parse(values), progress=False)


def test_what_a_reference_would_ignore_is_refused(tmp_path):
    path = str(tmp_path / "o2.extxyz")

    def read(atoms: Atoms, reference: str) -> list[Atoms]:
        atoms.write(path)
        return read_structures(LearnConfig.parse({"structures": path, "reference": reference}))

    oxygen = molecule("O2")  # with moments
    for reference in ("pyscf", "gfn2-xtb"):
        with pytest.raises(ConfigError, match=r"with magnetic moments, of which .* give that as spin"):
            read(oxygen, reference)
    oxygen.info["spin"] = 3
    assert read(oxygen, "pyscf")[0].info["spin"] == 3
    with pytest.raises(ConfigError, match="spin = 3, which 'emt' knows nothing of"):
        read(oxygen, "emt")
    oxygen.cell, oxygen.pbc = [9, 9, 9], True
    with pytest.raises(ConfigError, match="'pyscf' is for molecules: set pbc to false"):
        read(oxygen, "pyscf")
    assert len(read(oxygen, "gfn2-xtb")) == 1


def test_limited_labels_begin_with_longer_dynamics():
    given = {"structures": "cu.xyz", "reference": "emt", "conditions": {"picoseconds": 10}}
    free, few = LearnConfig.parse(given), LearnConfig.parse(given | {"budget": {"labels": 60}})
    assert [picoseconds_of(free, n) for n in (1, 2, 5, 6, 9)] == [0.5, 1.0, 8.0, 10.0, 10.0]
    assert [picoseconds_of(few, n) for n in (1, 2, 3, 4)] == [2.5, 5.0, 10.0, 10.0]


def test_every_condition_is_measured():
    crystal = bulk("Cu", cubic=True)
    ran = []
    for structure in range(3):
        for temperature in (300.0, 600.0, 900.0):
            for number in range(2):
                planned = Planned(Condition(structure, temperature, None), number, crystal, 100, 1.0, 0, 1.0, 50.0)
                ran.append(Ran(planned, 100, None, [crystal.copy() for _ in range(5)], []))
    for round_ in (1, 2):
        found = drawn(ran, 8, round_, 0)
        assert Counter(frame.info["condition"] for frame in found) == {run.planned.condition.name: 1 for run in ran}
    assert len(drawn(ran, 30, 1, 0)) == 30 and len({frame.info["key"] for frame in drawn(ran, 90, 1, 0)}) == 90
    nothing = [run._replace(frames=[]) for run in ran[:2]] + ran[2:]
    row = {"picoseconds": 10.0, "energy": 1.0, "stress": None, "forces": 10.0}
    row["by_condition"] = {frame.info["condition"]: 10.0 for frame in drawn(nothing, 8, 1, 0)}
    config = LearnConfig(structures="a", reference="emt")
    assert not is_good(config, nothing, row)
    row["by_condition"][ran[0].planned.condition.name] = 39.0
    assert is_good(config, nothing, row)
    assert not is_good(config, [run._replace(steps=50) for run in ran], row)
    row["by_condition"][ran[0].planned.condition.name] = 41.0
    assert not is_good(config, ran, row)


def test_labels_that_take_too_long_are_refused(tmp_path, crystal, monkeypatch):
    monkeypatch.chdir(TESTS)
    values = settings(tmp_path, crystal, reference={"calculator": "helpers.references:Slow"}, start={"relax_steps": 0})
    values["budget"] = {"minutes": 0.1}
    with pytest.raises(ConfigError, match=r"budget.minutes is 0.1, of which a quarter allows \d labels"):
        learn(LearnConfig.parse(values), progress=False)


def test_where_runs_begin(crystal):
    """Frames every 10 fs of 100, of a run that is told by its first atom's place, in Å."""
    conditions = {"temperature": [300.0, 900.0], "starts": 3}
    config = LearnConfig.parse({"structures": "cu.xyz", "reference": "emt", "conditions": conditions})

    def made(temperature: float, number: int, reason: str | None) -> Ran:
        frames = []
        for step in range(10, 101, 10):
            frame = crystal.copy()
            frame.positions[0] = [temperature, number, step]
            frame.info["step"] = step
            frames.append(frame)
        planned = Planned(Condition(0, temperature, None), number, crystal, 100, 1.0, 0, 1.0, 50.0)
        return Ran(planned, 100, reason, frames, [])

    def begun(before: list[Ran]) -> list[list[float]]:
        planned = plan_runs(config, [crystal], 2, before, 1.0, 1.0)
        assert [each.condition.temperature for each in planned] == [300.0] * 3 + [900.0] * 3
        return [each.start.positions[0].round(6).tolist() for each in planned]

    origin = crystal.positions[0].round(6).tolist()
    well = [made(t, number, None) for t in (300.0, 900.0) for number in range(3)]
    last = [900.0, 1.0, 100.0]
    assert begun(well) == [[300.0, 0.0, 100.0], last, origin, [900.0, 0.0, 100.0], last, origin]
    stopped = [run._replace(reason="it is new") for run in well]
    home = [900.0, 1.0, 50.0]
    assert begun(stopped) == [origin, home, origin, origin, home, origin]
    assert begun([run._replace(steps=30) for run in stopped]) == [origin] * 6  # they were never at home
    assert begun([]) == [origin] * 6
