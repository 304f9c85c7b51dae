"""Files that are damaged, forged, foreign or cannot be written: refused with a reason, and nothing in them is run."""

import errno
import gzip
import io
import json
import os
import pickle
import resource
import struct
import warnings
import zipfile
from pathlib import Path

import ase.io
import matplotlib.pyplot as plt
import numpy as np
import pytest
import safetensors.torch
import torch
from ase.build import molecule
from helpers.command_line import assert_one_line_error, segnn
from helpers.dynamics import config, contents, crystal, run, state
from helpers.frames import water_frames
from helpers.potentials import METADATA
from helpers.potentials import uncalibrated_potential as tiny_potential
from helpers.trainings import configured

from segnn_ase import SEGNNCalculator
from segnn_ase.base import files
from segnn_ase.base.errors import (
    AccelerationWarning,
    DataError,
    MDError,
    ModelFileError,
    OutputError,
    SEGNNError,
    StructureError,
)
from segnn_ase.base.files import append, write_atomically
from segnn_ase.data.frames import read_frames
from segnn_ase.md.restart import read_restart
from segnn_ase.store.model_file import load_with_metadata, save_potential
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors
from segnn_ase.train.resume import decisive_settings
from segnn_ase.train.start import train

CORRUPTIONS = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model.pt"
    save_potential(path, tiny_potential(), metadata=METADATA)
    return path


def fingerprint(path: Path) -> str:
    """Of everything that a user gets out of a model file."""
    potential, metadata = load_with_metadata(path)
    settings = [potential.config.model_dump(mode="json"), potential.species, potential.scales]
    return checksum([dict(potential.state_dict()), potential.reference_energies, settings, metadata])


# what may happen to the bytes of a file


def headers_of(data: bytes) -> list[int]:
    """Offsets of all bytes that say what the others are."""
    if not data.startswith(b"PK"):
        return list(range(8 + int.from_bytes(data[:8], "little")))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        places = list(range(archive.start_dir, len(data)))
        for member in archive.infolist():
            name, extra = struct.unpack("<2H", data[member.header_offset + 26 : member.header_offset + 30])
            places += range(member.header_offset, member.header_offset + 30 + name + extra)
    return places


def flipped_bit(data: bytes, rng) -> bytes:
    out = bytearray(data)
    out[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flipped_header(data: bytes, rng) -> bytes:
    out, places = bytearray(data), headers_of(data)
    for place in rng.choice(places, rng.integers(1, 4)):
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwritten(data: bytes, rng) -> bytes:
    start, n = int(rng.integers(len(data))), int(rng.integers(2, 200))
    return data[:start] + rng.bytes(len(data[start : start + n])) + data[start + n :]


def truncated(data: bytes, rng) -> bytes:
    return data[: rng.integers(len(data))]


def without_the_start(data: bytes, rng) -> bytes:
    return data[rng.integers(1, len(data)) :]


def inserted(data: bytes, rng) -> bytes:
    start = int(rng.integers(len(data) + 1))
    return data[:start] + rng.bytes(int(rng.integers(1, 300))) + data[start:]


def cut_out(data: bytes, rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 300)) :]


def swapped_blocks(data: bytes, rng) -> bytes:
    size = int(rng.integers(8, 2048))
    a, b = sorted((rng.choice(len(data) // size, 2, replace=False) * size).tolist())
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def twice(data: bytes, rng) -> bytes:
    return data + flipped_bit(data, rng)


def parts_of(data: bytes) -> tuple[bytes, bytes]:
    """The header of a model file, and the numbers of its tensors."""
    n = 8 + int.from_bytes(data[:8], "little")
    return data[8:n], data[n:]


def joined(header: "bytes | dict", numbers: bytes = b"", length: int | None = None) -> bytes:
    """A model file of these parts; its first number is right unless given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def entry_of(header: dict) -> dict:
    """Checksum and content, in the metadata of the header."""
    return json.loads(header["__metadata__"]["segnn_ase"])


def with_entry(header: dict, entry) -> dict:
    return {**header, "__metadata__": {"segnn_ase": entry if isinstance(entry, str) else json.dumps(entry)}}


def another_header(data: bytes, rng) -> bytes:
    """The header is damaged, and its length is that of the damaged one."""
    header, numbers = parts_of(data)
    change = (flipped_bit, overwritten, truncated, inserted, cut_out)[rng.integers(5)]
    return joined(change(header, rng), numbers)


def another_entry(data: bytes, rng) -> bytes:
    """The text of the content is damaged, in a header that is fine."""
    header, numbers = parts_of(data)
    fields = json.loads(header)
    text = fields["__metadata__"]["segnn_ase"].encode()
    change = (flipped_bit, overwritten, truncated, inserted, cut_out)[rng.integers(5)]
    return joined(with_entry(fields, change(text, rng).decode("latin-1")), numbers)


VALUES = (0, -1, 1.5, 2**70, True, None, "", "x", [], {}, [1], {"$float": "nan"}, {"$tensor": "core_radii"}, {"$": 1})
SIZES = (0, 1, -1, 3, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.5, "x", None, [], True)


def another_value(data: bytes, rng) -> bytes:
    """One value of the content is another one, in a file that is well-formed."""
    header, numbers = parts_of(data)
    fields = json.loads(header)
    return joined(with_entry(fields, changed_within(entry_of(fields), rng)), numbers)


def changed_within(value, rng):
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.1:
        return VALUES[rng.integers(len(VALUES))]
    key = keys[rng.integers(len(keys))]
    value[key] = changed_within(value[key], rng)
    return value


def another_tensor(data: bytes, rng) -> bytes:
    """What the header says about a tensor is another thing: type, shape, place or name."""
    header, numbers = parts_of(data)
    fields = json.loads(header)
    names = [name for name in fields if name != "__metadata__"]
    one, two = (names[n] for n in rng.choice(len(names), 2, replace=False))
    sizes = [SIZES[n] for n in rng.integers(len(SIZES), size=2)]
    changes = (
        {one: {**fields[one], "dtype": ("F64", "I32", "BF16", "F8_E4M3", "U64", "C64", "cat", 3)[rng.integers(8)]}},
        {one: {**fields[one], "shape": sizes}},
        {one: {**fields[one], "shape": [*reversed(fields[one]["shape"]), 1]}},
        {one: {**fields[one], "data_offsets": sizes}},
        {one: fields[two], two: fields[one]},
        {one: fields[two]},
        {one: sizes[0]},
        {one + "x": fields[one]},
    )
    return joined({**fields, **changes[rng.integers(len(changes))]}, numbers)


def another_number(data: bytes, rng) -> bytes:
    """The numbers of the tensors are damaged, or those of two models of the same shape spliced."""
    header, numbers = parts_of(data)
    if rng.random() < 0.3:
        return joined(header, numbers[: len(numbers) // 2] + rng.bytes(len(numbers) - len(numbers) // 2))
    return joined(header, (flipped_bit, overwritten)[rng.integers(2)](numbers, rng))


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members: "dict[str, bytes] | list[tuple[str, bytes]]", compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return buffer.getvalue()


BYTES = (flipped_bit, overwritten, truncated, without_the_start, inserted, cut_out, swapped_blocks, twice)


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_damaged_models_are_refused_or_the_same(model, tmp_path, seed):
    rng, data, expected = np.random.default_rng(seed), model.read_bytes(), fingerprint(model)
    kinds = (*BYTES, flipped_header, flipped_header, another_header, another_entry, another_value, another_value)
    kinds += (another_tensor, another_tensor, another_number)
    path, refused, before = tmp_path / "damaged.pt", 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(CORRUPTIONS // 10):
            damaged = kinds[n % len(kinds)](data, rng)
            path.write_bytes(damaged)
            try:
                assert fingerprint(path) == expected, kinds[n % len(kinds)].__name__
            except ModelFileError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                refused += 1
    assert not [str(w.message) for w in caught] and refused > 0.9 * CORRUPTIONS / 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# what runs code where a pickle is trusted


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickled:
    """A name of the pickle's own, as the classes of other programs are."""


def archive_of(content: dict) -> bytes:
    """What `torch.save` writes, with a valid pickle."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def payloads(canary: Path) -> dict:
    return {
        "system": Payload(canary),
        "open": Call(open, str(canary), "w"),
        "exec": Call(exec, f"import pathlib; pathlib.Path({str(canary)!r}).touch()"),
        "torch_load": Call(torch.load, str(canary)),
        "attribute": Call(getattr, "", "join"),
        "bytearray": Call(bytearray, 10**11),
        "import": Call(__import__, "os"),
        "class": Pickled(),
        "numpy": np.float64(1.0),
    }


def forgeries(model: bytes, canary: Path) -> dict[str, bytes]:
    """Files with a pickle that runs code, alone, in an archive of PyTorch, and in every place of a model file."""
    old = {name.partition("/")[2]: member for name, member in members_of(archive_of({"weights": {}})).items()}
    header, numbers = parts_of(model)
    fields = json.loads(header)
    forged = {}
    for name, payload in payloads(canary).items():
        for protocol in (0, 2, 4):
            evil = pickle.dumps({"weights": payload}, protocol)
            kind, text = f"{name} {protocol}", evil.decode("latin-1")
            forged[f"{kind} bare"] = evil
            forged[f"{kind} archive"] = packed({f"archive/{k}": v for k, v in {**old, "data.pkl": evil}.items()})
            forged[f"{kind} archive alone"] = packed({"archive/data.pkl": evil})
            forged[f"{kind} before"] = evil + model
            forged[f"{kind} after"] = model + evil
            forged[f"{kind} between"] = joined(header, evil + numbers)
            forged[f"{kind} header"] = joined(evil, numbers)
            forged[f"{kind} after the header"] = joined(header + evil, numbers)
            forged[f"{kind} entry"] = joined(with_entry(fields, text), numbers)
            forged[f"{kind} tensor"] = joined(
                {**fields, "pickle": {"dtype": "U8", "shape": [len(evil)], "data_offsets": [0, len(evil)]}}, evil
            )
            metadata = {**fields["__metadata__"], "pickle": text}
            forged[f"{kind} beside"] = joined({**fields, "__metadata__": metadata}, numbers)
    for words in (
        "$class",
        "$pickle",
        "$call",
        "__reduce__",
        "py/object",
        "py/reduce",
        "!!python/object/apply:os.system",
    ):
        entry = {**entry_of(fields), "content": {words: ["os.system", [f"touch {canary}"]]}}
        forged[f"words {words}"] = joined(with_entry(fields, entry), numbers)
    for whole in (model + archive_of({}), archive_of({}) + model, packed([("a/data.pkl", b""), ("b/data.pkl", model)])):
        forged[f"two {len(forged)}"] = whole
    return forged


def test_no_forgery_is_read_and_no_payload_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary, path, expected = tmp_path / "canary", tmp_path / "forged.pt", fingerprint(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, forged in forgeries(model.read_bytes(), canary).items():
            path.write_bytes(forged)
            if name.endswith(" beside"):  # a text that nothing looks at
                assert fingerprint(path) == expected
            else:
                with pytest.raises(ModelFileError, match=r"forged\.pt"):
                    load_with_metadata(path)
            assert list(tmp_path.iterdir()) == [path], name
    assert not caught


def test_the_payloads_would_have_worked(model, tmp_path):
    """Guards the test above."""
    canary = tmp_path / "canary"
    for name in ("system 0 bare", "system 2 bare", "exec 4 bare"):
        pickle.loads(forgeries(model.read_bytes(), canary)[name])
        assert canary.exists()
        canary.unlink()


# what takes all memory, time or stack


def nested(depth: int, *, as_dict: bool = False):
    value: object = 0
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


def doubling(levels: int) -> list:
    """A list of two, of two, of two: few bytes, 2^levels values."""
    value: list = [0, 0]
    for _ in range(levels):
        value = [value, value]
    return value


def saved(content, path: Path) -> None:
    torch.save(content, path)


def endless() -> list:
    value: list = []
    value.append(value)
    return value


def bomb(path: Path) -> None:
    members = {"archive/data.pkl": b"\x80\x02}.", "archive/data/0": bytes(100_000_000)}
    path.write_bytes(packed(members, zipfile.ZIP_DEFLATED))


def header_file(header: "bytes | dict", numbers: bytes = b"", length: int | None = None):
    return lambda path: path.write_bytes(joined(header, numbers, length))


def entry_file(text: str, tensors: dict | None = None, numbers: bytes = b""):
    """A header that is fine, whatever is in the text of the content."""
    return header_file(with_entry(tensors or {}, text), numbers)


def content_file(text: str, tensors: dict | None = None, numbers: bytes = b"", digest: str = "0"):
    return entry_file(f'{{"checksum": "{digest}", "content": {text}}}', tensors, numbers)


def tensor_file(dtype="F32", shape=(1,), offsets=(0, 4), numbers=b"abcd"):
    tensor = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return content_file('{"a": {"$tensor": "a"}}', {"a": tensor}, numbers)


def sparse_file(start: bytes):
    """A file of 100 GB that takes no place on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, 10**11)

    return write


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWO = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
GREEDY = {
    "pickle: deep lists": lambda path: saved(nested(200), path),
    "pickle: endless": lambda path: saved(endless(), path),
    "pickle: doubling": lambda path: saved(doubling(60), path),
    "pickle: expanded": lambda path: saved({"a": torch.zeros(1).expand(10**12)}, path),
    "zip bomb": bomb,
    "zeros of 100 GB": sparse_file(b""),
    "text of 100 GB": sparse_file(b"Dear model, "),
    "zip of 100 GB": sparse_file(b"PK\x03\x04"),
    "header of 100 GB": sparse_file(struct.pack("<Q", 10**11 - 8) + b"{"),
    "header of 2^64": header_file({}, length=2**64 - 1),
    "header of 2^63": header_file({}, length=2**63),
    "header longer than the file": header_file({}, length=1000),
    "header shorter than it is": header_file({"__metadata__": {}}, length=3),
    "header of nothing": header_file(b""),
    "header of spaces": header_file(b"{" + b" " * 10**7),
    "header of brackets": header_file(b'{"a":' + b"[" * 10**5),
    "header of objects": header_file(b'{"a":' * 10**5),
    "header of commas": header_file(b'{"a":[' + b"0," * 1_100_000 + b"0]}"),
    "header as list": header_file(b"[]"),
    "header of tensors": header_file({str(n): {**ONE, "shape": [0], "data_offsets": [0, 0]} for n in range(160_000)}),
    "header not in UTF-8": header_file(b'{"\xff":3}'),
    "header with bytes of zero": header_file(b"{}" + bytes(6)),
    "header with a name twice": header_file(
        b'{"a":%s,"a":%s,"__metadata__":{"segnn_ase":"{}"}}' % ((json.dumps(ONE).encode(),) * 2), b"abcd"
    ),
    "metadata twice": header_file(b'{"__metadata__":{"segnn_ase":"{}"},"__metadata__":{"segnn_ase":"{}"}}'),
    "metadata as list": header_file({"__metadata__": ["segnn_ase"]}),
    "entry as number": header_file({"__metadata__": {"segnn_ase": 3}}),
    "entry nested": header_file({"__metadata__": {"segnn_ase": {"content": {}}}}),
    "entry as list": entry_file("[]"),
    "entry empty": entry_file(""),
    "no content": entry_file('{"checksum": "0"}'),
    "no checksum": entry_file('{"content": {}}'),
    "deep lists": content_file('{"a":' + "[" * 200 + "]" * 200 + "}"),
    "deep dicts": content_file('{"a":' * 200 + "0" + "}" * 200),
    "deep items": content_file('{"$items":[[1,' * 200 + "0" + "]]}" * 200),
    "very deep": content_file('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
    "many lists": content_file('{"a":[' + "[]," * 600_000 + "[]]}"),
    "many lists in other letters": header_file(  # which the header spells so that counting them there finds none
        b'{"__metadata__":{"segnn_ase":"{\\"checksum\\":\\"0\\",\\"content\\":{\\"a\\":\\u005b%s0]}}"}}'
        % (rb"\u005b]\u002c" * 600_000)
    ),
    "many values": content_file('{"a":[' + "0," * 1_100_000 + "0]}"),
    "a key twice": content_file('{"a": 1, "a": 2}'),
    "an item twice": content_file('{"$items": [[1, 2], [1, 3]]}'),
    "items alone": content_file('{"$items": [1, 2]}'),
    "items of three": content_file('{"$items": [[1, 2, 3]]}'),
    "items of lists": content_file('{"$items": [[[], 2]]}'),
    "items of truths": content_file('{"$items": [[true, 2]]}'),
    "items as number": content_file('{"$items": 3}'),
    "no float": content_file('{"a": {"$float": "1.0"}}'),
    "float as list": content_file('{"a": {"$float": ["nan"]}}'),
    "nan": content_file('{"a": NaN}'),
    "infinity": content_file('{"a": -Infinity}'),
    "5000 digits": content_file('{"a": ' + "9" * 5000 + "}"),
    "two specials": content_file('{"$float": "nan", "$tensor": "a"}', {"a": ONE}, b"abcd"),
    "tensor and more": content_file('{"a": {"$tensor": "a", "b": 1}}', {"a": ONE}, b"abcd"),
    "float and more": content_file('{"a": {"$float": "nan", "b": 1}}'),
    "items and more": content_file('{"a": {"$items": [], "b": 1}}'),
    "tensor that is not there": content_file('{"a": {"$tensor": "b"}}', {"a": ONE}, b"abcd"),
    "tensor by number": content_file('{"a": {"$tensor": 0}}', {"a": ONE}, b"abcd"),
    "tensor twice": content_file('{"a": {"$tensor": "a"}, "b": {"$tensor": "a"}}', {"a": ONE}, b"abcd"),
    "numbers twice": content_file("{}", {"a": ONE, "b": ONE}, b"abcd"),
    "numbers that overlap": content_file("{}", {"a": ONE, "b": {**TWO, "data_offsets": [2, 6]}}, b"abcdef"),
    "tensor of nobody": content_file("{}", {"a": ONE}, b"abcd"),
    "numbers of nobody": content_file("{}", {"a": ONE}, b"abcdefgh"),
    "numbers with a hole": content_file("{}", {"a": ONE, "b": {**TWO, "data_offsets": [8, 12]}}, b"abcdefghijkl"),
    "numbers beyond the end": content_file("{}", {"a": ONE, "b": TWO}, b"abcd"),
    "huge claim": tensor_file(shape=(2**40,)),
    "huge claim in full": tensor_file(shape=(2**40,), offsets=(0, 2**42)),
    "huge product": tensor_file(shape=(2**32, 2**32)),
    "nothing of hugeness": tensor_file(shape=(2**63, 0), offsets=(0, 0), numbers=b""),
    "no shape": tensor_file(shape=(-1,)),
    "half a shape": tensor_file(shape=(0.5, 2)),
    "many dimensions": tensor_file(shape=[1] * 1000),
    "backwards": tensor_file(offsets=(4, 0)),
    "before the start": tensor_file(offsets=(-4, 0)),
    "bfloat16": tensor_file("BF16", (2,)),
    "float8": tensor_file("F8_E4M3", (4,)),
    "unsigned": tensor_file("U32"),
    "complex": tensor_file("C64", (1,), (0, 8), b"abcdefgh"),
    "unknown type": tensor_file("cat"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_what_would_take_all_memory_or_time_is_refused(tmp_path, name):
    path, before = tmp_path / "greedy.pt", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    GREEDY[name](path)
    with pytest.raises(ModelFileError, match=r"greedy\.pt is not a readable model file") as error:
        load_tensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_such_a_file_without_a_flaw_is_read(tmp_path):
    """Guards the test above."""
    honest = {"a": torch.frombuffer(bytearray(b"abcd"), dtype=torch.float32)}
    write = content_file('{"a": {"$tensor": "a"}}', {"a": ONE}, b"abcd", checksum(honest))
    write(tmp_path / "honest.pt")
    assert torch.equal(load_tensors(tmp_path / "honest.pt")["a"], honest["a"])


# files of other programs, and what is no file


def as_npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def scripted(path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(path)


def as_png() -> bytes:
    buffer = io.BytesIO()
    plt.imsave(buffer, np.zeros((4, 4)), format="png")
    return buffer.getvalue()


def old_model(path: Path) -> None:
    """What segnn_ase wrote before its version 0.1.0."""
    content = {"format": "segnn_ase potential", "version": 3, "weights": {"core_radii": torch.zeros(2, 2)}}
    torch.save({**content, "checksum": checksum(content)}, path)


FOREIGN = {
    "old model": old_model,
    "module": lambda path: torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path),
    "state dict": lambda path: torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, path),
    "legacy": lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
    "torchscript": scripted,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1, 2]})),
    "npz": lambda path: path.write_bytes(as_npz(a=np.zeros(3))),
    "npy": lambda path: path.write_bytes(next(iter(members_of(as_npz(a=np.zeros(3))).values()))),
    "png": lambda path: path.write_bytes(as_png()),
    "gzip": lambda path: path.write_bytes(gzip.compress(b"Dear model,\n")),
    "trajectory": lambda path: ase.io.write(path, water_frames(2), format="traj"),
    "text": lambda path: path.write_text("Dear model,\n"),
    "json": lambda path: path.write_text('{"format": "segnn_ase potential"}'),
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"{"),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "empty zip": lambda path: path.write_bytes(packed({})),
    "safetensors": lambda path: path.write_bytes(safetensors.torch.save({"a": torch.zeros(3)})),
    "safetensors of others": lambda path: path.write_bytes(
        safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt"})
    ),
    "list": lambda path: content_file("[1, 2]", digest=checksum([1, 2]))(path),
    "number": lambda path: content_file("3", digest=checksum(3))(path),
    "list as checksum": lambda path: entry_file('{"checksum": [], "content": {}}')(path),
    "tensor as checksum": lambda path: entry_file('{"checksum": {"$tensor": "a"}, "content": {}}')(path),
    "training state": lambda path: save_tensors(path, {"format": "segnn_ase training state"}),
    "nothing": lambda path: save_tensors(path, {}),
    "restart file": lambda path: path.write_bytes(as_npz(header=np.array('{"format": "segnn_ase md restart 1"}'))),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_refused(tmp_path, name):
    path = tmp_path / "foreign.pt"
    FOREIGN[name](path)
    with pytest.raises(ModelFileError, match=r"foreign\.pt") as error:
        load_with_metadata(path)
    assert "\n" not in str(error.value)
    assert_one_line_error(segnn("info", path), "foreign.pt")


def test_archives_of_pytorch_are_named_as_such(tmp_path):
    old_model(tmp_path / "old.pt")
    with pytest.raises(ModelFileError, match=r"old\.pt .* zip archive, such as torch\.save writes; .* are safetensors"):
        load_with_metadata(tmp_path / "old.pt")


def test_what_is_no_file_is_said(tmp_path, model):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"model is .*folder\.pt"):
        load_with_metadata(tmp_path / "folder.pt")
    with pytest.raises(FileNotFoundError, match=r"resume file is .*folder\.pt', which is a folder"):
        load_tensors(tmp_path / "folder.pt", "resume file")
    for name in ("dangling.pt", "model.pt/model.pt"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_with_metadata(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_with_metadata(model / "model.pt")
    (tmp_path / "link.pt").symlink_to(model)
    assert fingerprint(tmp_path / "link.pt") == fingerprint(model)


def test_a_model_that_may_not_be_read(model, monkeypatch):
    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ModelFileError, match=r"model\.pt cannot be read: Permission denied"):
        load_with_metadata(model)


# a valid file with a valid checksum that describes no sane model


def weight(content: dict, **changes) -> dict:
    return {"weights": {**content["weights"], **changes}}


def setting(content: dict, **changes) -> dict:
    return {"config": {**content["config"], **changes}}


def uncertainty(width: int) -> dict:
    forms, numbers = {"atoms": torch.eye(width), "frames": torch.eye(width)}, {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}
    return {**forms, **numbers, "calibrated_on": "validation", "counts": (3, 1)}


LAST = "readout.last.last.weight"
TAMPERED = {
    "nan weight": (lambda c: weight(c, **{LAST: c["weights"][LAST] * float("nan")}), "readout.last.last.weight.*NaN"),
    "infinite radius": (lambda c: weight(c, core_radii=torch.full((3, 3), torch.inf)), "core_radii have NaN or inf"),
    "half precision": (lambda c: weight(c, **{LAST: c["weights"][LAST].half()}), "float16; expected float32"),
    "integers": (lambda c: weight(c, **{LAST: c["weights"][LAST].long()}), "int64; expected float32"),
    "wrong shape": (lambda c: weight(c, **{LAST: torch.zeros(7, 7)}), "size mismatch"),
    "no tensor": (lambda c: weight(c, **{LAST: "large"}), "does not describe a model"),
    "list of weights": (lambda c: {"weights": [torch.zeros(3)]}, "does not describe a model"),
    "999999x0e": (lambda c: setting(c, hidden_irreps="999999x0e"), "at most 4096 channels"),
    "4096x0e": (lambda c: setting(c, hidden_irreps="4096x0e+4096x1o"), "fewer weights than"),
    "1x40o": (lambda c: setting(c, hidden_irreps="4x0e+1x40o"), "degrees up to 8"),
    "no irreps": (lambda c: setting(c, hidden_irreps="lots"), "hidden_irreps"),
    "numbers as irreps": (lambda c: setting(c, hidden_irreps=3), "hidden_irreps"),
    "radial network": (lambda c: setting(c, radial_hidden=[10**9]), "radial_hidden"),
    "many layers": (lambda c: setting(c, radial_hidden=[8] * 99), "radial_hidden"),
    "readout": (lambda c: setting(c, readout_hidden=10**9), "readout_hidden"),
    "negative cutoff": (lambda c: setting(c, cutoff=-1.0), "cutoff"),
    "nan cutoff": (lambda c: setting(c, cutoff=float("nan")), "cutoff"),
    "interactions": (lambda c: setting(c, interactions=10**6), "interactions"),
    "unknown setting": (lambda c: setting(c, walrus=1), "walrus"),
    "config as list": (lambda c: {"config": [1]}, "does not describe a model"),
    "unknown species": (lambda c: {"species": ["H", "O", "Xx"]}, "Xx"),
    "vacuum as species": (lambda c: {"species": ["H", "O", "X"]}, "species"),
    "duplicate species": (lambda c: {"species": ["H", "O", "O"]}, "species"),
    "numbers as species": (lambda c: {"species": [1, 8, 29]}, "species"),
    "nested species": (lambda c: {"species": [["H"], "O", "Cu"]}, "does not describe a model"),
    "no species": (lambda c: {"species": None}, "does not describe a model"),
    "nan E0": (lambda c: {"reference_energies": [0.0, float("nan"), 1.0]}, "reference_energies"),
    "words as E0": (lambda c: {"reference_energies": ["a", "b", "c"]}, "does not describe a model"),
    "two species": (lambda c: {"species": ["H", "O"]}, "expected 2 finite numbers"),
    "one scale": (lambda c: {"scales": [1.0]}, "scales"),
    "no weights": (lambda c: {"weights": {}}, "does not describe a model"),
    "spherical cows": (lambda c: {"convention": "spherical cows"}, "convention 'spherical cows'; expected 'e3nn"),
    "version 0": (lambda c: {"version": 0}, "version 0"),
    "two E0": (lambda c: {"reference_energies": [0.0, 1.0]}, "reference_energies"),
    "E0 as number": (lambda c: {"reference_energies": 3.0}, "does not describe a model"),
    "infinite E0": (lambda c: {"reference_energies": [10**400, 0, 0]}, "does not describe a model"),
    "infinite scale": (lambda c: {"scales": [1.0, float("inf"), 1.0]}, "scales"),
    "other units": (lambda c: {"units": {"energy": "kcal/mol"}}, "kcal/mol"),
    "units as tensor": (lambda c: {"units": torch.zeros(3)}, "does not describe a model"),
    "newer version": (lambda c: {"version": 99}, "version 99, but this segnn_ase reads up to"),
    "version as tensor": (lambda c: {"version": torch.ones(3)}, "version"),
    "version as truth": (lambda c: {"version": True}, "version True"),
    "version as list": (lambda c: {"version": [2]}, "version"),
    "format as tensor": (lambda c: {"format": torch.ones(3)}, "not a 'segnn_ase potential'"),
    "convention as tensor": (lambda c: {"convention": torch.ones(3)}, "convention"),
    "metadata as list": (lambda c: {"metadata": [1]}, "does not describe a model"),
    "metadata as text": (lambda c: {"metadata": "trained well"}, "does not describe a model"),
    "errors as text": (lambda c: {"metadata": {"errors": "small"}}, "does not describe a model"),
    "uncertainty of other features": (lambda c: {"uncertainty": uncertainty(64)}, "uncertainty has no matrices for"),
    "uncertainty of words": (
        lambda c: {"uncertainty": {**uncertainty(8), "alpha": "large"}},
        "should be numbers is not",
    ),
    **{
        f"{name} as {value!r}": (
            lambda c, name=name, value=value: {name: value},
            f"{name} is .*; expected null or a dict",
        )
        for name in ("domain", "uncertainty")
        for value in (False, True, 0, 1.5, "", "no", [], [1], {})
    },
    "domain of another": (lambda c: {"domain": {"frames": 3}}, "does not describe a model"),
    "no E0": (lambda c: {"reference_energies": None}, "reference_energies is None; expected a list"),
    "no scales": (lambda c: {"scales": None}, "scales is None; expected a list"),
    "E0 as false": (lambda c: {"reference_energies": False}, "reference_energies is False; expected a list"),
    "empty config": (lambda c: {"config": {}}, "config lacks body_order, .*smooth|fewer weights"),
    "config without a cutoff": (
        lambda c: {"config": {k: v for k, v in c["config"].items() if k != "cutoff"}},
        "config lacks cutoff",
    ),
    "weights as false": (lambda c: {"weights": False}, "does not describe a model"),
    "metadata as false": (lambda c: {"metadata": False}, "does not describe a model"),
    "errors as false": (lambda c: {"metadata": {"errors": False}}, "metadata of 'errors' is False; expected a dict"),
    "errors as list": (lambda c: {"metadata": {"errors": []}}, "metadata of 'errors' is .*; expected a dict"),
    "verified as false": (
        lambda c: {"metadata": {"verified": False}},
        "metadata of 'verified' is False; expected a dict",
    ),
    "verified as text": (lambda c: {"metadata": {"verified": ""}}, "metadata of 'verified' is ''; expected a dict"),
    "verified of nothing": (lambda c: {"metadata": {"verified": {"Si8": {}}}}, "does not describe a model"),
    "an error as text": (lambda c: {"metadata": {"errors": {"valid": {"energy_rmse": "low"}}}}, "expected numbers"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_model_with_a_valid_checksum_that_makes_no_sense_is_refused(model, tmp_path, name):
    change, message = TAMPERED[name]
    content, before = load_tensors(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_tensors(tmp_path / "odd.pt", {**content, **change(content)})
    with pytest.raises(ModelFileError, match=rf"odd\.pt .*{message}") as error:
        load_with_metadata(tmp_path / "odd.pt")
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_weights_that_are_huge_give_an_error_and_no_nan(model, tmp_path):
    content = load_tensors(model)
    weights = {name: 1e30 * w if w.is_floating_point() else w for name, w in content["weights"].items()}
    save_tensors(
        tmp_path / "huge.pt", {**content, "weights": {**weights, "core_radii": content["weights"]["core_radii"]}}
    )
    atoms = molecule("H2O")
    for mode in ("off", "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccelerationWarning)
            atoms.calc = SEGNNCalculator(tmp_path / "huge.pt", accelerate=mode)
            with pytest.raises(
                StructureError, match=r"the energy of atom 0 is (nan|-?inf) eV: .* its weights are broken"
            ):
                atoms.get_forces()


# restart files of molecular dynamics

MD = {"ensemble": "nhc", "steps": 12, "log_every": 2, "save_every": 3, "checkpoint_every": 6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("md")
    settings = config(folder, **MD)
    run(crystal(), settings)
    return folder


@pytest.fixture
def half_done(finished, tmp_path):
    """A copy of a run's files, its settings with more steps, and where an undisturbed run ends."""
    settings = config(tmp_path, **MD)
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return settings.model_copy(update={"steps": 18})


def same_restart(a, b) -> bool:
    return json.dumps(a[0]) == json.dumps(b[0]) and all(np.array_equal(a[1][k], b[1][k], equal_nan=True) for k in b[1])


def test_damaged_restart_files_are_refused_or_the_same(half_done, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "damaged.npz"
    data, expected, refused = Path(half_done.restart).read_bytes(), read_restart(half_done.restart), 0
    kinds = (*BYTES, flipped_header)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(400):
            path.write_bytes(kinds[n % len(kinds)](data, rng))
            try:
                assert same_restart(read_restart(str(path)), expected)
            except MDError as error:
                refused += str(path) in str(error)
    assert not caught and refused > 250


def forged_restart(path: str, header=None, **arrays) -> None:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    found = json.loads(str(content["header"]))
    found.update(header or {})
    content.update(arrays, header=np.array(json.dumps(found)))
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


def set_header(**values):
    return lambda path: forged_restart(path, values)


def set_arrays(**values):
    return lambda path: forged_restart(path, **values)


def with_payload(path: str) -> None:
    forged_restart(path, positions=np.array([Payload(Path(path).with_name("canary"))], dtype=object))


def rewritten(content: bytes):
    return lambda path: Path(path).write_bytes(content)


def bomb_of(path: str, compression: int, members: int, size: int) -> None:
    """Arrays of zeros, of which there are many or which take little room."""
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({size // 8},), }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00v\x00" + head.encode() + bytes(size)
    Path(path).write_bytes(packed({f"{n}.npy": content for n in range(members)}, compression))


def rewritten_array(kind: str, shape: str):
    """An array that says to be much larger than it is."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return rewritten(packed({"header.npy": b"\x93NUMPY\x01\x00v\x00" + head.encode() + bytes(8)}))


def overlapping(path: str) -> None:
    """A directory with a thousand entries for one and the same array."""
    bomb_of(path, zipfile.ZIP_STORED, 1, 1_000_000)
    data = Path(path).read_bytes()
    start = struct.unpack("<I", data[-6:-2])[0]
    entry = data[start : len(data) - 22]
    end = bytearray(data[-22:])
    end[8:12] = struct.pack("<2H", 1000, 1000)
    end[12:16] = struct.pack("<I", 1000 * len(entry))
    Path(path).write_bytes(data[:start] + entry * 1000 + bytes(end))


MARKS = {"log": [10, 0, 0, 1], "trajectory": [10, 0, 0, 1]}
FORGED = {
    "payload": with_payload,
    "model": lambda path: save_potential(path, tiny_potential()),
    "text": rewritten(b"hello"),
    "empty": rewritten(b""),
    "empty zip": rewritten(packed({})),
    "array alone": lambda path: np.savez(path, positions=np.zeros((3, 3))),
    "header no json": lambda path: np.savez(path, header=np.array("{")),
    "header a list": lambda path: np.savez(path, header=np.array("[1]")),
    "deep header": lambda path: np.savez(path, header=np.array("[" * 100_000)),
    "bomb": lambda path: Path(path).write_bytes(
        packed(
            {
                "header.npy": b"\x93NUMPY\x01\x00v\x00"
                + b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }".ljust(117)
                + b"\n"
            }
        )
    ),
    "compressed": lambda path: bomb_of(path, zipfile.ZIP_DEFLATED, 1, 100_000_000),
    "claims 8 GB": rewritten_array("<f8", "(1000000000,)"),
    "claims 2^62": rewritten_array("<f8", "(4611686018427387904,)"),
    "claims a text": rewritten_array("<U1000000000", "()"),
    "objects": rewritten_array("|O", "(3,)"),
    "twice the same": lambda path: overlapping(path),
    "100 GB of nothing": lambda path: os.truncate(path, 10**11),
    "long header": set_header(config={"ensemble": "nve", "log": "x" * 17_000_000}),
    "empty config": set_header(config={}),
    "identity as list": set_header(identity=[1]),
    "identity of numbers": set_header(identity={"calculator": 3}),
    "no identity": set_header(identity=None),
    "no forces": set_arrays(forces=None),
    "forces of others": set_arrays(forces=np.zeros((3, 3))),
    "nan forces": set_arrays(forces=np.full((32, 3), np.nan)),
    "other format": set_header(format="segnn_ase md restart 9"),
    "no step": set_header(step=None),
    "negative step": set_header(step=-1),
    "half a step": set_header(step=1.5),
    "no freedom": set_header(dof=0),
    "no config": set_header(config=None),
    "config as list": set_header(config=[1]),
    "wrong config": set_header(config={"ensemble": "warm"}),
    "rng as list": set_header(rng=[1]),
    "rng of another kind": set_header(rng={"bit_generator": "MT19937"}),
    "rng too large": set_header(rng={"bit_generator": "PCG64", "state": {"state": -1, "inc": 2**200}}),
    "no marks": set_header(marks={}),
    "marks as text": set_header(marks={"log": "abc", "trajectory": "abc"}),
    "negative mark": set_header(marks={**MARKS, "log": [-1, 0, 0]}),
    "pbc": set_header(pbc=[True]),
    "positions": set_arrays(positions=np.zeros((3, 3))),
    "nan positions": set_arrays(positions=np.full((32, 3), np.nan)),
    "words as positions": set_arrays(positions=np.full((32, 3), "a")),
    "no momenta": set_arrays(momenta=None),
    "cell": set_arrays(cell=np.zeros(3)),
    "numbers": set_arrays(numbers=np.array(3)),
    "thermostat": set_arrays(**{"_thermostat._eta": np.zeros(7)}),
    "no thermostat": set_arrays(**{"_thermostat._eta": None}),
    "first row": set_arrays(first_row=np.zeros(3)),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_restart_files_are_refused_before_anything_is_touched(half_done, name):
    FORGED[name](half_done.restart)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, atoms = contents(half_done), crystal()
    with pytest.raises(MDError, match=r"restart is .*md\.npz'.*(cannot be read|of format)") as error:
        run(atoms, half_done)
    assert "\n" not in str(error.value) and not Path(half_done.restart).with_name("canary").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB
    assert contents(half_done) == before and np.array_equal(atoms.positions, crystal().positions)


@pytest.mark.parametrize("name", ["log", "trajectory"])
@pytest.mark.parametrize("damage", ["gone", "shorter", "other", "empty", "noise", "binary"])
def test_logs_and_trajectories_that_were_damaged_since_are_named(half_done, name, damage):
    path = Path(getattr(half_done, name))
    data = path.read_bytes()
    changed = {
        "gone": None,
        "shorter": data[:-1],
        "other": b"x" * len(data) + b"more",
        "empty": b"",
        "noise": data[:-60] + b"0" * 60,
        "binary": bytes(range(256)) * (len(data) // 256 + 1),
    }[damage]
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    with pytest.raises(MDError, match=rf"{path.name}.*(another file|damaged)"):
        run(crystal(), half_done)
    assert changed is None or path.read_bytes() == changed


def test_a_log_that_lost_a_line_far_from_its_end_is_damaged(finished, tmp_path):
    settings = config(tmp_path, **{**MD, "steps": 120, "log_every": 1})
    run(crystal(), settings)
    text = Path(settings.log).read_text()
    for broken in (text.replace("\n3,", "\n4,", 1), text.replace("\n3,", "\nx,", 1)):
        Path(settings.log).write_text(broken)
        with pytest.raises(MDError, match=r"log is .*md\.csv', which is damaged"):
            run(crystal(), settings.model_copy(update={"steps": 130}))


def test_what_was_written_after_the_restart_file_may_be_torn(half_done, finished, tmp_path):
    """That is what a crash leaves; it is cut off."""
    whole = crystal()
    run(whole, half_done)
    expected = contents(half_done)
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() + (b"torn" if path.suffix != ".npz" else b""))
    atoms = crystal()
    run(atoms, half_done)
    assert contents(half_done) == expected and state(atoms) == state(whole)


# files of a training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(configured(folder, water_frames(6)), progress=False)
    return folder


@pytest.fixture
def training(trained, tmp_path):
    """Files of a training that is complete, to be spoiled; the same command would check them and be done."""
    ase.io.write(tmp_path / "train.traj", water_frames(6))
    for path in trained.glob("model*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = configured(tmp_path)
    resume = tmp_path / "model.resume.pt"
    content = load_tensors(resume)
    content["fingerprint"]["settings"] = decisive_settings(settings)
    save_tensors(resume, content)
    return settings, resume, content


def test_an_honest_resume_file_goes_on(training):
    """Guards the tests below."""
    train(training[0], progress=False)


SPOILED = {
    "no progress": {"progress": None},
    "progress as list": {"progress": [1]},
    "unknown progress": {"progress": {"walrus": 1}},
    "negative epoch": {"progress": {"epoch": -1}},
    "words as epoch": {"progress": {"epoch": "many"}},
    "no weights": {"weights": {}},
    "weights as list": {"weights": [torch.zeros(3)]},
    "no average": {"averaged": None},
    "no optimizer": {"optimizer": None},
    "empty optimizer": {"optimizer": {"steps": 3, "used": [], "stacks": []}},
    "optimizer as text": {"optimizer": "Adam"},
    "fingerprint as list": {"fingerprint": [1]},
    "no settings": {"fingerprint": {}},
    "format": {"format": "segnn_ase potential"},
    "format as tensor": {"format": torch.ones(3)},
}


@pytest.mark.parametrize("name", SPOILED)
def test_resume_files_that_make_no_sense_are_refused(training, name):
    settings, resume, content = training
    save_tensors(resume, {**content, **SPOILED[name]})
    with pytest.raises(ModelFileError, match=r"model\.resume\.pt") as error:
        train(settings, progress=False)
    assert "\n" not in str(error.value)


def test_moments_of_another_shape_are_refused(training):
    settings, resume, content = training
    content["optimizer"]["stacks"][0]["first"] = torch.zeros(7)
    save_tensors(resume, content)
    with pytest.raises(ModelFileError, match="optimizer's state has other shapes"):
        train(settings, progress=False)


def test_damaged_resume_files_are_refused_or_the_same(training):
    _, resume, content = training
    rng, data, expected = np.random.default_rng(3), resume.read_bytes(), checksum(content)
    for n in range(60):
        resume.write_bytes((*BYTES, flipped_header)[n % 9](data, rng))
        try:
            assert checksum(load_tensors(resume, "resume file")) == expected
        except ModelFileError as error:
            assert "resume.pt" in str(error)


def test_a_model_in_place_of_the_resume_file_and_the_other_way_round(training):
    settings, resume, _ = training
    model = Path(settings.out)
    here, there = model.read_bytes(), resume.read_bytes()
    resume.write_bytes(here)
    with pytest.raises(ModelFileError, match="is a 'segnn_ase potential', not a 'segnn_ase training state'"):
        train(settings, progress=False)
    model.write_bytes(there)
    with pytest.raises(ModelFileError, match="is a 'segnn_ase training state', not a 'segnn_ase potential'"):
        load_with_metadata(model)


# data files

GOOD = """3
Lattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3:forces:R:3 energy=-14.0 pbc="T T T"
O 0 0 0 0.1 0 0
H 0.97 0 0 -0.1 0 0
H 0 0.97 0 0 0 0
"""
BAD_FRAMES = {
    "torn line": GOOD + GOOD[:-12],
    "torn frame": GOOD + "\n".join(GOOD.split("\n")[:3]) + "\n",
    "count too large": GOOD.replace("3\n", "4\n", 1),
    "count too small": GOOD.replace("3\n", "2\n", 1) + GOOD,
    "no count": GOOD.replace("3\n", "three\n", 1),
    "negative count": GOOD.replace("3\n", "-3\n", 1),
    "nan energy": GOOD.replace("-14.0", "nan"),
    "infinite energy": GOOD.replace("-14.0", "inf"),
    "nan force": GOOD.replace("0.1 0 0", "nan 0 0", 1),
    "word as force": GOOD.replace("0.1 0 0", "big 0 0", 1),
    "word as energy": GOOD.replace("-14.0", "low"),
    "unknown element": GOOD.replace("O 0", "Qq 0", 1),
    "missing column": GOOD.replace("0.1 0 0", "0.1 0", 1),
    "wrong header": GOOD.replace("Properties=species", "Properties=kinds"),
    "bytes": "\x00\x01\x02" * 50,
    "text": "Dear frames,\nyours\n",
    "empty": "",
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_data_files_that_are_torn_or_wrong_are_named(tmp_path, name):
    path = tmp_path / "bad.xyz"
    path.write_text(BAD_FRAMES[name])
    with pytest.raises(DataError, match=r"bad\.xyz"):
        read_frames(path)


def test_a_good_frame_beside_one_with_other_keys(tmp_path):
    """Mixed names of labels are found frame by frame; what a frame lacks is missing, not zero."""
    (tmp_path / "mixed.xyz").write_text(
        GOOD
        + GOOD.replace("energy=", "REF_energy=").replace("forces:R", "dft_forces:R")
        + GOOD.replace("energy=-14.0", "")
    )
    frames = read_frames(tmp_path / "mixed.xyz")
    assert [f.energy for f in frames] == [-14.0, -14.0, None]
    assert all(f.forces is not None for f in frames)


# what cannot be written


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name):
    path = tmp_path / "model.pt"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OutputError, match=r"cannot write '.*model\.pt': No space left on device; .* is intact"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"cannot write '.*file/model\.pt': "):
        write_atomically(tmp_path / "file" / "model.pt", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*model\.pt'"):
        write_atomically(tmp_path / "model.pt", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_appending_to_a_full_device():
    with pytest.raises(OutputError, match="cannot write '/dev/full': No space left on device"):
        append("/dev/full", b"row\n")


class Limited:
    """Files opened by `files.append` take so many bytes in all, some at a time, as a disk that fills up."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, path, mode, **options):
        file, limit = open(path, mode, **options), self

        class Raw:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, content):
                if limit.room == 0:
                    full()
                part = bytes(content)[: min(limit.room, 40)]
                limit.room -= len(part)
                return file.write(part)

        return Raw()


def test_a_record_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append(path, b"first\n")
    monkeypatch.setattr(files, "open", Limited(150), raising=False)
    append(path, b"a" * 99 + b"\n")
    with pytest.raises(OutputError, match="No space left"):
        append(path, b"b" * 99 + b"\n")
    assert path.read_bytes() == b"first\n" + b"a" * 99 + b"\n"


@pytest.mark.parametrize("room", [200, 3000, 7000])
def test_dynamics_on_a_full_disk_stops_and_can_be_resumed(tmp_path, monkeypatch, room):
    settings = config(tmp_path / "a", **{**MD, "checkpoint_every": 2})
    undisturbed = config(tmp_path / "b", **{**MD, "checkpoint_every": 2})
    run(crystal(), undisturbed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", Limited(room), raising=False)
        with pytest.raises(
            MDError, match=r"was stopped: cannot write .*No space left .*same call goes on from .*md\.npz"
        ):
            run(crystal(), settings)
    run(crystal(), settings)
    assert contents(settings) == contents(undisturbed)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_dynamics_whose_restart_file_cannot_be_written(tmp_path, monkeypatch, when):
    """The restart file of before stays, and the run can go on from there."""
    settings, calls = config(tmp_path / "a", **MD), []
    undisturbed = config(tmp_path / "b", **MD)
    run(crystal(), undisturbed)
    original = os.replace

    def replace(*paths):
        calls.append(paths)
        return full() if len(calls) == when else original(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(MDError, match=r"cannot write '.*md\.npz': No space left on device; .* intact"):
        run(crystal(), settings)
    assert not list((tmp_path / "a").glob(".md*"))
    run(crystal(), settings)
    assert contents(settings) == contents(undisturbed)


def test_a_guard_that_cannot_save_the_last_good_frame_still_gives_its_reason(tmp_path, monkeypatch):
    settings = config(tmp_path, ensemble="nve", steps=50, max_temperature=1.0, timestep=0.5)
    monkeypatch.setattr("segnn_ase.md.run.write_atomically", lambda path, _: write_or_fail(path, _))

    def write_or_fail(path, content):
        if "last_good" in str(path):
            raise OutputError(f"cannot write {path}")
        write_atomically(path, content)

    with pytest.raises(MDError, match=r"above max_temperature = 1 K.* The frame before is in atoms \(cannot write"):
        run(crystal(), settings)


def test_outputs_below_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    settings = config(steps=1, log=str(tmp_path / "file" / "md.csv"))
    with pytest.raises(SEGNNError, match=r"cannot write '.*file/md\.csv'"):
        run(crystal(), settings)


@pytest.mark.slow
def test_training_on_a_full_disk_keeps_its_files_and_goes_on(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    settings, calls = configured(tmp_path / "a", water_frames(6), save_minutes=0, epochs=3), []
    undisturbed = configured(tmp_path / "b", water_frames(6), save_minutes=0, epochs=3)
    train(undisturbed, progress=False)
    original = os.fsync

    def fsync(number):
        calls.append(number)
        return full() if len(calls) > 4 else original(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"cannot write .*No space left on device"):
            train(settings, progress=False)
    assert not list((tmp_path / "a").glob(".model*"))
    train(settings, progress=False)
    weights = [load_with_metadata(c.out)[0].state_dict() for c in (settings, undisturbed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_in_the_shell_a_file_that_cannot_be_written_is_one_line(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("start.xyz", molecule("H2O"))
    Path("file").write_text("")
    result = segnn("md", "start.xyz", "--model", model, "--out", "file/run", "--steps", 1, "--device", "cpu")
    assert_one_line_error(result, "cannot write 'file/run.csv'")
    ase.io.write("train.traj", water_frames(4))
    options = ["--train", "train.traj", "--epochs", 1, "--cutoff", 3, "--preset", "schnet", "--device", "cpu"]
    result = segnn("train", *options, "--out", "file/model.pt")
    assert result.exit_code == 1 and "error: cannot write 'file/model." in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
