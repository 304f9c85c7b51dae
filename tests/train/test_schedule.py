"""How long a training is and how large its steps are: `segnn_ase.train.schedule`."""

import math

import numpy as np
import pytest
import torch
from helpers.frames import water_frames
from helpers.trainings import configured, history

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.data.batches import make_item
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train import loop
from segnn_ase.train.resume import Progress
from segnn_ase.train.schedule import (
    FIRST_STEPS,
    MEASURED_STEPS,
    MOST_EPOCHS,
    Pace,
    calm_down,
    end_epoch,
    epochs_in,
    is_over,
    is_spike,
    learning_rate,
    out_of_patience,
)
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.train.start import train


def test_learning_rate_rises_then_falls_to_zero():
    settings = OptimConfig(learning_rate=0.1, warmup_steps=10)

    def at(step: int, epoch: int = 0, epochs: int | None = 4, **more) -> float:
        return learning_rate(Progress(step=step, epoch=epoch, epochs=epochs, **more), 8, settings)

    assert at(0) == pytest.approx(0.01) and at(9) == pytest.approx(0.1)
    assert at(50, 3) == pytest.approx(0.025) and at(50, 4) == 0.0
    assert at(50, 3, None) == pytest.approx(0.1)  # as long as the end is not known
    assert at(50, 2, batch=4) == pytest.approx(0.1 * 1.5 / 4)
    assert at(50, 3, calm=0.5) == pytest.approx(0.0125)
    without = OptimConfig(learning_rate=0.1, warmup_steps=0)
    assert learning_rate(Progress(epochs=4), 8, without) == pytest.approx(0.1)


def test_the_pace_is_that_of_the_steps_after_the_first():
    time, found = 0.0, []
    pace = Pace(lambda: time)
    for step in range(1, 40):
        time += 1000.0  # of a validation
        with pace:
            time += 100.0 if step <= FIRST_STEPS else 0.25
        found.append(pace.seconds)
    assert found[: FIRST_STEPS + MEASURED_STEPS - 1] == [None] * (FIRST_STEPS + MEASURED_STEPS - 1)
    assert found[FIRST_STEPS + MEASURED_STEPS - 1 :] == pytest.approx([0.25] * (40 - FIRST_STEPS - MEASURED_STEPS))


def test_epochs_fill_the_minutes():
    items = [make_item(frame_from_atoms(atoms), 3.0) for atoms in water_frames(10)]
    assert epochs_in(10.0, 0.5, 12, items, []) == 100
    assert 70 < epochs_in(10.0, 0.5, 12, items, items) < 80
    assert epochs_in(1e-6, 0.5, 12, items, items) == 1
    assert epochs_in(1e9, 0.5, 12, items, items) == MOST_EPOCHS


def test_minutes_are_told_and_kept_for_going_on(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    monkeypatch.setattr(Pace, "seconds", 6.0)
    config = configured(tmp_path, water_frames(8), epochs=None, minutes=0.7)
    train(config, progress=False)
    assert any("3 epochs for 0.7 minutes" in line for line in told), told
    assert [int(row["epoch"]) for row in history(config.out)] == [1, 2, 3]
    assert load_tensors(tmp_path / "model.resume.pt")["progress"]["epochs"] == 3
    monkeypatch.setattr(loop, "training_step", lambda *_: pytest.fail("a step was made"))
    train(config, progress=False)


def test_minutes_that_are_over_before_they_are_measured_end_with_the_epoch(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    monkeypatch.setattr(Pace, "seconds", property(lambda pace: 1e6 if pace._steps > 10 else None))
    config = configured(tmp_path, water_frames(8), epochs=None, minutes=0.7, validate_every=100)
    train(config, progress=False)
    assert any("6 epochs for 0.7 minutes" in line for line in told), told
    (row,) = history(config.out)
    assert int(row["epoch"]) == 6 and 0 < float(row["lr"]) < 0.01


def test_epochs_and_minutes_are_one_or_the_other(tmp_path):
    with pytest.raises(ConfigError, match=r"epochs is 3 and minutes is .*; expected one of them"):
        TrainConfig.parse({"data": {"train": "a.xyz"}, "training": {"epochs": 3, "minutes": 2}})


def test_out_of_patience():
    rows = [{"epoch": n, "valid_loss": loss} for n, loss in enumerate([3.0, 1.0, 2.0, 2.0], 1)]
    assert out_of_patience(rows, 2) and not out_of_patience(rows, 3) and not out_of_patience(rows, None)
    assert not out_of_patience([], 1)
    assert is_over(Progress(epoch=4, epochs=4), None) and not is_over(Progress(epoch=4), None)


def test_a_spike_is_many_times_the_epoch_before():
    before = Progress(highest=2.0)
    assert is_spike(21.0, before) and is_spike(math.nan, before) and is_spike(math.inf, Progress())
    assert not is_spike(19.0, before) and not is_spike(1e30, Progress())
    assert is_spike(3e3, Progress(rising=2.0)) and not is_spike(1e3, Progress(rising=2.0))


def test_what_is_left_of_a_well_fitted_loss_may_waver():
    settled = Progress(history=[{"train_loss": 2.0, "spikes": 0}, {"train_loss": 1e-9, "spikes": 0}], highest=1e-9)
    assert not is_spike(1e-4, settled) and is_spike(3e-4, settled) and is_spike(math.nan, settled)


def test_an_epoch_ends():
    done = Progress(rising=9.0, highest=20.0, batch=4)
    end_epoch(done)
    assert (done.highest, done.rising, done.epoch, done.batch) == (9.0, 0.0, 1, 0)
    end_epoch(done)
    assert (done.highest, done.epoch) == (9.0, 2)  # no step of it was taken


def test_calm_comes_to_an_end():
    done, settings = Progress(epoch=2), OptimConfig(learning_rate=0.7)
    with pytest.raises(DataError, match=r"in epoch 3.*lower learning_rate \(now 0.7\)"):
        for _ in range(20):
            calm_down(done, settings)
    assert done.spikes == 10


def test_after_a_spike_the_weights_go_back_and_learning_goes_on(tmp_path, monkeypatch):
    """One step in the second epoch is a fifty times too large."""
    honest, told = loop.learning_rate, []
    monkeypatch.setattr(loop, "learning_rate", lambda done, *rest: (50 if done.step == 9 else 1) * honest(done, *rest))
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    config = configured(tmp_path, water_frames(16), epochs=12, batch_size=2, ema_decay=0.99)
    train(config, progress=False)
    rows = history(config.out)
    assert int(rows[-1]["spikes"]) >= 1 and "go back to their average" in "\n".join(told)
    assert float(rows[-1]["valid_loss"]) < float(rows[0]["valid_loss"])
    assert np.isfinite([float(row["train_loss"]) for row in rows]).all()


def test_a_loss_that_explodes_ends_the_training_with_advice(tmp_path):
    config = configured(tmp_path, water_frames(6), learning_rate=1e30, warmup_steps=0, epochs=20)
    with pytest.raises(DataError, match=r"the loss rose .* lower learning_rate"):
        train(config, progress=False)
    assert all(torch.isfinite(w).all() for w in load_tensors(tmp_path / "model.resume.pt")["averaged"].values())
