"""Training: it learns, it resumes to the bit, it tells what is wrong, and it leaves what it promised."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.frames import emt_atoms, water_frames
from helpers.systems import copper
from helpers.trainings import TINY, configured, history, leave_out_plots, loss_on, weights

from segnn_ase.base.errors import ConfigError, DataError, ModelFileError, OutOfTime
from segnn_ase.base.files import stop_on_signal
from segnn_ase.base.settings import read_toml
from segnn_ase.data.batches import asked_for, collate_items, make_item, pack
from segnn_ase.data.frames import Frame, LabelKeys, frame_from_atoms
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_committee, load_with_metadata
from segnn_ase.store.tensors import checksum, load_tensors
from segnn_ase.train import loop, prepare, report, step
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.loss import losses_of
from segnn_ase.train.potential_goal import POTENTIAL
from segnn_ase.train.report import error_table
from segnn_ase.train.schedule import learning_rate
from segnn_ase.train.settings import OptimConfig, TrainConfig
from segnn_ase.train.start import finetune, train
from segnn_ase.train.step import make_batches, trainable, update_average

FILES = ("csv", "last.pt", "resume.pt", "learning_curve.png", "parity_energy_valid.png", "parity_forces_valid.png")


def tiny_potential(species: list[int], dtype=torch.float64) -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Potential(model_config(**TINY), species).to(dtype)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small training on water and copper with test files: its settings and what it returned."""
    folder = tmp_path_factory.mktemp("trained")
    ase.io.write(folder / "test.xyz", water_frames(3, seed=1))
    ase.io.write(folder / "bulk.xyz", emt_atoms(2, copper, seed=1))
    config = configured(
        folder,
        water_frames(20) + emt_atoms(8, copper),
        data={"test": [str(folder / "test.xyz"), str(folder / "bulk.xyz")]},
        epochs=12,
    )
    return config, train(config, progress=False)


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Plots would take most of the time of a tiny training; `trained`, of a wider scope, has them."""
    leave_out_plots(monkeypatch)


def test_training_reduces_loss_and_errors(trained):
    config, errors = trained
    rows = history(config.out)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    for name in ("train_loss", "valid_loss", "valid_energy_rmse", "valid_forces_rmse", "valid_stress_rmse"):
        assert float(rows[-1][name]) < 0.8 * float(rows[0][name]), name
    forces = np.concatenate([atoms.get_forces() for atoms in water_frames(3, seed=1)])
    assert errors[config.data.test[0]]["forces_rmse"] < 0.8 * np.sqrt(np.mean(forces**2))


def test_training_writes_every_file(trained):
    config, _ = trained
    for suffix in FILES:
        assert Path(config.out).with_suffix(f".{suffix}").stat().st_size > 0, suffix
    names = {path.name for path in Path(config.out).parent.iterdir()}
    assert {"model.parity_forces_test.png", "model.parity_stress_bulk.png"} <= names
    assert "model.parity_stress_test.png" not in names  # molecules have none
    assert not [name for name in names if name.startswith(".")]


def test_the_best_model_is_written_with_its_provenance(trained):
    config, errors = trained
    potential, metadata = load_with_metadata(config.out)
    rows = history(config.out)
    kept = next(row for row in rows if int(row["epoch"]) == metadata["epoch"])
    assert float(kept["valid_loss"]) <= 2 * min(float(row["valid_loss"]) for row in rows)
    assert metadata["epochs"] == int(rows[-1]["epoch"]) and metadata["learning_rate"] == 0.01
    assert metadata["errors"] == errors and set(errors) == {"train", "valid", *config.data.test}
    assert metadata["training"] == config.model_dump(mode="json") and metadata["fine_tuned_from"] is None
    covered = potential.domain
    assert potential.symbols == ["H", "O", "Cu"] and covered.frames == 21
    assert torch.isfinite(covered.closest).tolist() == [[True, True, False], [True, False, False], [False, False, True]]
    assert 0.7 < float(covered.closest[0, 1]) < 1.0
    assert potential.dtype == torch.float32


def test_errors_are_those_of_evaluate_and_of_the_table(trained):
    config, errors = trained
    found = evaluate_files(config.out, list(config.data.test))
    for path in config.data.test:
        for name, value in errors[path].items():
            assert found[path][name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
    first = error_table(errors).splitlines()[3].split()
    values = errors[config.data.test[0]]
    assert first[0] == "test.xyz" and first[-3:-1] == ["-", "-"]
    assert [float(x) for x in first[1:5]] == pytest.approx(
        [1e3 * values[f"{name}_{kind}"] for name in ("energy", "forces") for kind in ("rmse", "mae")], abs=1e-3
    )


def test_a_set_without_forces_expects_none(trained, tmp_path):
    frames = water_frames(2, seed=1)
    for atoms in frames:
        del atoms.calc.results["forces"]
    ase.io.write(tmp_path / "energies.xyz", frames)
    errors = evaluate_files(trained[0].out, [str(tmp_path / "energies.xyz")])[str(tmp_path / "energies.xyz")]
    assert errors["forces_rmse"] is None and "forces_std" not in errors and errors["energy_rmse"] > 0


def test_errors_are_those_of_the_calculator(trained):
    from segnn_ase.calculator import SEGNNCalculator

    config, errors = trained
    calc, energies, forces, stresses = SEGNNCalculator(config.out), [], [], []
    for atoms in emt_atoms(2, copper, seed=1):
        mine = atoms.copy()
        mine.calc = calc
        energies.append((mine.get_potential_energy() - atoms.get_potential_energy()) / len(atoms))
        forces.append(mine.get_forces() - atoms.get_forces())
        stresses.append(mine.get_stress(voigt=False) - atoms.get_stress(voigt=False))
    for name, delta in (("energy", energies), ("forces", forces), ("stress", stresses)):
        values = errors[config.data.test[1]]
        assert values[f"{name}_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(delta))), rel=1e-4), name
        assert values[f"{name}_mae"] == pytest.approx(np.mean(np.abs(delta)), rel=1e-4), name


def test_a_finished_training_is_not_repeated(trained, monkeypatch):
    config, errors = trained
    before = checksum(load_tensors(config.out))
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
    assert train(config, progress=False) == errors
    assert checksum(load_tensors(config.out)) == before


def test_without_progress_nothing_is_printed_and_with_it_the_tables_are(tmp_path, capfd):
    config = configured(tmp_path, water_frames(6))
    train(config, progress=False)
    assert capfd.readouterr() == ("", "")
    Path(config.out).with_suffix(".resume.pt").unlink()
    with pytest.raises(ConfigError, match="rename or remove it"):
        train(config)
    Path(config.out).unlink()
    train(config)
    text = capfd.readouterr().err
    for part in ("training set: 4 frames", "calculator forces", "E0 from least squares", "neighbours per atom", "rmse"):
        assert part in text
    assert f"wrote {config.out}" in text


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    seen = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(seen))
        folder.mkdir()
        config = configured(folder, water_frames(6), seed=seed)
        train(config, progress=False)
        seen.append(checksum(weights(config.out)))
    assert seen[0] == seen[1] != seen[2]


# resume


RESUMED = {"epochs": 50, "save_minutes": 0.0, "patience": 2, "learning_rate": 0.3}  # comes to rest early


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a training that nothing stopped; paths are relative, so that files can be compared."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    resumable(folder, train)
    return folder


def resumable(folder: Path, run) -> None:
    """Call run(config) with the folder as working folder."""
    before = Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        if not Path("train.traj").exists():
            ase.io.write("train.traj", water_frames(12) + emt_atoms(4, copper))
        run(configured(Path(), **RESUMED), progress=False)
    finally:
        os.chdir(before)


def assert_identical(a: Path, b: Path) -> None:
    for name in ("model.pt", "model.last.pt", "model.resume.pt"):
        assert checksum(load_tensors(a / name)) == checksum(load_tensors(b / name)), name
    assert (a / "model.csv").read_text() == (b / "model.csv").read_text()


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def killed_at(module, name: str, call: int):
    """Replace a function of the training by one that never returns from its n-th call."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **keywords):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **keywords)

    return wrapped


@pytest.mark.parametrize(
    "name, call",
    [
        ("next_step", 1),
        ("next_step", 8),
        ("update_average", 10),
        ("save_state", 9),  # with the last step of an epoch not saved
        ("validate", 2),
        ("save", 3),
        ("write_history", 4),
        ("finish", 1),
        ("plot_parities", 1),
    ],
)
def test_a_training_killed_anywhere_goes_on_to_the_same_bits(tmp_path, uninterrupted, name, call):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if name in POTENTIAL._fields:
            patch.setattr(prepare, "POTENTIAL", POTENTIAL._replace(**{name: killed_at(POTENTIAL, name, call)}))
        else:
            module = {"plot_parities": report, "update_average": step}.get(name, loop)
            patch.setattr(module, name, killed_at(module, name, call))
        resumable(tmp_path / "run", train)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "learning_rate", lambda done, *rest: steps.append(done.step) or learning_rate(done, *rest))
        resumable(tmp_path / "run", train)
    assert not steps or steps[0] > 0 or (name, call) == ("next_step", 1)
    assert_identical(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_process_killed_in_the_middle_goes_on_to_the_same_bits(tmp_path, uninterrupted, number, code):
    folder = tmp_path / "run"
    folder.mkdir()
    ase.io.write(folder / "train.traj", water_frames(12) + emt_atoms(4, copper))
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import pathlib, torch, helpers.trainings, segnn_ase.cli, segnn_ase.train.loop, segnn_ase.train.start
torch.set_num_threads(1)
step = segnn_ase.train.loop.next_step
def step_when_told(*args):
    print("step", flush=True)
    sys.stdin.readline()
    return step(*args)
segnn_ase.train.loop.next_step = step_when_told
with segnn_ase.cli.reported_errors():
    settings = helpers.trainings.configured(pathlib.Path(), **{RESUMED!r})
    segnn_ase.train.start.train(settings, progress=False)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for _ in range(11):
            assert process.stdout.readline() == "step\n", process.stderr.read()
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(0.01)  # somewhere in the eleventh step, or in saving it
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    if number == signal.SIGTERM:
        assert "the same command goes on from model.resume.pt" in errors and "Traceback" not in errors
    state = load_tensors(folder / "model.resume.pt")
    assert 10 <= state["progress"]["step"] <= 12
    resumable(folder, train)
    assert_identical(folder, uninterrupted)


def test_killed_between_the_first_model_and_the_first_save_it_goes_on(tmp_path, monkeypatch):
    config = configured(tmp_path, water_frames(8), save_minutes=60)

    def dies(*_):
        raise RuntimeError("power failure")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_history", dies)  # right after the first model is written
        with pytest.raises(RuntimeError, match="power failure"):
            train(config, progress=False)
    assert Path(config.out).exists()
    train(config, progress=False)
    assert len(history(config.out)) == 2


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert received == [signal.SIGTERM]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.02}, r"training.learning_rate = 0.01 \(now 0.02\)"),
        ({"epochs": 3}, r"training.epochs = 2 \(now 3\)"),
        ({"model": {**TINY, "n_radial": 5}}, r"model.n_radial = 4 \(now 5\)"),
        ({"data": {"valid_fraction": 0.5}}, r"data.valid_fraction = 0.25 \(now 0.5\)"),
        ({"frames": water_frames(6, seed=9)}, "other data"),
    ],
)
def test_changed_settings_or_data_are_refused_on_resume(tmp_path, change, message):
    ase.io.write(tmp_path / "train.traj", water_frames(6))
    train(configured(tmp_path), progress=False)
    config = configured(tmp_path, **change)
    with pytest.raises(ConfigError, match=rf"model.resume.pt belongs to a training with .*{message}.*delete that file"):
        train(config, progress=False)


# the loop's parts


def mixed_frames() -> list[Frame]:
    """Molecules and crystals, each label missing somewhere."""
    frames = [frame_from_atoms(atoms) for atoms in water_frames(4) + emt_atoms(3, copper)]
    frames[0].atoms.cell[:] = [[9, 0, 0], [9, 0, 0], [0, 0, 9]]  # means nothing: not periodic
    frames[1] = frames[1]._replace(energy=None)
    frames[2] = frames[2]._replace(forces=None)
    frames[3] = frames[3]._replace(energy=None, forces=None)
    frames[5] = frames[5]._replace(stress=None, energy=None)
    frames[6] = frames[6]._replace(forces=None)
    return frames


def test_the_loss_is_the_mean_square_over_the_labels_that_are_there():
    frames, potential = mixed_frames(), tiny_potential([1, 8, 29]).eval()
    settings = OptimConfig(energy_weight=0.5, forces_weight=2.0, stress_weight=3.0)
    items = [make_item(f, 3.0) for f in frames]
    batch = collate_items(items)
    loss = loss_on(batch, potential, settings)
    terms = {"energy": [], "forces": [], "stress": []}
    for frame in frames:
        n, crystal = len(frame.atoms), bool(frame.atoms.pbc.all())
        found = predict(potential, make_item(frame, 3.0).graph, stress=crystal)
        if frame.energy is not None:
            terms["energy"].append((found.energy.item() - frame.energy) ** 2 / n)
        if frame.forces is not None:
            terms["forces"].extend(np.square(found.forces.numpy() - frame.forces).ravel())
        if frame.stress is not None:
            virial = (found.stress[0].numpy() - frame.stress) * frame.atoms.get_volume()
            terms["stress"].extend(np.square(virial).ravel() / n)
    expected = 0.5 * np.mean(terms["energy"]) + 2.0 * np.mean(terms["forces"]) + 3.0 * np.mean(terms["stress"])
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    prediction = predict(potential, batch.graph, **asked_for(batch.labels))
    each = losses_of(prediction, batch.graph, batch.labels, settings)
    assert each.tolist() == pytest.approx([float(loss_on(item, potential, settings)) for item in items], rel=1e-12)


def test_the_gradient_of_the_loss_with_missing_labels_is_finite_and_right():
    potential = tiny_potential([1, 8, 29]).train()
    batch = collate_items([make_item(f, 3.0) for f in mixed_frames()])
    loss_on(batch, potential).backward()
    named = {name: p for name, p in potential.named_parameters() if p.grad is not None}
    assert len(named) > 20 and all(torch.isfinite(p.grad).all() for p in named.values())
    for name in ("segnn.embedding", "segnn.messages.0", "segnn.updates.1", "readout.last"):
        weight = next(p for n, p in named.items() if n.startswith(name) and p.grad.abs().max() > 1e-3)
        k = int(weight.grad.abs().argmax())
        losses = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                weight.view(-1)[k] += shift
            losses.append(float(loss_on(batch, potential).detach()))
            with torch.no_grad():
                weight.view(-1)[k] -= shift
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(weight.grad.view(-1)[k]), rel=1e-4), name


def test_a_prediction_that_is_not_finite_is_not_taken_for_a_missing_label():
    potential = tiny_potential([1, 8])
    with torch.no_grad():
        potential.readout.last.last.weight.fill_(float("nan"))
    item = make_item(frame_from_atoms(water_frames(1)[0]), 3.0)
    assert not torch.isfinite(loss_on(item, potential))
    prediction = predict(potential, item.graph)
    assert not torch.isfinite(losses_of(prediction, item.graph, item.labels, OptimConfig())).any()


def test_frames_with_missing_labels_train(tmp_path):
    images = water_frames(8) + emt_atoms(4, copper)
    for atoms, name in zip(images, ["energy", "forces", None, "energy"] * 3, strict=True):
        atoms.calc.results.pop(name, None)
    config = configured(tmp_path, images, epochs=3)
    errors = train(config, progress=False)
    assert all(np.isfinite(errors["valid"][f"{name}_rmse"]) for name in ("energy", "forces"))
    assert all(torch.isfinite(w).all() for w in weights(config.out).values())


@pytest.mark.parametrize("name", ["energy", "forces"])
def test_one_kind_of_label_is_enough(tmp_path, name):
    images = water_frames(8)
    for atoms in images:
        del atoms.calc.results[name]
    errors = train(configured(tmp_path, images), progress=False)
    assert errors["valid"][f"{name}_rmse"] is None
    assert errors["valid"][f"{'forces' if name == 'energy' else 'energy'}_rmse"] > 0


def test_stress_is_learned(tmp_path):
    rmse = {}
    for weight in (0.0, 10.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        images = emt_atoms(12, copper, stdev=0.05)
        for atoms in images:
            del atoms.calc.results["forces"]
        settings = {"energy_weight": 1e-3, "stress_weight": weight, "epochs": 20, "learning_rate": 0.03}
        rmse[weight] = train(configured(folder, images, **settings), progress=False)["valid"]["stress_rmse"]
    assert rmse[10.0] < 0.6 * rmse[0.0]


def test_a_training_that_learns_no_more_comes_to_rest(tmp_path):
    config = configured(tmp_path, water_frames(8), epochs=50, patience=2, learning_rate=0.3)
    train(config, progress=False)
    rows = history(config.out)
    losses, rates = ([float(row[name]) for row in rows] for name in ("valid_loss", "lr"))
    assert len(losses) < 50 and rates[-1] == pytest.approx(
        rates[-2] / 3
    )  # within two epochs to zero, of two steps each
    alike = [n for n in range(1, len(losses) + 1) if losses[n - 1] <= 2 * min(losses[: n - 1], default=math.inf)]
    assert load_with_metadata(config.out)[1]["epoch"] == alike[-1]  # as far as one frame can tell
    assert load_with_metadata(Path(config.out).with_suffix(".last.pt"))[1]["epoch"] == len(losses)
    train(config, progress=False)  # goes on to nothing
    assert len(history(config.out)) == len(losses)


def test_a_signal_in_the_last_validation_is_not_lost(tmp_path, monkeypatch):
    validate = loop.validate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    config = configured(tmp_path, water_frames(8), epochs=1, committee=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            train(config, progress=False)
    assert not (tmp_path / "model.2.pt").exists()
    train(config, progress=False)
    assert len(load_committee(config.out).potentials) == 2


def test_validation_every_so_many_epochs_and_at_the_end(tmp_path):
    config = configured(tmp_path, water_frames(6), epochs=5, validate_every=2)
    train(config, progress=False)
    assert [int(row["epoch"]) for row in history(config.out)] == [2, 4, 5]


def test_batches_by_structures_cover_everything_once():
    items = [make_item(frame_from_atoms(atoms), 3.0) for atoms in water_frames(11)]
    settings = OptimConfig(batch_size=4)
    batches = make_batches(items, settings, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 3] and sorted(itertools.chain(*batches)) == list(range(11))
    assert batches == make_batches(items, settings, epoch=0) != make_batches(items, settings, epoch=1)
    assert batches != make_batches(items, OptimConfig(batch_size=4, seed=1), epoch=0)


def test_batches_by_edges_stay_within_the_budget():
    edges = [5, 9, 30, 1, 7, 2]
    batches = pack([0, 1, 2, 3, 4, 5], edges, 3, 10)
    assert batches == [[0], [1], [2], [3, 4, 5]]
    items = [make_item(frame_from_atoms(atoms), 3.0) for atoms in water_frames(4) + emt_atoms(4, copper)]
    for batch in make_batches(items, OptimConfig(max_edges=150), epoch=0):
        assert len(batch) == 1 or sum(len(items[n].graph.edge_src) for n in batch) <= 150


def test_training_with_a_budget_of_edges(tmp_path):
    config = configured(tmp_path, water_frames(8), data={"valid_fraction": 0.0}, max_edges=12, epochs=1)
    train(config, progress=False)
    assert int(history(config.out)[-1]["step"]) == 4  # two molecules of six edges each


def test_the_average_of_the_weights():
    mean, expected = [torch.zeros(3)], np.zeros(3)
    for count in range(1, 40):
        value = torch.full((3,), float(count))
        update_average(mean, [value], count, 0.6)
        decay = min(0.6, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
    assert np.allclose(mean[0].numpy(), expected, rtol=1e-5)


def test_the_averaged_weights_are_what_is_saved(tmp_path):
    config = configured(tmp_path, water_frames(6))
    train(config, progress=False)
    state = load_tensors(Path(config.out).with_suffix(".resume.pt"))
    last = weights(Path(config.out).with_suffix(".last.pt"))
    assert checksum(last) == checksum(dict(state["averaged"])) != checksum(dict(state["weights"]))


def test_without_averaging_the_weights_themselves_are_saved(tmp_path):
    config = configured(tmp_path, water_frames(6), ema_decay=0.0)
    train(config, progress=False)
    state = load_tensors(Path(config.out).with_suffix(".resume.pt"))
    for name, value in weights(Path(config.out).with_suffix(".last.pt")).items():
        assert torch.allclose(value, state["weights"][name], atol=1e-7), name


def test_double_precision(tmp_path):
    config = configured(tmp_path, water_frames(6), dtype="float64", weight_decay=0.01)
    train(config, progress=False)
    assert load_with_metadata(config.out)[0].dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("preset", ["tfn", "egnn", "schnet", "segnn2022"])
def test_every_preset_trains(tmp_path, preset):
    small = {**TINY, "preset": preset}
    if preset in ("egnn", "schnet"):
        small |= {"hidden_irreps": "4x0e", "lmax_attr": 0}
    errors = train(configured(tmp_path, water_frames(6), model=small), progress=False)
    assert np.isfinite(errors["valid"]["forces_rmse"])


def test_isolated_atoms_are_learned_from_and_give_their_own_energies(tmp_path):
    atoms = [Atoms("H"), Atoms("O")]
    for single, energy in zip(atoms, (-1.5, -2.5), strict=True):
        single.info["energy"] = energy
    ase.io.write(tmp_path / "atoms.xyz", atoms)
    config = configured(tmp_path, water_frames(6), data={"isolated_atoms": str(tmp_path / "atoms.xyz")})
    train(config, progress=False)
    potential, _ = load_with_metadata(config.out)
    assert potential.reference_energies == [-1.5, -2.5]
    del atoms[1]
    ase.io.write(tmp_path / "atoms.xyz", atoms)
    with pytest.raises(DataError, match="isolated atoms lack an energy of O"):
        train(config, progress=False)


def test_isolated_atoms_among_the_training_frames(tmp_path):
    frames = water_frames(6)
    for symbol, energy in (("H", -1.5), ("O", -2.5)):
        frames.insert(0, Atoms(symbol))
        frames[0].info["energy"] = energy
    ase.io.write(tmp_path / "train.xyz", frames)
    config = configured(tmp_path, data={"train": str(tmp_path / "train.xyz")}, batch_size=1)
    train(config, progress=False)
    assert load_with_metadata(config.out)[0].reference_energies == [-1.5, -2.5]


def test_isolated_atoms_of_some_elements_are_left_out_which_is_told(tmp_path):
    frames, told = water_frames(6), []
    frames.insert(0, Atoms("H"))
    frames[0].info["energy"] = -1.5
    ase.io.write(tmp_path / "train.xyz", frames)
    data = prepare.read_data(configured(tmp_path, data={"train": str(tmp_path / "train.xyz")}), told.append)
    assert all(len(item.atoms) == 3 for item in data.train) and data.references.method == "least squares"
    assert any("1 isolated atoms (H) are left out, as there are none of other elements" in line for line in told)


def test_a_short_cutoff_is_told(tmp_path):
    for a, n, text in ((2.9, 2, "half of the atoms are 2.9 Å away"), (3.4, 2, "farther away"), (3.4, 1, "3.4 Å away")):
        frames, told = [bulk("Po", "sc", a=a).repeat((n, 1, 1)) for _ in range(4)], []
        for k, atoms in enumerate(frames):
            atoms.rattle(0.01, seed=k)
            atoms.calc = SinglePointCalculator(atoms, energy=-3.0 * n, forces=np.full((n, 3), 0.1 * (-1) ** k))
        config = configured(tmp_path, frames, model={**TINY, "cutoff": 3.0}, data={"refuse_flaws": False})
        prepare.read_data(config, told.append)
        assert any("warning" in line and text in line for line in told), told
    config = configured(tmp_path, emt_atoms(8, copper), model={**TINY, "cutoff": 4.0})
    told.clear()
    prepare.read_data(config, told.append)
    assert not any("cutoff" in line for line in told)


def test_charges_that_a_potential_is_not_told_explain_nothing(tmp_path):
    """The same molecule with two energies is a contradiction then."""
    frames = water_frames(20)
    for atoms in water_frames(20):
        atoms.calc.results["energy"] += 9.0
        atoms.info["charge"] = 1
        frames.append(atoms)
    ase.io.write(tmp_path / "train.xyz", frames)
    config = configured(tmp_path, data={"train": str(tmp_path / "train.xyz")})
    with pytest.raises(DataError, match="the same structures with different labels"):
        prepare.read_data(config, print)
    of_cue = configured(tmp_path, data={"train": str(tmp_path / "train.xyz")}, model={**TINY, "cues": ["charge"]})
    assert prepare.read_data(of_cue, print).train


def test_reference_energies_from_a_table(tmp_path):
    config = configured(tmp_path, water_frames(6), data={"reference_energies": {"O": -2.0, "H": -1.0}})
    train(config, progress=False)
    assert load_with_metadata(config.out)[0].reference_energies == [-1.0, -2.0]
    for table, error, message in (
        ({"H": -1.0}, DataError, "reference energies lack O"),
        ({"H": -1.0, "O": 0.0, "Xx": 0.0}, ConfigError, "species has .'Xx'."),
    ):
        config = configured(tmp_path, data={"reference_energies": table})
        with pytest.raises(error, match=message):
            train(config, progress=False)


# fine-tuning


def another_level(images: list[Atoms], offset: dict[int, float]) -> list[Atoms]:
    """The same frames with energies moved by a constant for each element."""
    for atoms in images:
        atoms.calc.results["energy"] += sum(offset[z] for z in atoms.numbers.tolist())
    return images


@pytest.mark.slow
def test_finetuning_moves_the_reference_energies_and_improves(tmp_path, trained):
    model, found = trained[0].out, {}
    for name, offset in (("same", {1: 0.0, 8: 0.0, 29: 0.0}), ("other", {1: 5.0, 8: -40.0, 29: 3.0})):
        folder = tmp_path / name
        folder.mkdir()
        images = another_level(water_frames(8, seed=5) + emt_atoms(4, copper, seed=5), offset)
        config = configured(folder, images, data={"valid_fraction": 0.0}, model={}, epochs=20, learning_rate=0.01)
        before = evaluate_files(model, list(config.data.train))[config.data.train[0]]
        errors = finetune(model, config, progress=False)["train"]
        new, metadata = load_with_metadata(config.out)
        found[name] = (before, errors, new.reference_energies)
        assert errors["forces_rmse"] < before["forces_rmse"] and errors["energy_rmse"] < before["energy_rmse"]
        assert metadata["fine_tuned_from"]["training"]["out"] == model
    (_, same, old_references), (before, other, new_references) = found.values()
    assert old_references == load_with_metadata(model)[0].reference_energies  # they are off as is expected of it
    assert other.pop("energy_rmse_before") < same.pop("energy_rmse_before")  # its own error was shifted, too
    # rounding of the shift grows: where gradients are few, small eigenvalues have no eigenvectors of their own
    assert before["energy_rmse"] > 3.0 and other == {k: pytest.approx(v, rel=0.3) for k, v in same.items()}
    shift = np.subtract(new_references, old_references)
    assert 2 * shift[0] + shift[1] == pytest.approx(-30.0, abs=0.3) and shift[2] == pytest.approx(3.0, abs=0.1)


def test_finetuning_on_some_of_the_elements_leaves_the_others_alone(tmp_path, trained):
    images = another_level(emt_atoms(4, copper), {29: 3.0})
    config = configured(tmp_path, images, model={}, epochs=1, learning_rate=1e-6)
    finetune(trained[0].out, config, progress=False)
    old, new = load_with_metadata(trained[0].out)[0], load_with_metadata(config.out)[0]
    assert new.species == old.species and new.reference_energies[:2] == old.reference_energies[:2]
    assert new.reference_energies[2] == pytest.approx(old.reference_energies[2] + 3.0, abs=0.3)


def test_frozen_parts_keep_their_weights(tmp_path, trained):
    model = trained[0].out
    config = configured(tmp_path, water_frames(6), model={}, freeze=["segnn.messages.0", "segnn.embedding"])
    finetune(model, config, progress=False)
    old, new = weights(model), weights(config.out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and not [n for n in changed if n.startswith(("segnn.messages.0.", "segnn.embedding."))]
    assert any(n.startswith("segnn.messages.1.") for n in changed) and any(n.startswith("readout.") for n in changed)


def test_nothing_frozen():
    potential = tiny_potential([1, 8])
    assert trainable(potential, ()).keys() == dict(potential.named_parameters()).keys()


# what is refused


def zero(atoms: Atoms) -> Atoms:
    atoms.calc.results.update(energy=0.0, forces=np.zeros((len(atoms), 3)))
    return atoms


def without_labels(atoms: Atoms) -> Atoms:
    atoms.calc = None
    return atoms


def without_a_cell(atoms: Atoms) -> Atoms:
    atoms.pbc = True
    atoms.calc.atoms = atoms.copy()
    return atoms


@pytest.mark.parametrize(
    "spoil, message",
    [
        (zero, "energy is zero in every frame"),
        (without_labels, "no frame has an energy or forces"),
        (without_a_cell, r"train.traj, frame \d: cell is .* span no volume"),
    ],
)
def test_useless_training_sets_are_refused(tmp_path, spoil, message):
    config = configured(tmp_path, [spoil(atoms) for atoms in water_frames(4)])
    with pytest.raises(DataError, match=message):
        train(config, progress=False)
    assert not list(tmp_path.glob("model*"))


def test_one_frame_is_enough(tmp_path):
    config = configured(tmp_path, water_frames(1))
    assert set(train(config, progress=False)) == {"train"}


@pytest.mark.slow
def test_out_of_time_it_stops_saved_and_goes_on_to_the_same_bits(tmp_path):
    (whole := tmp_path / "whole").mkdir(), (parts := tmp_path / "parts").mkdir()
    train(configured(whole, water_frames(8)), progress=False)
    stops = 0
    while True:
        try:
            train(configured(parts, water_frames(8), max_minutes=1e-6), progress=False)  # one step a call
            break
        except OutOfTime as error:
            assert "the same command goes on from" in str(error)
            stops += 1
    assert stops == 2 * 2  # after each batch of two epochs; the fifth call validates and writes
    assert checksum(weights(parts / "model.pt")) == checksum(weights(whole / "model.pt"))


@pytest.fixture(scope="module")
def committee(tmp_path_factory):
    folder = tmp_path_factory.mktemp("committee")
    ase.io.write(folder / "test.xyz", water_frames(6, seed=1))
    data = {"test": str(folder / "test.xyz")}
    config = configured(folder, water_frames(16), data=data, committee=3, epochs=6)
    return config, train(config, progress=False)


@pytest.mark.slow
def test_a_committee_is_one_file_of_potentials_trained_from_other_seeds(committee):
    config, _ = committee
    found = load_committee(config.out)
    assert len(found.potentials) == 3 and set(found.factors) == {"energy", "forces", "stress"}
    sums = {checksum(p.state_dict()) for p in found.potentials}
    alone = [load_with_metadata(Path(config.out).with_suffix(f".{k}.pt")) for k in (1, 2, 3)]
    assert len(sums) == 3 and sums == {checksum(p.state_dict()) for p, _ in alone}
    assert [metadata["training"]["training"]["seed"] for _, metadata in alone] == [0, 1, 2]
    assert {p.domain.frames for p in found.potentials} <= {12, 13}  # near copies are drawn together or not
    with pytest.raises(ModelFileError, match="is a committee of 3 potentials; expected one"):
        load_with_metadata(config.out)


@pytest.mark.slow
def test_the_committee_expects_its_errors(committee):
    from segnn_ase.calculator import SEGNNCalculator

    config, errors = committee
    valid = errors["valid"]
    assert valid["forces_std"] == pytest.approx(valid["forces_rmse"])  # that is what it is calibrated to
    path = config.data.test[0]
    calc, spread, error, inside = SEGNNCalculator(config.out, domain="ignore"), [], [], []
    for atoms in water_frames(6, seed=1):
        mine = atoms.copy()
        mine.calc = calc
        error.append(mine.get_forces() - atoms.get_forces())
        spread.append(calc.results["forces_std"])
        inside.append(not calc.results["outside_domain"])
    assert np.sqrt(np.mean(np.square(error))) == pytest.approx(errors[path]["forces_rmse"], rel=1e-4)
    assert np.sqrt(np.mean(np.square(spread))) == pytest.approx(errors[path]["forces_std"], rel=1e-4)
    found = evaluate_files(config.out, [path])[path]
    assert found.get("outside", 0) == inside.count(False) and found["forces_rmse"] == errors[path]["forces_rmse"]
    expected = [s for s, known in zip(spread, inside, strict=True) if known]
    if expected:
        assert found["forces_std"] == pytest.approx(np.sqrt(np.mean(np.square(expected))), rel=1e-4)


@pytest.mark.slow
def test_a_finished_committee_is_not_trained_again(committee, monkeypatch):
    config, errors = committee
    monkeypatch.setattr(loop, "next_step", None)
    assert train(config, progress=False) == errors


@pytest.mark.slow
def test_a_committee_that_was_stopped_goes_on(committee, tmp_path, monkeypatch):
    config, _ = committee
    data = {"train": config.data.train, "test": config.data.test}
    again = configured(tmp_path, data=data, committee=3, epochs=6)
    do, count = loop.next_step, itertools.count()

    def dies(*arguments):
        if next(count) == 20:  # in the second member
            raise RuntimeError("power failure")
        return do(*arguments)

    monkeypatch.setattr(loop, "next_step", dies)
    with pytest.raises(RuntimeError, match="power failure"):
        train(again, progress=False)
    train(again, progress=False)
    for a, b in zip(load_committee(again.out).potentials, load_committee(config.out).potentials, strict=True):
        assert checksum(a.state_dict()) == checksum(b.state_dict())


@pytest.mark.slow
def test_another_file_is_not_replaced_by_a_committee(committee, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists and is no committee to go on with"):
        train(configured(tmp_path, data={"train": committee[0].data.train}, committee=2), progress=False)
    assert (tmp_path / "model.pt").read_bytes() == b"precious"
    (tmp_path / "model.pt").write_bytes(Path(committee[0].out).read_bytes())  # somebody else's, without its members
    with pytest.raises(ConfigError, match="exists and is no committee to go on with"):
        train(configured(tmp_path, data={"train": committee[0].data.train}, committee=2), progress=False)
    member = Path(committee[0].out).with_suffix(".1.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(member)  # a potential, even with its resume file
    (tmp_path / "model.resume.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="exists and is no committee to go on with"):
        train(configured(tmp_path, data={"train": committee[0].data.train}, committee=2), progress=False)
    with pytest.raises(ConfigError, match=r"out is .model.; expected a name that ends in \.pt"):
        train(
            configured(tmp_path, data={"train": committee[0].data.train}, committee=2).model_copy(
                update={"out": "model"}
            )
        )


def test_settings_from_toml(tmp_path):
    ase.io.write(tmp_path / "train.xyz", water_frames(6))
    (tmp_path / "config.toml").write_text(f"""
out = "{tmp_path}/model.pt"
[data]
train = "{tmp_path}/train.xyz"
[model]
preset = "fast"
hidden_irreps = "4x0e+4x1o"
cutoff = 3.0
radial_hidden = [8]
[training]
epochs = 1
""")
    config = TrainConfig.parse(read_toml(tmp_path / "config.toml"))
    train(config, progress=False)
    potential, _ = load_with_metadata(tmp_path / "model.pt")
    assert potential.config == model_config("fast", hidden_irreps="4x0e+4x1o", cutoff=3.0, radial_hidden=(8,))


def test_tensorboard(tmp_path):
    train(configured(tmp_path, water_frames(6), tensorboard=True), progress=False)
    assert list((tmp_path / "model.tensorboard").glob("events.*"))


def test_evaluate_files_of_one_frame_with_a_key(trained, tmp_path):
    atoms = water_frames(1, seed=1)[0]
    atoms.info["mine"] = atoms.get_potential_energy() + 3.0
    ase.io.write(tmp_path / "a.xyz", atoms)
    path = str(tmp_path / "a.xyz")
    usual = evaluate_files(trained[0].out, [path])[path]
    keys = LabelKeys(energy="mine")
    shifted = evaluate_files(trained[0].out, [path], keys=keys)[path]
    assert abs(usual["energy_mae"] - shifted["energy_mae"]) == pytest.approx(1.0, abs=2 * usual["energy_mae"] + 1e-6)
