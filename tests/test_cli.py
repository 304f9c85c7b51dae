"""The command line: every option arrives, mistakes are one line, and the commands do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
from ase.build import molecule
from helpers.command_line import TOML, assert_one_line_error, segnn
from helpers.frames import emt_atoms

from segnn_ase import cli
from segnn_ase.base import figures
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.train import loop, start
from segnn_ase.train.settings import FINETUNE_DEFAULTS, DataConfig, OptimConfig, TrainConfig


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    for name in ("plot_parity", "plot_learning_curve"):
        monkeypatch.setattr(figures, name, lambda *_, **__: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with frames, a configuration and the model trained by it."""
    folder = tmp_path_factory.mktemp("cli")
    ase.io.write(folder / "train.xyz", emt_atoms(8))
    ase.io.write(folder / "test.xyz", emt_atoms(3, seed=1))
    (folder / "config.toml").write_text(TOML)
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = segnn("train", "config.toml", "--test", "test.xyz", "--seed", 7, "--threads", 1)
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    (folder / "output").write_text(result.stderr)
    return folder


@pytest.fixture
def work(folder, monkeypatch):
    """The same folder as working folder."""
    monkeypatch.chdir(folder)
    return folder


def test_train_from_a_file_with_options_on_top(work):
    potential, metadata = load_with_metadata(work / "model.pt")
    assert potential.config.hidden_irreps == "4x0e+4x1o"
    settings = metadata["training"]["training"]
    assert (settings["epochs"], settings["seed"]) == (3, 7)
    assert metadata["training"]["data"]["test"] == ["test.xyz"]
    text = (work / "output").read_text()
    for part in ("training set: 6 frames", "calculator energy", "E0 from", "test.xyz", "meV/atom", "wrote model.pt"):
        assert part in text


def test_the_same_command_goes_on(work, monkeypatch):
    monkeypatch.setattr(loop, "training_step", lambda *_: pytest.fail("a step was made"))
    assert segnn("train", "config.toml", "--test", "test.xyz", "--seed", 7).exit_code == 0
    result = segnn("train", "config.toml", "--test", "test.xyz", "--seed", 8)
    assert_one_line_error(result, "training.seed = 7 (now 8)")


def test_train_from_options_alone(work, tmp_path):
    out = tmp_path / "small.pt"
    options = "--train train.xyz --valid test.xyz --preset schnet --cutoff 3 --epochs 1 --device cpu --dtype float64"
    result = segnn("train", *options.split(), "--out", out)
    assert result.exit_code == 0, result.output
    potential, metadata = load_with_metadata(out)
    assert potential.config.lmax_attr == 0 and potential.cutoff == 3.0 and str(potential.dtype) == "torch.float64"
    assert set(metadata["errors"]) == {"train", "valid"}


def test_finetune(work, tmp_path):
    out = tmp_path / "tuned.pt"
    options = "--train test.xyz --epochs 2 --freeze segnn.messages.0 --freeze segnn.embedding --device cpu"
    result = segnn("finetune", "model.pt", *options.split(), "--out", out)
    assert result.exit_code == 0, result.output
    assert "shift of E0" in result.stderr
    settings = load_with_metadata(out)[1]["training"]["training"]
    assert settings["freeze"] == ["segnn.messages.0", "segnn.embedding"] and settings["epochs"] == 2
    assert settings["learning_rate"] == FINETUNE_DEFAULTS["learning_rate"]


def test_evaluate_prints_the_table_of_the_training(work):
    result = segnn("evaluate", "model.pt", "test.xyz", "train.xyz", "--device", "cpu")
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert "energy [meV/atom] rmse" in header and "forces [meV/Å] rmse" in header
    assert [row.split()[0] for row in rows] == ["test.xyz", "train.xyz"]
    expected = 1e3 * load_with_metadata("model.pt")[1]["errors"]["test.xyz"]["forces_rmse"]
    assert float(rows[0].split()[3]) == pytest.approx(expected, rel=1e-4)


def test_md_runs_goes_on_and_plots(work, tmp_path):
    cell = molecule("H2O")
    cell.set_cell([8, 8, 8])
    cell.pbc = True
    ase.io.write(tmp_path / "start.xyz", cell)
    start = ["md", tmp_path / "start.xyz", "--model", "model.pt", "--out", tmp_path / "run", "--timestep", 0.02]
    options = ["--log-every", 1, "--save-every", 2, "--rdf", "O-H", "--device", "cpu", "--seed", 3]
    first = segnn(*start, *options, "--steps", 4)
    assert first.exit_code == 0, first.output
    assert "ms/step" in first.stdout and "ns/day" in first.stdout
    longer = segnn(*start, *options, "--steps", 8)
    assert longer.exit_code == 0, longer.output
    assert len(ase.io.read(tmp_path / "run.xyz", ":")) == 5
    assert {p.name for p in tmp_path.glob("run*")} == {"run.csv", "run.npz", "run.xyz", "run_energy.png", "run_rdf.png"}
    assert_one_line_error(segnn(*start, *options, "--steps", 8, "--temperature", 400), "temperature was 300.0")
    assert_one_line_error(segnn("md", "no.xyz", "--model", "model.pt"), "structure is 'no.xyz'")
    assert_one_line_error(segnn(*start[:-1], 50), "timestep")
    committee = segnn(*start, "--model", "model.pt", "--out", tmp_path / "both", "--steps", 1)
    assert committee.exit_code == 0, committee.output


def test_info(work):
    result = segnn("info", "model.pt")
    assert result.exit_code == 0
    for part in ("elements    H O", "4x0e+4x1o", "cutoff      3.0 Å", "errors      test.xyz"):
        assert part in result.stdout


OPTIONS = {  # option: value on the command line, section and field, value in the settings
    "--train": ("b.xyz", "data", "train", ("b.xyz",)),
    "--valid": ("b.xyz", "data", "valid", ("b.xyz",)),
    "--test": ("b.xyz", "data", "test", ("b.xyz",)),
    "--isolated-atoms": ("b.xyz", "data", "isolated_atoms", "b.xyz"),
    "--energy-key": ("mine", "data", "energy_key", "mine"),
    "--forces-key": ("mine", "data", "forces_key", "mine"),
    "--stress-key": ("mine", "data", "stress_key", "mine"),
    "--epochs": ("5", "training", "epochs", 5),
    "--batch-size": ("3", "training", "batch_size", 3),
    "--max-edges": ("99", "training", "max_edges", 99),
    "--learning-rate": ("0.3", "training", "learning_rate", 0.3),
    "--energy-weight": ("0.3", "training", "energy_weight", 0.3),
    "--forces-weight": ("0.3", "training", "forces_weight", 0.3),
    "--stress-weight": ("0.3", "training", "stress_weight", 0.3),
    "--patience": ("4", "training", "patience", 4),
    "--seed": ("4", "training", "seed", 4),
    "--device": ("cpu", "training", "device", "cpu"),
    "--dtype": ("float64", "training", "dtype", "float64"),
    "--freeze": ("segnn", "training", "freeze", ("segnn",)),
}
ONLY_TRAIN = (
    "--isolated-atoms --max-edges --energy-weight --forces-weight --stress-weight --patience --dtype --tensorboard"
).split()


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_every_option_arrives(command, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "train", lambda config: seen.append(config))
    monkeypatch.setattr(start, "finetune", lambda model, config: seen.append(config))
    command_line = ["train", "--train", "a.xyz"] if command == "train" else ["finetune", "m.pt", "--train", "a.xyz"]
    left_out = {"--freeze"} if command == "train" else set(ONLY_TRAIN)
    assert segnn(*command_line).exit_code == 0
    (plain,) = seen
    for option, (text, section, field, value) in OPTIONS.items():
        if option in left_out:
            continue
        result = segnn(*command_line, option, text)
        assert result.exit_code == 0, result.output
        found, before = (getattr(getattr(config, section), field) for config in (seen[-1], plain))
        assert found == (("a.xyz", "b.xyz") if option == "--train" else value) != before, option
    assert segnn(*command_line, "--out", "other.pt").exit_code == 0 and seen[-1].out == "other.pt"


def test_flags_and_model_options_arrive(monkeypatch):
    seen = []
    monkeypatch.setattr(start, "train", lambda config: seen.append(config))
    command_line = ["train", "--train", "a.xyz"]
    assert segnn(*command_line, "--tensorboard", "--preset", "fast", "--cutoff", "4").exit_code == 0
    assert seen[-1].training.tensorboard and seen[-1].model == {"preset": "fast", "cutoff": 4.0}


def test_the_lists_of_options_are_fields_of_the_settings():
    assert set(cli.DATA_OPTIONS) <= DataConfig.model_fields.keys()
    assert set(cli.TRAINING_OPTIONS) <= OptimConfig.model_fields.keys()


def test_ranks_option_before_file_before_default(work, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "finetune", lambda model, config: seen.append(config))
    (work / "tune.toml").write_text('[data]\ntrain = "a.xyz"\n[training]\nepochs = 4\nseed = 3\n')
    assert segnn("finetune", "m.pt", "--config", "tune.toml", "--seed", 5).exit_code == 0
    assert (seen[0].training.epochs, seen[0].training.seed, seen[0].data.train) == (4, 5, ("a.xyz",))
    assert segnn("finetune", "m.pt", "--train", "a.xyz").exit_code == 0
    assert seen[1] == TrainConfig.parse({"data": {"train": "a.xyz"}})


def test_a_bug_keeps_its_traceback(work, monkeypatch):
    def bug(config):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(start, "train", bug)
    result = segnn("train", "config.toml")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interruption_says_how_to_go_on(work, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt("stopped; the same command goes on from model.resume.pt")

    monkeypatch.setattr(start, "train", interrupted)
    result = segnn("train", "config.toml")
    assert result.exit_code == 130 and "the same command goes on" in result.stderr


def run_segnn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The installed command in a process of its own."""
    command = Path(sys.executable).with_name("segnn")
    assert command.is_file(), "the package is not installed: pip install --editable ."
    return subprocess.run(
        [command, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "100"},
    )


def test_the_installed_command(work):
    result = run_segnn("--help", cwd=work)
    assert result.returncode == 0 and not result.stderr
    for command in ("train", "finetune", "evaluate", "info", "verify", "md"):
        assert command in result.stdout
    result = run_segnn("info", "no.pt", cwd=work)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: model is 'no.pt': there is no such file") and result.stderr.count("\n") == 1


def test_the_installed_command_trains(work, tmp_path):
    (tmp_path / "config.toml").write_text(TOML.replace('"train.xyz"', f'"{work}/train.xyz"'))
    result = run_segnn("train", "config.toml", "--epochs", "1", "--threads", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote model.pt" in result.stderr and not result.stdout
    assert {"model.pt", "model.last.pt", "model.csv", "model.parity_forces_valid.png"} <= set(os.listdir(tmp_path))
