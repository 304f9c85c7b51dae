"""What a training finds out before it begins: `segnn_ase.train.trial`."""

import itertools
import math
import os
import signal

import ase.io
import numpy as np
import pytest
from helpers.frames import emt_atoms, water_frames
from helpers.systems import copper
from helpers.trainings import configured, history, weights

from segnn_ase.base.errors import OutOfTime
from segnn_ase.data.batches import edges_of, make_item
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.store.tensors import checksum, load_tensors
from segnn_ase.train import loop, trial
from segnn_ase.train.prepare import prepare
from segnn_ase.train.resume import Progress
from segnn_ase.train.settings import OptimConfig
from segnn_ase.train.start import train
from segnn_ase.train.step import make_batches


def silent(*_: object) -> None:
    pass


def job_of(folder, **settings):
    config = configured(folder, water_frames(12), **settings)
    return prepare(config, report=silent), config.training


def found(folder, told=silent, *, stop=silent, done=None, save=silent, **settings):
    job, settings = job_of(folder, **settings)
    before, done = checksum(job.model.state_dict()), done or Progress()
    trial.find_out(job, settings, done, told, save=save, stop=stop, progress=False)
    assert checksum(job.model.state_dict()) == before  # trials leave nothing behind
    return done


def test_epochs_fill_the_minutes():
    items = [make_item(frame_from_atoms(atoms), 3.0) for atoms in water_frames(10)]
    assert trial.epochs_in(10.0, 0.5, 12, items, []) == 100
    assert 70 < trial.epochs_in(10.0, 0.5, 12, items, items) < 80
    assert trial.epochs_in(1e-6, 0.5, 12, items, items) == 1
    assert [trial.most_epochs(frames) for frames in (1, 100, 250, 1000)] == [400, 400, 1000, 2000]


def test_a_step_takes_what_those_after_the_first_take(tmp_path):
    job, settings = job_of(tmp_path, epochs=None, minutes=60.0)
    ticks = itertools.accumulate(itertools.chain([0.0], [10.0] * 10, itertools.repeat(0.25)))
    assert trial.seconds_of_step(job, settings, clock=lambda: next(ticks)) == pytest.approx(0.25)


def test_slow_steps_are_measured_on_few(tmp_path):
    job, settings = job_of(tmp_path, epochs=None, minutes=1.0, batch_size=1)
    calls = itertools.count()
    assert trial.seconds_of_step(job, settings, clock=lambda: 10.0 * next(calls)) == 10.0
    assert next(calls) == 4  # two steps of ten seconds, of a minute


def test_a_step_of_another_size_is_estimated_from_those_that_were_measured():
    """By what a pair of neighbours costs and what a step does; in proportion, where sizes are alike."""
    assert trial.seconds_at(500, [100, 200, 300], [0.3, 0.4, 0.5]) == pytest.approx(0.7)
    assert trial.seconds_at(1000, [100, 101, 100], [0.2, 0.1, 0.3]) == pytest.approx(2.0, rel=0.01)
    assert trial.seconds_at(1000, [100, 200], [0.2, 0.1]) == pytest.approx(0.15)  # noise
    assert trial.seconds_at(1000, [100, 200], [0.1, 0.3]) == pytest.approx(0.2 / 150 * 1000)  # none begins below zero
    assert trial.seconds_at(0, [0, 0], [0.1, 0.3]) == pytest.approx(0.2)


def test_a_giant_that_is_not_among_the_measured_counts(tmp_path):
    """A step takes what its pairs do, here a second each: the mean is that of all, whoever is in the first steps."""
    ase.io.write(tmp_path / "giant.xyz", emt_atoms(1, lambda: copper().repeat(2)))
    config = configured(tmp_path, water_frames(40), epochs=None, minutes=1e6, batch_size=1)
    data = config.data.model_copy(update={"train": (*config.data.train, str(tmp_path / "giant.xyz"))})
    job = prepare(config.model_copy(update={"data": data}), report=silent)
    pairs = edges_of(job.data.train)
    assert max(pairs) > 20 * np.median(pairs)
    made = trial.steps_of_trial

    def counted(*args):
        for size in made(*args):
            now.append(now[-1] + float(size))
            yield size

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "steps_of_trial", counted)
        assert trial.seconds_of_step(job, config.training, clock=lambda: now[-1]) == pytest.approx(np.mean(pairs))


def test_minutes_are_told_and_kept_for_going_on(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    monkeypatch.setattr(trial, "seconds_of_step", lambda *_: 6.0)
    config = configured(tmp_path, water_frames(8), epochs=None, minutes=0.7, teachers=0)
    train(config, progress=False)
    assert any("3 epochs for 0.7 minutes" in line for line in told), told
    assert [int(row["epoch"]) for row in history(config.out)] == [1, 2, 3]
    assert load_tensors(tmp_path / "model.resume.pt")["progress"]["epochs"] == 3
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
    train(config, progress=False)


def test_short_dynamics_have_their_part_of_the_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "seconds_of_step", lambda *_: 1.0)
    found, told = {}, []
    for steps in (0, 20, 10_000):
        (tmp_path / str(steps)).mkdir()
        job, settings = job_of(tmp_path / str(steps), epochs=None, minutes=10.0, rollout_steps=steps)
        batches = len(make_batches(job.data.train, settings, epoch=0))
        found[steps] = trial.plan(job, settings, job.data.train, batches, told.append)
    assert found[0] > found[20] > found[10_000] >= found[0] // 2 > 10
    assert "short dynamics" not in told[0] and "--rollout-steps 0" in told[2]
    monkeypatch.setattr(trial, "seconds_of_step", lambda *_: 2000.0)
    assert trial.plan(job, settings, job.data.train, batches, told.append) == 1
    assert "warning: one epoch takes" in told[-1]


def test_a_step_is_timed_though_it_explodes(tmp_path):
    job, settings = job_of(tmp_path, epochs=None, learning_rate=1e30, warmup_steps=0)
    assert trial.seconds_of_step(job, settings) > 0


def test_a_rate_that_is_given_and_short_trainings_are_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "loss_of_trial", lambda *_: pytest.fail("a trial"))
    assert found(tmp_path, epochs=4000, learning_rate=0.07).learning_rate == 0.07
    assert found(tmp_path, epochs=100, learning_rate=None).learning_rate == trial.RATES[0]
    assert found(tmp_path, epochs=4000, learning_rate=None, warmup_steps=500).learning_rate == trial.RATES[0]
    assert found(tmp_path, epochs=4000, learning_rate=None, ema_decay=0.999).learning_rate == trial.RATES[0]


@pytest.mark.parametrize(
    "losses, best",
    [
        ({0.03: 1.0, 0.01: 2.0}, 0.03),
        ({0.03: 2.0, 0.01: 1.0, 0.003: 3.0}, 0.01),
        ({0.03: 2.0, 0.01: 2.1, 0.003: 2.3}, 0.01),  # nearly as good
        ({0.03: math.inf, 0.01: math.inf, 0.003: 3.0}, 0.003),
        ({0.03: 0.0, 0.01: 0.0}, 0.03),  # no validation frame has a label that counts
    ],
)
def test_smaller_rates_are_tried_as_long_as_they_are_as_good(tmp_path, monkeypatch, losses, best):
    monkeypatch.setattr(trial, "loss_of_trial", lambda job, settings, rate, *_: losses[rate])
    monkeypatch.setattr(trial, "seconds_of_step", lambda *_: 0.01)
    monkeypatch.setattr(trial, "FEWEST_EPOCHS", trial.MOST_EPOCHS)
    done = found(tmp_path, epochs=None, minutes=2.0, learning_rate=None)
    assert done.learning_rate == best and dict(done.trials) == losses
    spent = len(losses) * trial.steps_of_trials(OptimConfig(warmup_steps=5), done.planned * 3) / 3
    assert done.epochs == round(done.planned - spent) < done.planned


def test_trials_tell_a_rate_that_explodes_and_one_that_is_far_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "RATES", (1e30, 0.02, 1e-7))
    told = []
    done = found(tmp_path, told.append, epochs=1400, learning_rate=None)
    assert done.learning_rate == 0.02 and done.epochs == 1400
    assert "inf with 1e+30" in told[0] and "a learning rate of 0.02" in told[0]


def test_trials_that_are_done_are_not_made_again(tmp_path, monkeypatch):
    made, saved = [], []
    monkeypatch.setattr(trial, "loss_of_trial", lambda job, settings, rate, *_: made.append(rate) or 5.0)
    done = Progress(planned=4000, trials=[(0.03, 2.0)])
    found(tmp_path, epochs=4000, learning_rate=None, done=done, save=lambda: saved.append(len(done.trials)))
    assert made == [0.01] and saved == [2, 2] and done.learning_rate == 0.03


@pytest.mark.parametrize("end", ["signal", "deadline"])
def test_a_training_that_ends_in_a_trial_goes_on_to_the_same_bits(tmp_path, monkeypatch, end):
    """After two trials and a half, and as if nothing had ended it."""
    monkeypatch.setattr(trial, "LEAST", 4)
    for part in ("PART", "MOST_PART"):
        monkeypatch.setattr(trial, part, 2)
    monkeypatch.setattr(trial, "RATES", (1e-2, 5e-3, 1e-3))
    monkeypatch.setattr(trial, "AS_GOOD", math.inf)
    options = {"epochs": 8, "learning_rate": None, "warmup_steps": 1, "ema_decay": 0.5, "save_minutes": 0.0}
    do, count, folders = trial.next_step, itertools.count(), [tmp_path / "whole", tmp_path / "parts"]

    def ended(*arguments):
        if next(count) == 30:
            if end == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                patch.setattr(loop.time, "monotonic", lambda: math.inf)
        return do(*arguments)

    for folder in folders:
        folder.mkdir()
        config = configured(folder, water_frames(12), **options, max_minutes=60.0)
        if folder.name == "parts":
            with monkeypatch.context() as patch:
                patch.setattr(trial, "next_step", ended)
                with pytest.raises((KeyboardInterrupt, OutOfTime), match="in a trial of a learning rate"):
                    train(config, progress=False)
            progress = load_tensors(folder / "model.resume.pt")["progress"]
            assert len(progress["trials"]) == 2 and progress["epochs"] is None
        train(config, progress=False)
    whole, parts = (folder / "model.pt" for folder in folders)
    assert history(whole) == history(parts) and checksum(weights(whole)) == checksum(weights(parts))
    assert load_with_metadata(whole)[1]["learning_rate"] == 1e-3
