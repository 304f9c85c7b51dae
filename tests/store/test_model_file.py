"""The model file: the same bits back, and nothing that is damaged, foreign, newer or harmful."""

import json
import os
import random
import stat
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
from segnn_ase.store.description import describe_model
from segnn_ase.store.model_file import (
    COMMITTEE,
    FORMAT,
    SINCE,
    VERSION,
    load_committee,
    load_potential,
    load_with_metadata,
    save_potential,
)
from segnn_ase.store.shipped import find_model, shipped_potentials
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.structure.graph import collate, graph_from_atoms
from segnn_ase.structure.stored import stored

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


def test_the_file_says_what_it_is_to_a_json_parser(file):
    header, _ = parts_of(file)
    content = json.loads(header["__metadata__"]["segnn_ase"])["content"]
    assert content["format"] == FORMAT and content["version"] == VERSION == 1
    assert content["units"]["forces"] == "eV/Å" and "e3nn" in content["convention"]
    assert header["weights/readout.last.last.weight"]["dtype"] == "F32"


def parts_of(file: Path) -> tuple[dict, bytes]:
    """The header of a file of safetensors, and the numbers."""
    data = file.read_bytes()
    n = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:n]), data[n:]


def test_files_of_before_a_setting_came_are_as_they_were(tmp_path, file):
    content = load_tensors(file)
    for name in SINCE:
        del content["config"][name]
    save_tensors(tmp_path / "old.pt", content)
    assert load_potential(tmp_path / "old.pt").config == load_potential(file).config.model_copy(update=SINCE)


def test_any_name_will_do(tmp_path, file):
    for name in ("model.safetensors", "model", "model.tar.gz"):
        save_potential(tmp_path / name, load_potential(file), metadata=METADATA)
        assert (tmp_path / name).read_bytes() == file.read_bytes()
        assert load_with_metadata(tmp_path / name)[1] == METADATA


def test_loading_draws_no_random_number(file):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    load_potential(file)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


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
    data, numbers = file.read_bytes(), parts_of(file)[1]
    for position in np.random.default_rng(1).integers(len(numbers), size=40):
        flipped = bytearray(data)
        flipped[len(data) - len(numbers) + position] ^= 1
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(ModelFileError, match=r"flipped\.pt is damaged"):
            load_potential(tmp_path / "flipped.pt")


@pytest.mark.parametrize("change", [("3.5", "3.6"), ("-13.6", "-13.7"), ("[8]", "[9]"), ('"O"', '"N"')])
def test_a_setting_that_was_edited_is_refused(tmp_path, file, change):
    """By hand, in the header, with everything else as it should be."""
    header, numbers = parts_of(file)
    text = header["__metadata__"]["segnn_ase"]
    assert change[0] in text
    header["__metadata__"]["segnn_ase"] = text.replace(*change, 1)
    edited = json.dumps(header).encode()
    (tmp_path / "edited.pt").write_bytes(len(edited).to_bytes(8, "little") + edited + numbers)
    with pytest.raises(ModelFileError, match=r"edited\.pt is damaged: its content does not match its checksum"):
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


def of_version_3(content: dict) -> dict:
    if content["elements"] is None:
        raise ConfigError("it has no elements: train it again")
    return {**content, "species": content["elements"]}


@pytest.fixture
def later(monkeypatch):
    """A segnn_ase that has gone on to version 3, where the elements are what the species were."""
    monkeypatch.setattr(model_file, "VERSION", 3)
    upgrades = {1: lambda content: {**content, "elements": content["atoms"]}, 2: of_version_3}
    monkeypatch.setattr(model_file, "UPGRADES", upgrades)


def old_content(file: Path, **changes) -> dict:
    content = content_of(file)
    del content["species"]
    return {**content, "atoms": ["H", "O", "Cu"], **changes}


def test_older_versions_are_upgraded_one_by_one(tmp_path, file, later):
    save_tensors(tmp_path / "old.pt", old_content(file))
    assert load_potential(tmp_path / "old.pt").symbols == ["H", "O", "Cu"]


def test_members_of_a_committee_are_upgraded_with_it(tmp_path, file, later):
    committee = {"format": COMMITTEE, "version": 1, "metadata": {"a": 1}, "factors": {"energy": 2}}
    save_tensors(tmp_path / "old.pt", {**committee, "members": [old_content(file), old_content(file)]})
    assert [p.symbols for p in load_committee(tmp_path / "old.pt").potentials] == 2 * [["H", "O", "Cu"]]


def test_what_cannot_be_upgraded_says_why(tmp_path, file, later):
    save_tensors(tmp_path / "old.pt", old_content(file, atoms=None))
    with pytest.raises(ModelFileError, match=r"old\.pt, of format version 1, cannot be read: .* train it again"):
        load_potential(tmp_path / "old.pt")


def test_an_upgrade_that_fails_names_the_version(tmp_path, file, later):
    save_tensors(tmp_path / "odd.pt", content_of(file))
    with pytest.raises(ModelFileError, match=r"odd\.pt, of format version 1, cannot be read: 'atoms'"):
        load_potential(tmp_path / "odd.pt")


@pytest.mark.parametrize("version", [0, 2, 4])
def test_versions_without_an_upgrade_are_refused(tmp_path, file, version):
    save_tensors(tmp_path / "odd.pt", {**content_of(file), "version": version})
    with pytest.raises(ModelFileError, match=f"format version {version}, but this segnn_ase reads up to 1: upgrade it"):
        load_potential(tmp_path / "odd.pt")


WRONG_COMMITTEES = {
    "members": {"members": 3},
    "no members": {"members": []},
    "factors": {"factors": {"energy": "large"}},
    "metadata": {"metadata": 7},
    "a member": {"members": [{"format": "cat"}]},
}


@pytest.mark.parametrize("name", WRONG_COMMITTEES)
def test_committees_that_make_no_sense_are_refused(tmp_path, file, name):
    honest = {"format": COMMITTEE, "version": VERSION, "members": 2 * [content_of(file)], "factors": {}, "metadata": {}}
    save_tensors(tmp_path / "good.pt", honest)
    assert len(load_committee(tmp_path / "good.pt").potentials) == 2
    save_tensors(tmp_path / "odd.pt", {**honest, **WRONG_COMMITTEES[name]})
    with pytest.raises(ModelFileError, match=r"odd\.pt (does not describe|is) a "):
        load_committee(tmp_path / "odd.pt")


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


def test_the_description_is_a_page_about_the_model(file):
    page = describe_model(*load_committee(file))
    for part in ("H O Cu", "H -13.6000", "4x0e+4x1o", "cutoff      3.5 Å", "float32", "energy_rmse 0.001"):
        assert part in page
    assert "committee" not in page and "domain" not in page and "uncertainty" not in page and "verified" not in page


def test_the_description_of_a_shipped_potential_tells_what_it_is_worth():
    page = describe_model(*load_committee("silicon-pbe"))
    for part in ("E0          Si -5.1204 eV", "domain      193 frames", "uncertainty of a usual force", "checks hold"):
        assert part in page


def test_the_description_of_a_committee_says_so(file):
    page = describe_model([load_potential(file)] * 3, {"energy": 1.5, "forces": 0.25}, {})
    assert page.startswith("committee   3 potentials like this one; spread times energy 1.5, forces 0.25\nelements")


def test_stored_structures_come_back_and_are_checked(tmp_path):
    potential = tiny_potential()
    potential.examples = stored([molecule("H2O"), bulk("Cu", cubic=True)])
    path = tmp_path / "model.pt"
    save_potential(path, potential)
    found = load_potential(path).examples
    assert all(torch.equal(a, b) for a, b in zip(found, potential.examples, strict=True))
    assert "2 structures with 7 atoms" in describe_model([potential], {}, {})
    content = load_tensors(path)
    for change in ({"sizes": torch.tensor([3, 9])}, {"numbers": content["examples"]["numbers"] + 70}, {"pbc": None}):
        save_tensors(path, {**content, "examples": {**content["examples"], **change}})
        with pytest.raises(ModelFileError, match="does not describe a model"):
            load_potential(path)
    del content["examples"]  # as older files
    save_tensors(path, content)
    assert load_potential(path).examples is None
