"""How long a training is and how large its steps are: `segnn_ase.train.schedule`."""

import math

import ase.io
import numpy as np
import pytest
import torch
from helpers.frames import water_frames
from helpers.trainings import configured, history

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.data.batches import collate_items, make_item
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train import loop, step
from segnn_ase.train.job import TrainingData
from segnn_ase.train.prepare import prepare
from segnn_ase.train.resume import Progress
from segnn_ase.train.schedule import (
    calm_down,
    come_to_rest,
    end_epoch,
    has_stalled,
    is_spike,
    learning_rate,
    patience_of,
)
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.train.start import train
from segnn_ase.train.step import is_odd, make_learner


def test_learning_rate_rises_then_falls_to_zero():
    settings = OptimConfig(warmup_steps=10)

    def at(step: int, epoch: int = 0, **more) -> float:
        return learning_rate(Progress(step=step, epoch=epoch, epochs=4, learning_rate=0.1, **more), 8, settings)

    assert at(0) == pytest.approx(0.01) and at(9) == pytest.approx(0.1)
    assert at(50, 3) == pytest.approx(0.025) and at(50, 4) == 0.0
    assert at(50, 2, batch=4) == pytest.approx(0.1 * 1.5 / 4)
    assert at(50, 3, calm=0.5) == pytest.approx(0.0125)
    assert at(50, 4, batch=3) == 0.0  # a trial whose last epochs have fewer batches than the first
    without = OptimConfig(warmup_steps=0)
    assert learning_rate(Progress(epochs=4, learning_rate=0.1), 8, without) == pytest.approx(0.1)


def losses(*values: float, every: int = 1) -> dict:
    """A training with these validation losses, of 1000 epochs, at 0.1."""
    rows = [{"epoch": every * n, "valid_loss": loss} for n, loss in enumerate(values, 1)]
    return {"epoch": every * len(rows), "epochs": 1000, "learning_rate": 0.1, "history": rows}


def test_a_loss_has_stalled_when_it_is_no_lower_in_the_median():
    assert not has_stalled(Progress(**losses(5, 4, 3, 2, 1, 1)), 3)
    assert has_stalled(Progress(**losses(9, 3, 4, 2, 1, 4, 3)), 3)  # though 1 is the lowest so far
    assert not has_stalled(Progress(**losses(3, 4, 1, 2, 9)), 3)  # too early to tell
    assert has_stalled(Progress(**losses(5, 4, 6, 7, every=10)), 20)
    assert not has_stalled(Progress(**losses(5, 4, 3, every=10)), 5)  # less often validated than that
    assert not has_stalled(Progress(**losses(0, 0, 0, 0)), 2)  # nothing that counts is known of these frames
    assert not has_stalled(Progress(**losses(1, 1, math.nan, math.nan)), 2)


def test_a_loss_that_falls_slowly_in_much_noise_does_not_stall():
    rng, epochs, stalled = np.random.default_rng(0), 200, 0
    for _ in range(20):
        noise = rng.lognormal(sigma=0.1, size=epochs)
        rows = losses(*(7.0 ** -(np.arange(epochs) / epochs) * noise))["history"]
        for n in range(1, epochs + 1):
            done = Progress(epoch=n, epochs=epochs, history=rows[:n])
            stalled += has_stalled(done, patience_of(done, OptimConfig()))
    assert not stalled


def test_patience_is_at_least_some_validations():
    def of(epochs: int, **settings) -> int:
        return patience_of(Progress(epochs=epochs), OptimConfig(**settings))

    assert (of(400), of(30), of(100, validate_every=4)) == (40, 10, 20)
    assert (of(400, patience=7), of(400, patience=7, validate_every=20)) == (7, 20)


def test_where_the_loss_falls_no_more_the_rate_falls_to_zero_soon():
    done, settings = Progress(**losses(*[2.0] * 40)), OptimConfig(warmup_steps=0, patience=20)
    assert come_to_rest(done, settings) and done.epochs == 60
    done.epoch = 50
    assert learning_rate(done, 8, settings) == pytest.approx(0.5 * 0.1 * 0.96)
    assert not come_to_rest(done, settings)  # once
    assert not come_to_rest(Progress(**losses(*[2.0] * 40)), OptimConfig())  # a hundred epochs by default
    assert not come_to_rest(Progress(**{**losses(*[2.0] * 40), "epochs": 50}), settings)  # the end is near


def test_epochs_and_minutes_are_one_or_the_other(tmp_path):
    with pytest.raises(ConfigError, match=r"epochs is 3 and minutes is .*; expected one of them"):
        TrainConfig.parse({"data": {"train": "a.xyz"}, "training": {"epochs": 3, "minutes": 2}})


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
    done = Progress(epoch=2, learning_rate=0.7)
    with pytest.raises(DataError, match=r"in epoch 3.*lower learning_rate \(now 0.7\)"):
        for _ in range(20):
            calm_down(done)
    assert done.spikes == 10


def test_after_a_spike_the_weights_go_back_and_learning_goes_on(tmp_path, monkeypatch):
    """One step in the second epoch is a fifty times too large."""
    honest, told = step.learning_rate, []
    monkeypatch.setattr(step, "learning_rate", lambda done, *rest: (50 if done.step == 9 else 1) * honest(done, *rest))
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    config = configured(tmp_path, water_frames(16), epochs=12, batch_size=2, ema_decay=0.99)
    train(config, progress=False)
    rows = history(config.out)
    assert int(rows[-1]["spikes"]) >= 1 and "go back to their average" in "\n".join(told)
    assert float(rows[-1]["valid_loss"]) < float(rows[0]["valid_loss"])
    assert np.isfinite([float(row["train_loss"]) for row in rows]).all()


def test_an_odd_structure_now_and_then_is_no_spike(tmp_path, monkeypatch):
    """One that is learned in every third epoch, with forces that no step could have led to."""
    frames, told = water_frames(17), []
    frames[-1].calc.results["forces"] = 30.0 * frames[-1].calc.results["forces"]
    learned = TrainingData.learned_in
    monkeypatch.setattr(
        TrainingData, "learned_in", lambda data, epoch, seed: learned(data, epoch, seed)[: None if epoch % 3 else -1]
    )
    monkeypatch.setattr(loop, "printer", lambda progress: told.append)
    ase.io.write(tmp_path / "valid.traj", water_frames(4, seed=9))
    data = {"valid": str(tmp_path / "valid.traj"), "refuse_flaws": False}
    config = configured(tmp_path, frames, data=data, epochs=40, batch_size=2, patience=40, learning_rate=0.003)
    train(config, progress=False)
    assert int(history(config.out)[-1]["spikes"]) == 0, told


def test_an_odd_structure_beside_small_ones_is_no_spike(tmp_path):
    """A large structure that is far off decides the loss of a batch, whose structures are fine on the mean."""
    config = configured(tmp_path, water_frames(8))
    job = prepare(config, report=lambda *_: None)
    learner = make_learner(job, config.training)
    items = [make_item(frame, job.model.cutoff) for frame in job.data.frames[:4]]
    odd = items[0].labels._replace(forces=items[0].labels.forces + 100.0)
    unlabelled = [i._replace(labels=i.labels._replace(forces=i.labels.forces * math.nan)) for i in items[1:]]
    batch = [items[0]._replace(labels=odd), *unlabelled]
    value = learner.gradient(collate_items(batch), None)
    assert is_odd(learner, batch, value)
    assert not is_odd(learner, items, value)


def test_a_loss_that_explodes_ends_the_training_with_advice(tmp_path):
    config = configured(tmp_path, water_frames(6), learning_rate=1e30, warmup_steps=0, epochs=40)
    with pytest.raises(DataError, match=r"the loss rose .* lower learning_rate"):
        train(config, progress=False)
    assert all(torch.isfinite(w).all() for w in load_tensors(tmp_path / "model.resume.pt")["averaged"].values())
