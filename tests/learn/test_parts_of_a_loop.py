"""What a loop is made of: settings, first frames, what is drawn and chosen, where runs begin, what a label costs."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.loops import asking, loop_settings

import segnn_ase
from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.learn.choice import FMAX, chosen, drawn, evenly_spaced, in_brief, is_sane, relaxed_frames
from segnn_ase.learn.explore import LONGEST, OUTSIDE, Condition, Planned, Ran, patience, plan_runs
from segnn_ase.learn.finish import AFTER, epochs_of_last, last_training, why_not_good
from segnn_ase.learn.labelled import LabelledFrames, asked_frame
from segnn_ase.learn.labeller import AskingCalculator, Labeller, nudged, other_answer
from segnn_ase.learn.loop import is_good, learn, measured_on_dynamics, picoseconds_of, read_structures
from segnn_ase.learn.pool import LabelPool, ReferenceLabel
from segnn_ase.learn.report import Trial
from segnn_ase.learn.rounds import (
    PASSED,
    STRONGEST,
    epochs_within,
    rms_in_milli,
    round_folder,
    scatter_in_milli,
    usable,
)
from segnn_ase.learn.settings import AimConfig, ConditionsConfig, LearnConfig, ReferenceConfig, StartConfig
from segnn_ase.learn.starts import displaced, relaxed_by_reference, shortest
from segnn_ase.learn.state import Loop, LoopState
from segnn_ase.store.model_file import load_potential
from segnn_ase.store.shipped import find_model

STILL = ConditionsConfig()


def test_a_setting_that_was_not_there_yet_had_its_default(tmp_path, crystal):
    values = loop_settings(tmp_path, crystal, conditions={"pressure": [0.0]})
    begun = LoopState(LearnConfig.parse(values), [crystal])
    begun.save()
    content = json.loads(begun.path.read_text())
    del content["settings"]["conditions"]["npt_cell"], content["settings"]["frames"]  # of an older version
    begun.path.write_text(json.dumps(content))
    LoopState(LearnConfig.parse(values), [crystal])
    values["conditions"]["npt_cell"] = "full"
    with pytest.raises(ConfigError, match=r"npt_cell' is 'full', but the loop .* was begun with 'isotropic'"):
        LoopState(LearnConfig.parse(values), [crystal])


@pytest.mark.parametrize("select", ["loss", "stability"])
@pytest.mark.parametrize(("minutes", "of_a_round"), [(0.1, True), (1000, False)])
def test_a_last_training_of_few_epochs_is_like_one_of_a_round(tmp_path, crystal, minutes, of_a_round, select):
    values = {**loop_settings(tmp_path, crystal), "training": {"select": select}}
    values["budget"] = {"minutes": minutes}
    config = LearnConfig.parse(values)
    loop = Loop(config, [crystal], None, LoopState(config, [crystal]), print)
    training = last_training(loop, [crystal] * 40, tmp_path).training
    assert training.learning_rate is None and (training.teachers == 0) is of_a_round  # its rate is found by trials
    assert training.epochs is None and training.minutes == pytest.approx(minutes * (1 - AFTER), rel=0.2)
    assert (training.rollout_steps == 0) is (of_a_round and select == "loss")


def test_epochs_of_a_last_training_are_those_that_the_rounds_passed_in_a_minute(tmp_path, crystal):
    """Where that is known; the last round that tells it counts."""
    config = LearnConfig.parse(loop_settings(tmp_path, crystal))
    loop = Loop(config, [crystal], None, LoopState(config, [crystal]), print)
    assert epochs_of_last(loop, [crystal] * 40, 2.0) == epochs_within(
        2.0, [crystal] * 40, config.model, config.training
    )
    loop.state.rounds.extend({"forces": 1.0} for _ in range(3))
    loop.state.decided |= {f"{PASSED} {round_folder(config, n).name}": speed for n, speed in ((1, 100), (2, 3000))}
    assert epochs_of_last(loop, [crystal] * 40, 2.0) == 150


def test_a_label_costs_what_those_of_the_structures_do(tmp_path, crystal):
    large = crystal.repeat(2)
    config = LearnConfig.parse(loop_settings(tmp_path, crystal))
    labelled = LabelledFrames(tmp_path)
    for key, atoms, seconds in (("a", crystal, 1.0), ("b", crystal, 2.0), ("c", large, 9.0), ("d", crystal[:2], 0.1)):
        forces = np.zeros((len(atoms), 3))
        labelled.add(asked_frame(atoms, key, 0, "", "test"), ReferenceLabel(0.0, forces, None, seconds))
    with LabelPool(config.reference, tmp_path) as pool:
        loop = Loop(config, [crystal, large], Labeller(pool, labelled), LoopState(config), print)
        assert loop.seconds_of_label == pytest.approx(5.0)
        small = loop._replace(structures=[crystal])
        assert small.seconds_of_label == pytest.approx(1.0)
        for n in range(30):
            labelled.add(asked_frame(crystal, str(n), 0, "", "test"), ReferenceLabel(0.0, np.zeros((4, 3)), None, 4.0))
        assert small.seconds_of_label == pytest.approx(4.0)  # the machine has more to do now
        for n in range(20):
            labelled.add(asked_frame(crystal, f"{n}+", 0, "", "test"), ReferenceLabel(0.0, np.zeros((4, 3)), None, 7.0))
        assert small.seconds_of_label == pytest.approx(7.0)


def test_a_stiff_bond_is_no_other_reference():
    """Nitrogen that is compressed: 600 eV/Å^2."""
    for round_ in range(20):
        first = Atoms("N2", [[0, 0, 0], [0.92, 0, 0]])
        again = nudged(first, "key", round_)
        for atoms in (first, again):
            pull = -600 * (np.linalg.norm(atoms.positions[1] - atoms.positions[0]) - 1.1)
            forces = np.array([[-pull, 0, 0], [pull, 0, 0]])
            atoms.calc = SinglePointCalculator(atoms, energy=pull**2 / 1200, forces=forces)
        assert other_answer(first, again) == ""


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
    values = loop_settings(tmp_path, crystal)
    values = {**values, **{name: s if name == "out" else {**s} for name, s in sections.items()}}
    with pytest.raises(ConfigError, match=told):
        LearnConfig.parse(values)


def test_structures_that_cannot_be(tmp_path, crystal):
    for name, text, told in (("one.xyz", "1\n\nCu 0 0 0\n", "one atom"), ("bad.xyz", "x\n", "cannot read")):
        (tmp_path / name).write_text(text)
        values = {**loop_settings(tmp_path, crystal), "structures": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=told):
            learn(LearnConfig.parse(values), progress=False)
    values = loop_settings(tmp_path, Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]]), conditions={"pressure": [1.0]})
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
    config = LearnConfig.parse(loop_settings(tmp_path, crystal, conditions={"temperature": given}))
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
        relaxed, keys = relaxed_by_reference(labeller, crystal, lambda: 20, "0/relax/1", STILL)
        crystal.calc = AskingCalculator(labeller, "0/relax/1", "relaxation")
        assert np.abs(relaxed.positions - crystal.positions).max() > 0.005
    with LabelPool(ReferenceConfig(calculator="no:Such"), tmp_path / "b") as pool:
        again, same = relaxed_by_reference(
            Labeller(pool, LabelledFrames(tmp_path)), crystal, lambda: 20, "0/relax/1", STILL
        )
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
    oxygen.info["spin"] = 0
    with pytest.raises(ConfigError, match="spin = 0; expected the multiplicity"):
        read(oxygen, "pyscf")
    oxygen.info["spin"] = 3
    oxygen.set_initial_charges([-1.0, -1.0])
    assert len(read(oxygen, "gfn2-xtb")) == 1  # which sums them up
    with pytest.raises(ConfigError, match="add up to -2, which 'pyscf' does not read: give charge"):
        read(oxygen, "pyscf")
    oxygen.info["charge"] = -2
    assert len(read(oxygen, "pyscf")) == 1
    oxygen.set_initial_charges([0.0, 0.0])
    del oxygen.info["charge"]
    oxygen.cell, oxygen.pbc = [9, 9, 9], True
    with pytest.raises(ConfigError, match="'pyscf' is for molecules: set pbc to false"):
        read(oxygen, "pyscf")
    assert len(read(oxygen, "gfn2-xtb")) == 1


def test_limited_labels_begin_with_longer_dynamics():
    assert [picoseconds_of(10, n, few=False) for n in (1, 2, 5, 6, 9)] == [0.5, 1.0, 8.0, 10.0, 10.0]
    assert [picoseconds_of(10, n, few=True) for n in (1, 2, 3, 4)] == [2.5, 5.0, 10.0, 10.0]


def test_every_condition_is_measured():
    crystal = bulk("Cu", cubic=True)
    ran = []
    for structure in range(3):
        for temperature in (300.0, 600.0, 900.0):
            for number in range(2):
                planned = Planned(Condition(structure, temperature, None), number, crystal, 100, 1.0, 0, 1.0, 50.0)
                ran.append(Ran(planned, 100, None, [crystal.copy() for _ in range(5)], []))
    for round_ in (1, 2):
        found = drawn(ran, 9, round_, 0)
        assert Counter(frame.info["condition"] for frame in found) == {run.planned.condition.name: 1 for run in ran}
    found = [frame.info["condition"] for round_ in range(3) for frame in drawn(ran, 3, round_, 0)]
    assert len(found) == len(set(found)) == 9  # in turns, where there are fewer labels
    assert len(drawn(ran, 30, 1, 0)) == 30 and len({frame.info["key"] for frame in drawn(ran, 90, 1, 0)}) == 90
    nothing = [run._replace(frames=[]) for run in ran[:2]] + ran[2:]
    row = {"picoseconds": 10.0, "energy": 1.0, "stress": None, "forces": 10.0, "scatter": 5.0}
    row["by_condition"] = {frame.info["condition"]: 10.0 for frame in drawn(nothing, 9, 1, 0)}
    config = LearnConfig(structures="a", reference="emt")
    assert not is_good(config, nothing, row)
    row["by_condition"][ran[0].planned.condition.name] = 39.0
    assert is_good(config, nothing, row)
    assert not is_good(config, [run._replace(steps=50) for run in ran], row)
    del row["scatter"]  # of a loop that was begun before that was known
    assert is_good(config, nothing, row)
    assert not is_good(config, nothing, {**row, "scatter": 31.0}) and not is_good(
        config, nothing, {**row, "scatter": None}
    )
    row["by_condition"][ran[0].planned.condition.name] = 41.0
    assert not is_good(config, ran, row)
    before = [frame.info["key"] for frame in drawn(ran, 20, 1, 0)]
    others = [frame.info["key"] for frame in drawn(ran, 90, 1, 0, but=before)]
    assert len(others) == 70 and not {*others} & {*before}


def test_how_much_an_error_of_few_frames_scatters():
    """Beside what many sets of as many frames tell, of different sizes; and two by hand."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 200, 400)
    frames = [rng.uniform(0.5, 1.5) * rng.normal(size=(n, 3)) for n in sizes]
    sets = [[frames[n] for n in rng.integers(400, size=40)] for _ in range(4000)]
    told = np.mean([scatter_in_milli(each) for each in sets])
    assert told == pytest.approx(np.std([rms_in_milli(each) for each in sets]), rel=0.04)
    two = [np.full((1, 3), 1.0), np.full((1, 3), 7.0)]  # squares 1 and 49, their mean 25 ± 24
    assert scatter_in_milli(two) == pytest.approx(1e3 * 24 / 10) and rms_in_milli(two) == 5000.0
    assert scatter_in_milli(two[:1]) is None and scatter_in_milli([np.zeros((1, 3))] * 2) == 0.0


@pytest.mark.parametrize(("conditions", "labels"), [(1, 4), (6, 8), (1, 60), (30, 30)])
def test_what_seems_good_is_measured_on_more_frames(tmp_path, conditions, labels):
    """At every condition, also of so few labels that a third of them is one; and again when the loop goes on."""
    start = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
    values = loop_settings(tmp_path, start, conditions={"temperature": list(range(300, 300 + conditions))})
    config = LearnConfig.parse(values | {"aim": {"forces": 10.0}})
    other, ran = load_potential("acetylacetone-pbe"), []
    with torch.no_grad():
        other.readout.last.last.weight.mul_(1.001)
    calculator = SEGNNCalculator(other, domain="ignore")
    for temperature in config.conditions.temperature:
        planned = Planned(Condition(0, temperature, None), 0, start, 80, 0.5, 0, 1.0, 50.0)
        ran.append(Ran(planned, 80, None, [start.copy() for _ in range(60)], []))
        for seed, frame in enumerate(ran[-1].frames):
            frame.rattle(0.02, seed=seed)
    folder = round_folder(config, 1)
    folder.mkdir(parents=True)
    pool, labeller = asking(tmp_path, "acetylacetone-pbe")
    with pool:
        loop = Loop(config, [start], labeller, LoopState(config, [start]), print)
        first = partial(measured_on_dynamics, loop, ran, calculator, {"round": 1, "picoseconds": 0.04}, labels)
        frames, row, good = first()
        most = min(labels, max(24, conditions))
        assert good and row["drawn"] == len(frames) == len({frame.info["key"] for frame in frames}) == most
        assert 0 < row["forces"] < 5 and len(row["by_condition"]) == conditions
        before = len(ase.io.read(folder / "drawn.xyz", ":"))
        assert before == {4: 2, 8: 4, 60: 20, 30: 15}[labels]
        strict = config.model_copy(update={"aim": config.aim.model_copy(update={"forces": 1e-9})})
        again = measured_on_dynamics(loop._replace(config=strict), ran, calculator, first.args[3], labels)
        assert not again[2] and again[1]["drawn"] == labeller.labelled.count == most


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


def test_those_that_are_relaxed_are_others_in_each_round():
    each = [evenly_spaced(100, 4, turn) for turn in range(1, 9)]
    assert all(np.ptp(np.diff(numbers)) <= 1 and 0 <= min(numbers) and max(numbers) < 100 for numbers in each)
    assert len({numbers[0] for numbers in each}) == 8 and evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert {evenly_spaced(5, 1, turn)[0] for turn in range(9)} == {0, 1, 2, 3, 4} and evenly_spaced(0, 0) == []


def test_minima_of_the_potential_are_among_what_is_chosen(monkeypatch):
    folder = Path(segnn_ase.__file__).parents[1] / "potentials" / "acetylacetone-pbe"
    start = ase.io.read(folder / "reference.xyz")
    start.set_constraint(FixAtoms([0]))
    calculator, rng = SEGNNCalculator(folder / "model.pt", domain="ignore"), np.random.default_rng(0)
    frames = [Atoms(start.numbers, start.positions + 0.05 * rng.normal(size=(15, 3))) for _ in range(8)]
    ran = [Ran(Planned(Condition(0, 300.0, None), 0, start, 2500, 0.5, 0, 1.0, 50.0), 2500, None, frames, [])]
    found = chosen(ran, [], 6, 2, calculator, few=False)
    reasons = Counter(frame.info["reason"] for frame in found)
    assert reasons == {"minimum of the potential": 1, "informative": 5}
    relaxed = next(frame for frame in found if "minimum" in frame.info["reason"])
    said = calculator.evaluate([relaxed, *frames])
    assert np.abs(said[0]["forces"][1:]).max() < FMAX < np.abs(said[1]["forces"]).max()  # the fixed one is pulled
    assert said[0]["energy"] < min(one["energy"] for one in said[1:])
    assert any(np.array_equal(relaxed.positions[0], frame.positions[0]) for frame in frames)
    spaced = chosen(ran, [], 6, 2, calculator, few=True)
    assert Counter(f.info["reason"] for f in spaced) == {"minimum of the potential": 1, "evenly spaced": 5}
    assert len({f.positions.tobytes() for f in spaced}) == 6
    several = [(ran[0], frame) for frame in frames]
    assert len(relaxed_frames(several, 3, calculator, 1)) == 3  # not all the way: they differ
    monkeypatch.setattr("segnn_ase.learn.choice.ALIKE", 1.0)
    assert len(relaxed_frames(several, 3, calculator, 1)) == 1
    short = [ran[0]._replace(steps=700)]  # no relaxation is as short
    assert {frame.info["reason"] for frame in chosen(short, [], 6, 2, calculator, few=False)} == {"informative"}
