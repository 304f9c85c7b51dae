"""Settings: defaults, presets, and one sentence for every mistake."""

import pytest

from segnn_ase.base.errors import ConfigError, SEGNNError
from segnn_ase.base.files import existing_file
from segnn_ase.base.settings import read_toml
from segnn_ase.model.settings import PRESETS, ModelConfig, model_config
from segnn_ase.train.settings import DataConfig, OptimConfig, TrainConfig

DATA = {"data": {"train": "a.xyz"}}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_a_round_trip_through_plain_values(preset):
    config = model_config(preset)
    assert ModelConfig.parse(config.model_dump(mode="json")) == config


def test_overrides_replace_what_the_preset_says():
    assert model_config("fast", cutoff=4.5).cutoff == 4.5
    assert model_config("fast", lmax_attr=3).lmax_attr == 3
    assert model_config("fast").hidden_irreps == "64x0e+64x1o"


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        model_config().cutoff = 3.0


def test_irreps_are_stored_sorted_and_simplified():
    assert model_config(hidden_irreps="4x1o + 8x0e+4x1o").hidden_irreps == "8x0e+8x1o"


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"batch_size.*; .*epoch'"):
        TrainConfig.parse({**DATA, "training": {"epoch": 3, "batch_size": 0}})


def test_one_path_or_many():
    assert DataConfig.parse({"train": "a.xyz"}).train == ("a.xyz",)
    assert DataConfig.parse({"train": ["a.xyz", "b.db@:10"]}).train == ("a.xyz", "b.db@:10")


def test_training_defaults_are_valid():
    assert TrainConfig.parse(DATA).training == OptimConfig()


def test_read_toml(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('out = "b.pt"\n[data]\ntrain = ["a.xyz"]\n[training]\nepochs = 3\n')
    config = TrainConfig.parse(read_toml(file))
    assert (config.out, config.data.train, config.training.epochs) == ("b.pt", ("a.xyz",), 3)


@pytest.mark.parametrize("content", [b"[data\ntrain = 1", b"\xff\xfe\x00", b"a = 1\na = 2"])
def test_bad_toml_is_named(tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml' is not valid TOML"):
        read_toml(file)


def test_a_missing_file_names_the_argument_and_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"config is 'no\.toml', but there is no such file.*{tmp_path.name}"):
        read_toml("no.toml")
    with pytest.raises(FileNotFoundError, match="config is"):
        existing_file(tmp_path, "config")  # a folder is not a file


def test_errors_are_of_the_package_and_of_the_usual_kind():
    assert issubclass(ConfigError, SEGNNError) and issubclass(ConfigError, ValueError)


NO_TOML = {
    "latin": "[data]\ntrain = 'ä'".encode("latin-1"),
    "utf-16": "[data]".encode("utf-16"),
    "key twice": b"[data]\ntrain = 'a'\ntrain = 'b'\n",
    "deep, open": b"a = " + b"[" * 100_000,
    "deep": b"a = " + b"[" * 100_000 + b"]" * 100_000,
    "5000 digits": b"a = " + b"9" * 5000,
    "zeros": b"\0\0",
    "a megabyte of a key": b"x" * 10**6,
}


@pytest.mark.parametrize("name", NO_TOML)
def test_what_is_no_toml_is_a_config_error(tmp_path, name):
    (tmp_path / "c.toml").write_bytes(NO_TOML[name])
    with pytest.raises(ConfigError, match=r"config '.*c\.toml' is not valid TOML: ") as error:
        read_toml(tmp_path / "c.toml")
    assert "\n" not in str(error.value)


def test_toml_of_editors_that_begin_with_a_mark(tmp_path):
    (tmp_path / "c.toml").write_bytes("\ufeff[data]\r\ntrain = 'ä.xyz'\r\n".encode())
    assert read_toml(tmp_path / "c.toml") == {"data": {"train": "ä.xyz"}}
