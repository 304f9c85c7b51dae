"""Few frames: potentials that are trained first teach the last."""

import itertools
import os
import signal

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.frames import water_frames
from helpers.trainings import configured, leave_out_plots

from segnn_ase.base.errors import ConfigError, OutputError
from segnn_ase.store.model_file import load_committee, load_with_metadata
from segnn_ase.store.tensors import checksum, save_tensors
from segnn_ase.train import few_frames, finetune, loop, train
from segnn_ase.train.few_frames import number_of_teachers, seconds_of_epoch
from segnn_ase.train.prepare import read_data
from segnn_ase.train.settings import TrainConfig


def silent(*_):
    pass


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    leave_out_plots(monkeypatch)


def test_two_teach_a_third_and_the_same_command_does_nothing_more(tmp_path, capsys, monkeypatch):
    config = configured(tmp_path, water_frames(8), epochs=2, teachers=2)
    errors = train(config)
    said = "".join(capsys.readouterr())
    assert "2 potentials come first" in said and "labelled by the mean of 2 potentials" in said
    assert len(load_committee(tmp_path / "model.teachers" / "committee.pt").potentials) == 2
    taught, metadata = load_with_metadata(tmp_path / "model.pt")
    members = load_committee(tmp_path / "model.teachers" / "committee.pt").potentials
    assert not any(checksum(taught.state_dict()) == checksum(m.state_dict()) for m in members)
    assert metadata["training"]["data"]["teacher"] == str(tmp_path / "model.teachers" / "committee.pt")
    assert {"train", "valid", "taught"} <= errors.keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.resume.pt")}
    assert len(before) == 3
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
    assert train(config, progress=False) == errors
    with pytest.raises(ConfigError, match=r"'training\.teachers' is 3, but the training of .* was begun with 2"):
        train(configured(tmp_path, epochs=2, teachers=3), progress=False)


def number_of(config):
    return number_of_teachers(config, read_data(config, silent))


def number(tmp_path, frames, **settings):
    config = configured(tmp_path, water_frames(frames), **settings)
    data = read_data(config, silent)
    return number_of_teachers(config, data), seconds_of_epoch(config, data)


def test_as_many_as_minutes_allow(tmp_path):
    none, seconds = number(tmp_path, 8, epochs=None, minutes=1e-6)
    assert none == 0
    each = 400 * seconds / 60
    for n, expected in ((1.5, 0), (2.5, 2), (3.5, 3), (9.0, 4)):
        assert number(tmp_path, 8, epochs=None, minutes=each * (n + 1.7))[0] == expected
    assert number(tmp_path, 8, epochs=None, minutes=100.0, teachers=0)[0] == 0
    assert number(tmp_path, 8, epochs=3)[0] == 0  # what is given is all that is done
    assert number(tmp_path, 8, epochs=3, teachers=3)[0] == 3


def test_what_cannot_be_taught_is_trained_alone(tmp_path, capsys, monkeypatch):
    """Labels that nothing explains, atoms that do not see each other, and a network of which there are no dynamics."""
    monkeypatch.setattr(few_frames, "PER_STEP", {"cpu": 1e-5})
    monkeypatch.setattr(few_frames, "PER_PAIR", {"cpu": 0.0})
    noise = water_frames(8)
    for n, atoms in enumerate(noise):
        forces = np.random.default_rng(n).normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 - 0.01 * n, forces=forces - forces.mean(0))
    options = {"minutes": 0.01, "epochs": None, "learning_rate": 1e-9, "data": {"refuse_flaws": False}}
    for told in (True, False):  # going on without them
        train(configured(tmp_path, noise, **options))
        assert ("the teachers are left out: setting 'data.teacher'" in "".join(capsys.readouterr())) is told
        assert load_with_metadata(tmp_path / "model.pt")[1]["training"]["data"]["teacher"] is None
    apart = [Atoms("H2", [[0, 0, 0], [0, 0, 8.0 + 0.1 * n]]) for n in range(8)]
    (tmp_path / "apart").mkdir()
    for n, atoms in enumerate(apart):
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 - 0.01 * n, forces=0.01 * np.cos([[n] * 3, [n + 1] * 3]))
    assert number_of(configured(tmp_path / "apart", apart, **options)) == 0
    jumping = {"preset": "segnn2022", "cutoff": 3.0}
    config = configured(tmp_path / "apart", water_frames(8), epochs=None, minutes=100.0, model=jumping)
    assert number_of(config) == 0
    with pytest.raises(ConfigError, match="no dynamics that teachers could label"):
        configured(tmp_path, water_frames(8), teachers=2, model=jumping)


def test_minutes_are_shared(tmp_path):
    config = configured(tmp_path, water_frames(8), epochs=None, minutes=0.02, teachers=2, learning_rate=0.01)
    train(config, progress=False)
    paths = [tmp_path / name for name in ("model.teachers/committee.1.pt", "model.teachers/committee.2.pt", "model.pt")]
    shares = [load_with_metadata(path)[1]["training"]["training"]["minutes"] for path in paths]
    assert sum(shares) == pytest.approx(0.02) and shares[0] == shares[1]


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="teachers is 2 and committee is 3; expected one of them"):
        configured(tmp_path, water_frames(8), teachers=2, committee=3)
    given = configured(tmp_path, water_frames(8), teachers=2).model_dump(exclude_unset=True)
    with pytest.raises(ConfigError, match=r"teachers is 2 and data\.teacher is 'a\.pt'; expected one of them"):
        TrainConfig.parse({**given, "data": {**given["data"], "teacher": "a.pt"}})


def test_fine_tuning_has_none(tmp_path):
    config = configured(tmp_path, water_frames(8), teachers=2)
    with pytest.raises(ConfigError, match=r"'training\.teachers' is 2: fine-tuning has no teacher"):
        finetune("water-pbe0", config.model_copy(update={"model": {}}), progress=False)


def test_one_is_refused_and_structures_are_counted(tmp_path):
    with pytest.raises(ConfigError, match="teachers is 1; expected 0, or 2 and more"):
        configured(tmp_path, water_frames(8), teachers=1)
    train(configured(tmp_path, water_frames(8), epochs=2, teachers=2, data={"taught": 6}), progress=False)
    with pytest.raises(ConfigError, match=r"there is no data\.teacher, and training\.teachers is None"):
        train(configured(tmp_path, water_frames(8), epochs=2, data={"taught": 6}), progress=False)


def test_teachers_of_another_training_are_told_at_once(tmp_path):
    train(configured(tmp_path, water_frames(8), epochs=2, teachers=2), progress=False)
    for name in ("model.pt", "model.resume.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(OutputError, match=r"model\.teachers has teachers of another training: remove it"):
        train(configured(tmp_path, water_frames(8, seed=5), epochs=2, teachers=2), progress=False)


def test_one_that_was_begun_without_goes_on_without(tmp_path):
    config = configured(tmp_path, water_frames(8), epochs=None, minutes=100.0, teachers=0)
    assert number_of(config) == 0
    save_tensors(tmp_path / "model.resume.pt", {"config": config.model_dump(mode="json")})
    assert number_of(configured(tmp_path, epochs=None, minutes=100.0)) == 0


def test_a_training_that_is_stopped_at_its_teachers_and_later_ends_with_the_same_bits(tmp_path, monkeypatch):
    step, calls = loop.next_step, itertools.count(1)

    def counted(*arguments):
        if next(calls) in (3, 6, 9):  # in the first teacher, the second, and the one that is taught
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        config = configured(tmp_path / name, water_frames(8), epochs=2, teachers=2, data={"taught": 6})
        if name == "parts":
            monkeypatch.setattr(loop, "next_step", counted)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt, match="goes on"):
                    train(config, progress=False)
        train(config, progress=False)
    whole, parts = (load_with_metadata(tmp_path / name / "model.pt")[0].state_dict() for name in ("whole", "parts"))
    assert checksum(whole) == checksum(parts)
