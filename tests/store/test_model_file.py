"""The model file: the same bits back, and nothing that is damaged, foreign, newer or harmful."""

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from helpers.potentials import METADATA
from helpers.potentials import uncalibrated_potential as tiny_potential

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.base.files import write_atomically
from segnn_ase.model.predict import predict
from segnn_ase.store import model_file, shipped
from segnn_ase.store.model_file import (
    FORMAT,
    VERSION,
    describe,
    load_committee,
    load_potential,
    load_with_metadata,
    save_potential,
)
from segnn_ase.store.shipped import find_model, shipped_potentials
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors
from segnn_ase.structure.graph import collate, graph_from_atoms

TFN = {"message": "linear", "body_order": 1}
PUBLISHED = {"message": "published", "smooth": False, "body_order": 1}


def structures():
    for build in (lambda: molecule("H2O"), lambda: bulk("Cu", cubic=True)):
        atoms = build()
        atoms.rattle(0.1, seed=1)
        yield atoms


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.pt"
    save_potential(path, tiny_potential(), metadata=METADATA)
    return path


def content_of(file: Path) -> dict:
    return load_tensors(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"core_repulsion": False}, TFN, PUBLISHED], ids=["segnn", "coreless", "tfn", "segnn2022"]
)
def test_T15_save_load_gives_identical_bits(tmp_path, dtype, settings):
    potential = tiny_potential(dtype, **settings)
    graph = collate([graph_from_atoms(atoms, 3.5) for atoms in structures()])
    potential.calibrate(graph)
    save_potential(tmp_path / "model.pt", potential)
    loaded = load_potential(tmp_path / "model.pt")
    assert loaded.dtype == dtype and loaded.config == potential.config
    for atoms in structures():
        graph = graph_from_atoms(atoms, 3.5)
        periodic = bool(atoms.pbc.all())
        before, after = (predict(p, graph, stress=periodic) for p in (potential, loaded))
        assert torch.equal(before.energy, after.energy)
        assert torch.equal(before.energies, after.energies)
        assert torch.equal(before.forces, after.forces)
        assert not periodic or torch.equal(before.stress, after.stress)


def test_metadata_and_settings_come_back(file):
    potential, metadata = load_with_metadata(file)
    assert metadata == METADATA
    assert potential.symbols == ["H", "O", "Cu"] and potential.reference_energies == [-13.6, 0.1, 1 / 3]
    assert potential.scales == [0.7] * 3 and not potential.training


def test_the_file_holds_only_tensors_and_plain_values(file):
    content = torch.load(file, weights_only=True)
    assert content["format"] == FORMAT and content["version"] == VERSION
    assert content["units"]["forces"] == "eV/Å" and "e3nn" in content["convention"]


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(3), Path("a"), object(), {1, 2}])
def test_metadata_that_could_not_be_read_back_is_refused_before_writing(tmp_path, value):
    with pytest.raises(ConfigError, match=r"metadata\['errors'\]\[0\] is .*expected tensors and plain"):
        save_potential(tmp_path / "model.pt", tiny_potential(), metadata={"errors": [value]})
    assert not list(tmp_path.iterdir())


def test_loading_changes_precision_and_leaves_the_default_alone(file):
    assert load_potential(file, dtype=torch.float64).dtype == torch.float64
    assert load_potential(file).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("fraction", [0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_refused(tmp_path, file, fraction):
    bits = file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(bits[: int(fraction * len(bits))])
    with pytest.raises(ModelFileError, match=r"cut\.pt is not a readable model file \(truncated"):
        load_potential(tmp_path / "cut.pt")


def test_a_file_without_its_last_byte_is_refused(tmp_path, file):
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelFileError):
        load_potential(tmp_path / "cut.pt")


def test_every_flipped_bit_in_a_weight_is_refused(tmp_path, file):
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
        data = archive.read(entry)
    start = file.read_bytes().index(data)
    for position in np.random.default_rng(1).integers(len(data), size=10):
        flipped = bytearray(file.read_bytes())
        flipped[start + position] ^= 1
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(ModelFileError, match="is damaged"):
            load_potential(tmp_path / "flipped.pt")


def test_a_repacked_file_with_another_weight_is_refused(tmp_path, file):
    content = torch.load(file, weights_only=True)
    content["weights"]["readout.last.last.weight"][0] += 1e-3
    torch.save(content, tmp_path / "edited.pt")
    with pytest.raises(ModelFileError, match="does not match its checksum"):
        load_potential(tmp_path / "edited.pt")


@pytest.mark.parametrize(
    "key", ["version", "convention", "config", "species", "reference_energies", "scales", "weights", "metadata"]
)
def test_a_model_that_lacks_a_part_is_refused(tmp_path, file, key):
    content = content_of(file)
    del content[key]
    save_tensors(tmp_path / "odd.pt", content)
    with pytest.raises(ModelFileError, match=rf"odd\.pt .*{key}"):
        load_potential(tmp_path / "odd.pt")


@pytest.mark.parametrize("part", ["segnn.norms", "segnn.embedding", "segnn.messages.1", "readout.last"])
def test_a_missing_weight_is_refused(tmp_path, file, part):
    content = content_of(file)
    name = next(name for name in content["weights"] if name.startswith(part))
    del content["weights"][name]
    save_tensors(tmp_path / "odd.pt", content)
    with pytest.raises(ModelFileError, match=rf"odd\.pt .*{name}"):
        load_potential(tmp_path / "odd.pt")


def test_a_weight_too_many_is_refused(tmp_path, file):
    content = content_of(file)
    content["weights"]["segnn.extra"] = torch.zeros(3)
    save_tensors(tmp_path / "odd.pt", content)
    with pytest.raises(ModelFileError, match=r"odd\.pt .*segnn\.extra"):
        load_potential(tmp_path / "odd.pt")


def test_older_versions_are_upgraded_one_by_one(tmp_path, file, monkeypatch):
    save_tensors(tmp_path / "old.pt", {**content_of(file), "version": VERSION - 2, "species": None})
    upgrades = {
        VERSION - 2: lambda content: {**content, "version": VERSION - 1},
        VERSION - 1: lambda content: {**content, "version": VERSION, "species": ["H", "O", "Cu"]},
    }
    monkeypatch.setattr(model_file, "UPGRADES", upgrades)
    assert load_potential(tmp_path / "old.pt").symbols == ["H", "O", "Cu"]


def version_1(content: dict, *, zbl: bool) -> dict:
    weights = {k: v for k, v in content["weights"].items() if k != "core_radii"}
    config = {k: v for k, v in content["config"].items() if k != "core_repulsion"}
    return {**content, "version": 1, "config": {**config, "zbl": zbl}, "weights": weights}


def test_version_1_had_no_core(tmp_path, file):
    save_tensors(tmp_path / "old.pt", version_1(content_of(file), zbl=False))
    old, new = load_potential(tmp_path / "old.pt"), load_potential(file)
    assert new.config.core_repulsion and not old.config.core_repulsion
    graph = graph_from_atoms(next(structures()), 3.5)
    new.config = old.config
    assert torch.equal(predict(old, graph).forces, predict(new, graph).forces)
    save_tensors(tmp_path / "zbl.pt", version_1(content_of(file), zbl=True))
    with pytest.raises(ModelFileError, match=r"zbl\.pt, of format version 1, .*train it again"):
        load_potential(tmp_path / "zbl.pt")


def test_the_checksum_sees_values_types_shapes_and_order():
    base = {"a": 1, "b": [torch.zeros(2, 3), "x"]}
    others = [
        {"a": 1.0, "b": [torch.zeros(2, 3), "x"]},
        {"a": 1, "b": [torch.zeros(3, 2), "x"]},
        {"a": 1, "b": [torch.zeros(2, 3, dtype=torch.float64), "x"]},
        {"a": 1, "b": [torch.zeros(2, 3), "y"]},
        {"a": True, "b": [torch.zeros(2, 3), "x"]},
        {"a": 1, "b": ["x", torch.zeros(2, 3)]},
    ]
    assert checksum(base) == checksum({"a": 1, "b": [torch.zeros(2, 3), "x"]})
    assert len({checksum(x) for x in [base, *others]}) == 7


def test_a_write_that_is_killed_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    write_atomically(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new" / "model.pt", b"x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "model.pt").stat().st_mode) == mode


def test_a_model_that_does_not_exist_names_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "shipped_potentials", lambda: {"water": Path("w"), "silicon": Path("s")})
    with pytest.raises(FileNotFoundError, match=r"model is 'watr'.*shipped are water, silicon"):
        find_model("watr")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_model(tmp_path)
    assert find_model("water") == Path("w")


def test_shipped_potentials_are_found_by_name():
    for name, path in shipped_potentials().items():
        assert path.is_file() and find_model(name) == path and path.parent.name == name


def test_a_file_comes_before_a_shipped_name(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(shipped, "shipped_potentials", lambda: {"model.pt": Path("shipped")})
    assert find_model("model.pt") == Path("model.pt")


def test_describe_is_a_page_about_the_model(file):
    page = describe(load_committee(file))
    for part in ("H O Cu", "H -13.6000", "4x0e+4x1o", "cutoff      3.5 Å", "float32", "energy_rmse 0.001"):
        assert part in page
