"""The command line: every option arrives, mistakes are one line, and the commands do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import ase.io
import pytest
from ase.build import molecule
from helpers.command_line import TOML, assert_one_line_error, segnn
from helpers.dynamics import Morse, crystal
from helpers.frames import emt_atoms
from typer.main import get_command
from typer.testing import CliRunner

from segnn_ase import cli
from segnn_ase.base import figures
from segnn_ase.base.errors import MDError
from segnn_ase.base.options import Options, with_options
from segnn_ase.md.settings import MDConfig
from segnn_ase.model.settings import ModelConfig, model_config
from segnn_ase.store.model_file import load_with_metadata
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.train import loop, start
from segnn_ase.train.settings import FINETUNE_DEFAULTS, DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.tuning_settings import FinetuneConfig


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
    monkeypatch.setattr(loop, "next_step", lambda *_: pytest.fail("a step was made"))
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


@pytest.mark.slow
def test_finetune(work, tmp_path):
    out = tmp_path / "tuned.pt"
    options = "--train test.xyz --epochs 2 --freeze segnn.messages.0 --freeze segnn.embedding --device cpu"
    result = segnn("finetune", "model.pt", *options.split(), "--out", out)
    assert result.exit_code == 0, result.output
    assert "E0 stay" in result.stderr  # as the frames are of its own level
    settings = load_with_metadata(out)[1]["training"]["training"]
    assert settings["freeze"] == ["segnn.messages.0", "segnn.embedding"] and settings["epochs"] == 2
    assert settings["learning_rate"] == FINETUNE_DEFAULTS["learning_rate"]


def test_evaluate_prints_the_table_of_the_training(work):
    torn = emt_atoms(2)
    for atoms in torn:
        atoms.positions *= 1.6  # the labels stay
    ase.io.write("torn.xyz", torn)
    result = segnn("evaluate", "model.pt", "test.xyz", "torn.xyz", "--device", "cpu")
    assert result.exit_code == 0, result.output
    header, *rows, outside = result.stdout.splitlines()
    assert "energy [meV/atom] rmse" in header and "forces [meV/Å] rmse" in header
    assert outside.startswith("torn.xyz: 2 frames ") and "outside what the potential was trained on (" in outside
    assert [row.split()[0] for row in rows] == ["test.xyz", "torn.xyz"]
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


SECTIONS = {  # command: what precedes its options, the settings that become options
    "train": (["train", "--train", "a.xyz"], {"data": DataConfig, "model": ModelConfig, "training": OptimConfig}),
    "finetune": (
        ["finetune", "m.pt", "--train", "a.xyz"],
        {"data": DataConfig, "training": OptimConfig, "finetune": FinetuneConfig},
    ),
    "md": (["md", "start.xyz", "--model", "m.pt"], {"dynamics": MDConfig}),
}
FIELDS = [
    (command, section, name)
    for command, (_, sections) in SECTIONS.items()
    for section, settings in sections.items()
    for name in settings.model_fields
]
SAMPLES = {  # what the type of a field does not tell: words on the command line, the value in the settings
    "train": ("--train b.xyz", ("a.xyz", "b.xyz")),
    "reference_energies": ("--reference-energies H=-13.6 --reference-energies O=-2e3", {"H": -13.6, "O": -2000.0}),
    "cutoff": ("--cutoff 4", 4.0),
    "hidden_irreps": ("--hidden-irreps 8x0e+8x1o", "8x0e+8x1o"),
    "lmax_attr": ("--lmax-attr 2", 2),
    "body_order": ("--body-order 2", 2),
    "cues": ("--cues charge,scale=2", (Cue(name="charge", scale=2.0),)),
    "radial_hidden": ("--radial-hidden 8 --radial-hidden 16", (8, 16)),
    "smooth": ("--no-smooth --message published --body-order 1", False),
    "rattled": ("--rattled 2", 2),
    "ensemble": ("--ensemble nhc", "nhc"),
    "dispersion": ("--dispersion d3bj:pbe", "d3bj:pbe"),
    "field": ("--field 0 -0.1 2e-2", (0.0, -0.1, 0.02)),
    "field_frequency": ("--field-frequency 300 --field 0 0 1", 300.0),
    "pressure": ("--pressure -1.5 --ensemble npt", -1.5),
    "max_energy_drift": ("--max-energy-drift 0.1 --ensemble nve", 0.1),
    "log": ("--log other.csv", "other.csv"),
    "trajectory": ("--trajectory other.traj", "other.traj"),
    "restart": ("--restart other.npz", "other.npz"),
}


def sample(name: str, field) -> tuple[str, object]:
    """Words that set a field to another value than its default, and that value."""
    if name in SAMPLES:
        return SAMPLES[name]
    option, kind = kebab(name), str(field.annotation)
    if field.annotation is bool:
        return (f"--no-{option[2:]}", False) if field.default else (option, True)
    if "Literal" in kind:
        value = next(choice for choice in get_args(field.annotation) if choice != field.default)
    else:
        value = 3 if "int" in kind else 0.25 if "float" in kind else "some"
    return f"{option} {value}", (value,) if "tuple" in kind else value


def kebab(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.fixture
def seen(monkeypatch):
    """The settings with which the commands would have begun."""
    seen = []
    monkeypatch.setattr(start, "train", lambda config: seen.append(config))
    monkeypatch.setattr(start, "finetune", lambda model, config: seen.append(config))
    monkeypatch.setattr(cli, "read_structure", lambda path: crystal())
    monkeypatch.setattr("segnn_ase.calculator.SEGNNCalculator", lambda *models, **options: Morse())

    def stop(atoms, config, **options):
        seen.append(SimpleNamespace(dynamics=config))
        raise MDError("far enough")

    monkeypatch.setattr("segnn_ase.md.run.run_md", stop)
    return seen


@pytest.mark.parametrize("command, section, name", FIELDS)
def test_every_setting_is_an_option_that_arrives_and_sets_nothing_else(command, section, name, seen):
    before, sections = SECTIONS[command]
    words, value = sample(name, sections[section].model_fields[name])
    result = segnn(*before, *words.split())
    assert len(seen) == 1, result.output
    given = {option[2:].removeprefix("no-").replace("-", "_") for option in words.split() if option.startswith("--")}
    if section == "model":
        assert getattr(model_config(**seen[0].model), name) == value and seen[0].model.keys() == given
        return
    settings = getattr(seen[0], section)
    implied = {"data": {"train"}, "dynamics": {"log", "trajectory", "restart"}}.get(section, set())
    assert getattr(settings, name) == value != sections[section].model_fields[name].default
    assert settings.model_fields_set == given | implied


@pytest.mark.parametrize("command", SECTIONS)
def test_without_options_everything_is_the_default(command, seen):
    before, sections = SECTIONS[command]
    segnn(*before)
    names = {"log": "md.csv", "trajectory": "md.xyz", "restart": "md.npz"}
    expected = {
        "data": DataConfig(train="a.xyz"),
        "model": {},
        "training": OptimConfig(),
        "finetune": FinetuneConfig(),
        "dynamics": MDConfig(**names),
    }
    for section in sections:
        assert getattr(seen[0], section) == expected[section]


def test_preset_out_and_model_options_arrive(seen):
    segnn("train", "--train", "a.xyz", "--out", "other.pt", "--preset", "fast", "--cutoff", "4", "--radial-hidden", 8)
    assert seen[0].model == {"preset": "fast", "cutoff": 4.0, "radial_hidden": [8]} and seen[0].out == "other.pt"


def help_lines(command: str) -> list[str]:
    """The help of a command, on so wide a terminal that an option is a line."""
    result = CliRunner(env={"COLUMNS": "500"}).invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0, result.output
    return [" ".join(line.strip("│ ").split()) for line in result.output.splitlines()]


@pytest.mark.parametrize("command", SECTIONS)
def test_every_help_has_description_and_default(command):
    lines = help_lines(command)
    for settings in SECTIONS[command][1].values():
        for name, field in settings.model_fields.items():
            (line,) = (line for line in lines if line.startswith(f"{kebab(name)} "))
            assert field.description and field.description in line, f"{command}: {line}"
            assert re.search(r"\((required|default [^;)]+)[^)]*\)$", line), f"{command}: {line}"


def test_help_tells_types_ranges_choices_and_the_defaults_of_the_command():
    md, train, tune = ("\n".join(help_lines(command)) for command in ("md", "train", "finetune"))
    assert re.search(r"--timestep <?\w+>? fs \(default 0.5; above 0, at most 20\)", md, flags=re.IGNORECASE)
    assert "--npt-cell isotropic|full " in md and "(default OUT.csv)" in md and "langevin: constant temp" in md
    assert "(default 0.1; at least 0)" in train and "(default 0.004; above 0)" in tune
    assert "--smooth --no-smooth" in train and "--no-smooth" not in tune and "(default on)" in train
    assert "--reference-energies NAME=VALUE" in train and "segnn|fast|" in train


def test_every_help_has_an_example_that_parses():
    commands = get_command(cli.app).commands
    for name, command in commands.items():
        (example,) = (line for line in help_lines(name) if line.startswith("Example: "))
        program, called, *arguments = example.removeprefix("Example: ").split()
        assert (program, called) == ("segnn", name)
        command.make_context(name, arguments)
    assert {
        "train",
        "finetune",
        "evaluate",
        "predict",
        "check",
        "convert",
        "export",
        "info",
        "verify",
        "md",
        "spectrum",
        "learn",
        "select",
    } == commands.keys()


def test_names_that_clash_between_settings_are_refused_when_the_command_is_made():
    clash = with_options(data=Options(DataConfig), again=Options(DataConfig, only=("valid",)))
    with pytest.raises(ValueError, match="duplicate parameter name: 'valid'"):
        clash(lambda data, again: None)


def test_help_is_given_without_heavy_imports():
    code = """
import sys
from segnn_ase.cli import app
for command in ([], ["train"], ["finetune"], ["md"], ["verify"]):
    try:
        app([*command, "--help"])
    except SystemExit as end:
        assert not end.code
print({"torch", "e3nn", "ase", "matplotlib", "numpy"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "set()\n", done.stderr


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


def test_an_option_takes_the_place_of_its_rival_in_a_file(work, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "train", lambda config: seen.append(config.training))
    segnn("train", "config.toml", "--minutes", "5")
    segnn("train", "config.toml", "--epochs", "7")
    assert [(training.epochs, training.minutes) for training in seen] == [(None, 5.0), (7, None)]


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


@pytest.mark.slow
def test_the_installed_command(work):
    result = run_segnn("--help", cwd=work)
    assert result.returncode == 0 and not result.stderr
    for command in ("train", "finetune", "evaluate", "info", "verify", "md"):
        assert command in result.stdout
    result = run_segnn("info", "no.pt", cwd=work)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: model is 'no.pt': there is no such file") and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_installed_command_trains(work, tmp_path):
    (tmp_path / "config.toml").write_text(TOML.replace('"train.xyz"', f'"{work}/train.xyz"'))
    result = run_segnn("train", "config.toml", "--epochs", "1", "--threads", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote model.pt" in result.stderr and not result.stdout
    assert {"model.pt", "model.last.pt", "model.csv", "model.parity_forces_valid.png"} <= set(os.listdir(tmp_path))


def test_no_command_replaces_what_is_there_or_what_it_reads(work, tmp_path):
    """An output that was forgotten makes the last input one, as with `segnn predict model.pt a.xyz b.xyz`."""
    model, frames, kept = Path("model.pt").resolve(), Path("train.xyz").resolve(), tmp_path / "kept.xyz"
    kept.write_text("mine")
    before = frames.read_bytes()
    for arguments in (
        ("predict", model, frames, kept),
        ("convert", frames, kept),
        ("check", frames, "--fix", kept),
    ):
        assert_one_line_error(segnn(*map(str, arguments)), "exists")
        assert kept.read_text() == "mine"
    assert_one_line_error(segnn("check", str(frames), "--out", str(frames)), "ends in .md")
    assert_one_line_error(segnn("verify", str(model), str(frames), "--json", str(model)), "ends in .json")
    assert_one_line_error(segnn("verify", str(model), str(frames), "--png", "a.txt"), "ends in .png")
    run = segnn("md", str(frames), "--model", str(model), "--out", str(frames.with_suffix("")), "--overwrite")
    assert_one_line_error(run, "which is read")
    run = segnn("md", str(frames), "--model", str(model), "--trajectory", str(frames), "--overwrite")
    assert_one_line_error(run, "trajectory is")
    assert frames.read_bytes() == before
    done = segnn("convert", str(frames), str(kept), "--overwrite")
    assert done.exit_code == 0 and len(ase.io.read(kept, ":")) == 8


def test_settings_of_a_property_need_one(work):
    assert_one_line_error(segnn("train", "--train", "train.xyz", "--irreps", "dipole=1o"), "--target")
