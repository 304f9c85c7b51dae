"""Time-steppers: what turns with the bodies, what they learn, what their files keep."""

import contextlib

import numpy as np
import pytest
import torch
from helpers.systems import rotation

from segnn_ase.base.errors import ConfigError, DataError, ModelFileError, OutOfTime, StructureError
from segnn_ase.dynamics import StepperTraining, load_stepper, simulate, train_stepper, write_motion
from segnn_ase.dynamics.files import save_stepper
from segnn_ase.dynamics.learning import read_sets_of_motion
from segnn_ase.dynamics.motion import Motion
from segnn_ase.dynamics.settings import STEPPERS, stepper_config
from segnn_ase.dynamics.stepper import Scales, TimeStepper, bodies
from segnn_ase.dynamics.systems import SYSTEMS, leapfrog
from segnn_ase.store.shipped import find_model
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors
from segnn_ase.structure.graph import collate

EQUIVARIANT = [name for name, values in STEPPERS.items() if values.get("equivariant", True)]


def system(seed=0, n=5):
    rng = np.random.default_rng(seed)
    x, v = rng.normal(size=(2, n, 3))
    return x, v, rng.choice([-1.0, 1.0], size=n)


def stepper(preset, **changes):
    made = TimeStepper(stepper_config(preset, **changes), scales=Scales(1.2, 0.7, 0.5), seed=1).double()
    made.calibrate(collate([bodies(*system(seed)) for seed in range(4)]))
    return made


@pytest.mark.parametrize("preset", EQUIVARIANT)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_prediction_moves_and_turns_with_the_bodies(preset, mirrored):
    x, v, q = system()
    matrix = rotation(3) * (-1 if mirrored else 1)
    shift = np.array([3.0, -2.0, 5.0])
    made = stepper(preset)
    before = made.step(x, v, q)
    after = made.step(x @ matrix.T + shift, v @ matrix.T, q)
    assert np.abs(before - x).max() > 1e-3
    np.testing.assert_allclose(after, before @ matrix.T + shift, atol=1e-10)


def test_plain_message_passing_moves_with_the_bodies_but_does_not_turn():
    x, v, q = system()
    made, matrix = stepper("message-passing"), rotation(3)
    before = made.step(x, v, q)
    np.testing.assert_allclose(made.step(x + 3.0, v, q), before + 3.0, atol=1e-10)
    assert np.abs(made.step(x @ matrix.T, v @ matrix.T, q) - before @ matrix.T).max() > 1e-3


@pytest.mark.parametrize("preset", sorted(STEPPERS))
def test_bodies_have_no_order_and_systems_do_not_meet(preset):
    made, order = stepper(preset), np.array([3, 1, 4, 0, 2])
    alone = [made.step(*system(seed)) for seed in (0, 1)]
    together = made(collate([bodies(*system(seed)) for seed in (0, 1)])).detach()
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-10)
    turned = made.step(*(part[order] for part in system(0)))
    np.testing.assert_allclose(turned, alone[0][order], atol=1e-10)


@pytest.mark.parametrize("preset", sorted(STEPPERS))
def test_charges_and_velocities_are_felt(preset):
    """One charge that is another; that of all changes nothing where only products enter, as in the exact motion."""
    x, v, q = system()
    made = stepper(preset)
    before = made.step(x, v, q)
    assert np.abs(made.step(x, v, q * [-1, 1, 1, 1, 1]) - before).max() > 1e-5
    if preset != "tfn":
        np.testing.assert_array_equal(made.step(x, v, -q), before)
    assert np.abs(made.step(x, 1.1 * v, q) - before).max() > 1e-5


@pytest.mark.parametrize("preset", ["segnn", "segnn-pairs"])
def test_bodies_at_rest_have_finite_gradients(preset):
    """Harmonics of a velocity that is zero have none, and neither have lengths of relative ones."""
    x, _, q = system()
    made = stepper(preset)
    loss = made(bodies(x, np.zeros_like(x), q)).square().sum()
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)


def test_velocities_turn_with_the_bodies_and_not_with_their_place():
    x, v, q = system()
    made, matrix = stepper("segnn", velocities=True), rotation(3)
    before = made.step(x, v, q)
    after = made.step(x @ matrix.T + 3.0, v @ matrix.T, q)
    assert before.shape == (5, 6) and np.abs(before[:, 3:] - v).max() > 1e-3
    np.testing.assert_allclose(after[:, :3], before[:, :3] @ matrix.T + 3.0, atol=1e-10)
    np.testing.assert_allclose(after[:, 3:], before[:, 3:] @ matrix.T, atol=1e-10)


def test_many_steps_are_one_after_the_other():
    x, v, q = system()
    made, matrix = stepper("segnn", steps=3), rotation(3)
    one = stepper("segnn", velocities=True)
    one.scales = made.scales._replace(displacement=made.scales.displacement / 3)
    one.load_state_dict(made.state_dict())
    state = np.hstack([x, v])
    for _ in range(3):
        state = one.step(state[:, :3], state[:, 3:], q)
    np.testing.assert_allclose(made.step(x, v, q), state[:, :3], atol=1e-12)
    turned = made.step(x @ matrix.T + 3.0, v @ matrix.T, q)
    np.testing.assert_allclose(turned, state[:, :3] @ matrix.T + 3.0, atol=1e-10)


def test_backwards_bodies_are_where_they_came_from(tmp_path):
    config = configured(tmp_path)
    data = config.data.model_copy(update={"backwards": True})
    found = read_sets_of_motion(config.model_copy(update={"data": data}))
    assert (len(found.train), len(found.valid)) == (80, 10)
    there, back = found.train[3], found.train[43]
    np.testing.assert_array_equal(back.graph.positions, there.labels.positions)
    np.testing.assert_array_equal(back.labels.positions, there.graph.positions)
    state = [values.numpy()[None] for values in back.graph[:3]]
    x, _ = leapfrog(SYSTEMS["charged"], *state, 1000)
    np.testing.assert_allclose(x[0], there.graph.positions, atol=5e-3)


def test_nearest_bodies_only():
    x, v, q = system(n=12)
    graph = bodies(x, v, q, neighbors=3)
    assert len(graph.edge_src) == 36 and (graph.edge_src != graph.edge_dst).all()
    apart = np.linalg.norm(x[:, None] - x, axis=2)
    assert set(graph.edge_src[graph.edge_dst == 5].tolist()) == set(np.argsort(apart[5])[1:4].tolist())
    assert len(bodies(x, v, q, neighbors=50).edge_src) == 12 * 11


def test_what_is_no_system_is_refused():
    x, v, q = system()
    with pytest.raises(StructureError, match=r"\(4, 3\).*expected \(n, 3\)"):
        bodies(x, v[:4], q)
    with pytest.raises(StructureError, match="not finite"):
        bodies(x, v * np.inf, q)
    with pytest.raises(ConfigError, match="expected one of segnn"):
        stepper_config("transformer")


@pytest.mark.parametrize(
    "preset, settings, reason",
    [
        ("segnn", {"equivariant": False}, "lmax_attr is 1; expected 0"),
        ("segnn", {"hidden_irreps": "32x0e+32x1e"}, "some 1o"),
        ("segnn", {"lmax_attr": 0}, "lmax_attr above 0"),
        ("segnn", {"features": False}, "network is 'segnn', which has none"),
        ("egnn", {"equivariant": False}, "equivariant is False, but network is 'egnn'"),
        ("egnn", {"velocity_attribute": False}, "velocity_attribute is False, but"),
        ("egnn", {"hidden_irreps": "8x0e+8x1o"}, "expected 0e only"),
        ("message-passing", {"velocities": True}, "velocities is True"),
        ("message-passing", {"steps": 2}, "steps is 2"),
        ("egnn", {"steps": 2}, "steps is 2, but network is 'egnn'"),
        ("tfn", {"pair_functions": "many"}, "a linear message has radial networks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(preset, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        stepper_config(preset, **settings)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preset", sorted(STEPPERS))
def test_bodies_hardly_move_before_it_has_learned(preset, seed):
    made = TimeStepper(stepper_config(preset), seed=seed).double()
    made.calibrate(collate([bodies(*system(n)) for n in range(20)]))
    x, v, q = system(30)
    assert 1e-3 < np.sqrt(np.square(made.step(x, v, q) - x).mean()) < 0.5


def configured(folder, *, velocities=False, **training):
    if not (folder / "motion.npz").exists():
        write_motion(folder / "motion.npz", simulate("charged", 60, 0))
    settings = {"epochs": 30, "batch_size": 10, "learning_rate": 0.01, "validate_every": 5, "warmup_steps": 5}
    return StepperTraining.parse(
        {
            "out": str(folder / "stepper.pt"),
            "data": {"motion": str(folder / "motion.npz"), "train": 40, "valid": 10, "test": 10},
            "model": {"preset": "segnn", "hidden_irreps": "8x0e+8x1o", "interactions": 2, "velocities": velocities},
            "training": {**settings, "device": "cpu", **training},
        }
    )


def test_it_learns_to_move_and_goes_on_with_the_same_bits(tmp_path, capsys):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    errors = train_stepper(configured(tmp_path / "whole"))
    assert "40 systems to learn from" in "".join(capsys.readouterr())
    motion = simulate("charged", 60, 0)
    straight = np.square(motion.later - motion.positions - motion.velocities)[50:].mean()
    assert errors["test"]["mse"] < 0.9 * straight
    stops = 0
    while True:
        try:
            train_stepper(configured(tmp_path / "parts", max_minutes=0.005), progress=False)
            break
        except OutOfTime:
            stops += 1
    assert stops
    whole, parts = (load_stepper(tmp_path / name / "stepper.pt") for name in ("whole", "parts"))
    assert checksum(whole[0].state_dict()) == checksum(parts[0].state_dict())
    assert whole[1]["errors"] == errors and whole[0].scales == parts[0].scales
    with pytest.raises(ConfigError, match=r"training\.epochs = 30"):
        train_stepper(configured(tmp_path / "whole", epochs=31), progress=False)


def test_velocities_are_learned_beside_positions(tmp_path):
    errors = train_stepper(configured(tmp_path, velocities=True), progress=False)
    made, _ = load_stepper(tmp_path / "stepper.pt")
    test = Motion(*(part[50:] for part in simulate("charged", 60, 0)))
    later = np.array([made.step(x, v, q) for x, v, q, *_ in zip(*test, strict=True)])
    assert np.square(later[:, :, :3] - test.later).mean() == pytest.approx(errors["test"]["mse"], rel=1e-5)
    unchanged = np.square(test.velocities - test.later_velocities).mean()
    assert np.square(later[:, :, 3:] - test.later_velocities).mean() < 0.95 * unchanged


def test_another_split_is_another_training_and_other_tests_are_not(tmp_path):
    config = configured(tmp_path, epochs=2)
    train_stepper(config, progress=False)
    for sizes, same in (({"test": 5}, True), ({"train": 30, "valid": 20}, False), ({"train": 39}, False)):
        other = config.model_copy(update={"data": config.data.model_copy(update=sizes)})
        with contextlib.nullcontext() if same else pytest.raises(ConfigError, match="data"):
            train_stepper(other, progress=False)


def test_too_few_systems_are_refused(tmp_path):
    config = configured(tmp_path)
    data = config.data.model_copy(update={"train": 41})
    with pytest.raises(DataError, match=r"has 60 systems; expected 41 \+ 10 \+ 10"):
        train_stepper(config.model_copy(update={"data": data}), progress=False)


def test_files_of_other_models_are_refused(tmp_path):
    made = stepper("egnn")
    save_stepper(tmp_path / "egnn.pt", made, metadata={"errors": {}})
    found, _ = load_stepper(tmp_path / "egnn.pt")
    content = load_tensors(tmp_path / "egnn.pt")
    for changes, reason in (
        ({"convention": "Condon-Shortley"}, "convention"),
        ({"scales": [1.0, 0.0, 1.0]}, "scales"),
        ({"weights": {}}, "no usable time-stepper"),
        ({"weights": {name: x * np.nan for name, x in content["weights"].items()}}, "not finite"),
        ({"version": 2}, "version 2"),
    ):
        save_tensors(tmp_path / "other.pt", {**content, **changes})
        with pytest.raises(ModelFileError, match=reason):
            load_stepper(tmp_path / "other.pt")
    x, v, q = system()
    np.testing.assert_array_equal(found.step(x, v, q), made.step(x, v, q))
    with pytest.raises(ModelFileError, match="expected a 'segnn_ase time-stepper'"):
        load_stepper(find_model("silicon-pbe"))
