"""Nested values in a file: the same types and bits back, and a file that needs no PyTorch to be read."""

import json
import math
import subprocess
import sys

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.store import nested, tensors
from segnn_ase.store.tensors import checksum, load_tensors, save_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


def there_and_back(content: dict, path) -> dict:
    save_tensors(path, content)
    return load_tensors(path)


def test_plain_values_keep_their_types_and_bits(path):
    content = {
        "numbers": [0, 1, -1, 2**63, 10**400, True, False, None, 1.0, -0.0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308],
        "texts": ["", "Å", "\x00\n\\\"'", "\U0001f600", "\ud800", "null", "NaN"],
        "nested": {"a": {"": {}}, "b": [[], [[]], {}]},
    }
    assert repr(there_and_back(content, path)) == repr(content)


def test_numbers_that_are_none(path):
    values = there_and_back({"x": [math.nan, math.inf, -math.inf]}, path)["x"]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf]


def test_keys_that_json_does_not_know(path):
    content = {0: "a", "0": "b", -7: {"$tensor": "no tensor", "$": 1}, "$float": "nan", "__metadata__": {"x": 1}}
    assert repr(there_and_back(content, path)) == repr(content)


def test_tuples_come_back_as_lists(path):
    assert there_and_back({"a": (1, (2.0, ())), "b": {3: ("x",)}}, path) == {"a": [1, [2.0, []]], "b": {3: ["x"]}}


@pytest.mark.parametrize("dtype", sorted(nested.DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_tensors_of_every_type_and_shape(path, dtype, shape):
    value = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = there_and_back({"x": value}, path)["x"]
    assert type(found) is torch.Tensor and found.dtype == dtype and torch.equal(found, value)


def test_bits_of_tensors_that_are_no_numbers(path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    found = there_and_back({"x": bits.view(torch.float32)}, path)["x"]
    assert torch.equal(found.view(torch.int32), bits)


def test_tensors_that_share_memory_or_lie_across_it(path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"whole": base, "again": base, "turned": base.T, "column": base[:, 1], "wide": torch.zeros(1).expand(3)}
    learned = torch.nn.Parameter(base)
    found = there_and_back({**views, "learned": learned}, path)
    for name, value in {**views, "learned": base}.items():
        assert torch.equal(found[name], value) and found[name].is_contiguous() and not found[name].requires_grad
    found["whole"][0, 0] = 7
    assert found["again"][0, 0] == 0 == base[0, 0]


def test_names_of_tensors_are_their_paths_and_never_meet(path):
    content = {"a": {"b": torch.ones(1), 1: torch.ones(2), "1": torch.ones(3)}, "a/b": torch.ones(4)}
    content["__metadata__"] = torch.ones(5)
    found = there_and_back(content, path)
    assert checksum(found) == checksum(content)
    assert set(header_of(path)) == {"a/b", "a/b'", "a/1", "a/1'", "__metadata__'", "__metadata__"}


def header_of(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_the_same_content_gives_the_same_bytes(path):
    content = {"x": {name: torch.ones(n) for n, name in enumerate("zyxabc")}, "y": [1, 2.5], "z": {"b": 1, "a": 2}}
    save_tensors(path, content)
    first = path.read_bytes()
    code = f"import torch; from segnn_ase.store.tensors import save_tensors; save_tensors({str(path)!r}, {content!r})"
    subprocess.run([sys.executable, "-c", code.replace("tensor(", "torch.tensor(")], check=True, timeout=60)
    assert path.read_bytes() == first


def test_others_read_the_file_with_a_json_parser(path):
    """What a reader in another language has to do."""
    content = {"weights": {"a.b": torch.arange(6, dtype=torch.float64).reshape(2, 3)}, "cutoff": 5.0}
    save_tensors(path, {**content, "more": torch.ones(7, dtype=torch.bool)})
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    entry = header["weights/a.b"]
    assert (entry["dtype"], entry["shape"], (8 + n) % 8) == ("F64", [2, 3], 0)
    first, last = entry["data_offsets"]
    assert np.frombuffer(data[8 + n :][first:last], "<f8").tolist() == [0, 1, 2, 3, 4, 5]
    values = json.loads(header["__metadata__"]["segnn_ase"])["content"]
    assert values["cutoff"] == 5.0 and values["weights"] == {"a.b": {"$tensor": "weights/a.b"}}


LEAVES = (
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats()
    | some.text()
    | some.sampled_from(["$tensor", "$float", "$items", "nan"])
    | arrays.arrays(some.sampled_from([np.float32, np.float64, np.int64, np.bool_]), arrays.array_shapes(min_dims=0))
)
KEYS = some.text() | some.integers() | some.sampled_from(["$tensor", "$float", "$items", "a/b", "a"])
CONTENT = some.recursive(LEAVES, lambda inner: some.lists(inner) | some.dictionaries(KEYS, inner), max_leaves=20)


def with_tensors(value):
    if isinstance(value, dict):
        return {key: with_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_tensors(item) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.dictionaries(KEYS, CONTENT, max_size=4))
def test_whatever_is_written_is_read(path, content):
    content = with_tensors(content)
    assert checksum(there_and_back(content, path)) == checksum(content)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def endless() -> dict:
    value: dict = {}
    value["x"] = value
    return value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [np.float64(1)]}, r"a\[0\] is .*, a float64; expected tensors and plain values"),
        ({"a": {(1, 2): 3}}, r"a has the key \(1, 2\); expected texts and whole numbers"),
        ({None: 3}, "content has the key None"),
        ({True: 3}, "content has the key True"),
        ({"a": deep(70)}, r"a\[0\]\[0\] is nested more than 64 deep"),
        (endless(), "nested more than 64 deep"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "a is a tensor of torch.bfloat16"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is a tensor of torch.complex64"),
        ({"a": [torch.zeros(2).to_sparse()]}, r"a\[0\] is a tensor that is sparse"),
        ({"a": torch.zeros(2, device="meta")}, "a is a tensor that is .* without data"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_could_not_be_read_back_is_not_written(path, content, message):
    with pytest.raises(ConfigError, match=message):
        save_tensors(path, content)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: {1: x}], ids=["list", "dict", "items"])
def test_the_deepest_that_is_written_is_read(path, wrap):
    deepest, content = None, {"a": wrap(1)}
    while written(path, content, "nested more than 64 deep"):
        deepest, content = content, {"a": wrap(content["a"])}
    assert deepest is not None and load_tensors(path) == deepest


def test_the_longest_that_is_written_is_read(path, monkeypatch):
    monkeypatch.setattr(tensors, "VALUES", 100)
    monkeypatch.setattr(nested, "VALUES", 100)
    longest = max(n for n in range(100) if written(path, {"a": [0] * n}, "content has more than 100 values"))
    assert 60 < longest and load_tensors(path) == {"a": [0] * longest}


def written(path, content: dict, reason: str) -> bool:
    try:
        save_tensors(path, content)
    except ConfigError as error:
        assert reason in str(error)
        return False
    return True


def test_a_header_as_long_as_what_is_read(path, monkeypatch):
    save_tensors(path, {"a": "x" * 1000})
    data = path.read_bytes()
    monkeypatch.setattr(tensors, "HEADER", int.from_bytes(data[:8], "little") - 1)
    with pytest.raises(ModelFileError, match="it has no header of safetensors"):
        load_tensors(path)
    with pytest.raises(ConfigError, match=r"or .* bytes beside its tensors"):
        save_tensors(path, {"a": "x" * 1000})
    assert path.read_bytes() == data


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
