"""Nested values as JSON, with the tensors among them set aside by name.

JSON knows texts, numbers, truths, null, lists and objects with texts as keys; tuples become lists. What it does not
know is written as an object with one key that begins with "$":

    {"$tensor": "weights/core_radii"}     a tensor, by its name in the file: its path, joined by "/"
    {"$float": "nan"}                     a number that is none; also "inf" and "-inf"
    {"$items": [[0, ...], ["$a", ...]]}   a dict with numbers as keys, or with texts that begin with "$"

Numbers come back with all their bits, since Python writes as many digits as that takes; 1, 1.0 and true stay apart.
"""

import json
import math
from collections.abc import Iterable

import torch

from segnn_ase.base.errors import ConfigError, in_short

PLAIN = (str, int, float, bool, type(None))
NO_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
DTYPES = {torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
DEPTH = 64  # of nested values
VALUES = 1_000_000  # in one text


def encode(value, tensors: dict[str, torch.Tensor], path: tuple = ()):
    """The value as JSON knows it; its tensors are added to `tensors`, as copies on the CPU.

    Raises ConfigError for what `decode` would refuse: a numpy number, say, or a class.
    """
    if len(path) > DEPTH:
        raise ConfigError(f"{_spelt(path[:3])} is nested more than {DEPTH} deep; expected fewer levels")
    if isinstance(value, torch.Tensor):
        return {"$tensor": _set_aside(value, tensors, path)}
    if isinstance(value, dict):
        return _encode_dict({_key(k, path): encode(v, tensors, (*path, k)) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return [encode(v, tensors, (*path, n)) for n, v in enumerate(value)]
    if type(value) not in PLAIN:
        kind = type(value).__name__
        raise ConfigError(f"{_spelt(path)} is {in_short(value)}, a {kind}; expected tensors and plain values")
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value


def _encode_dict(items: dict) -> dict:
    simple = all(isinstance(key, str) and not key.startswith("$") for key in items)
    return items if simple else {"$items": [list(item) for item in items.items()]}


def _key(key, path: tuple) -> str | int:
    if type(key) not in (str, int):
        raise ConfigError(f"{_spelt(path)} has the key {in_short(key)}; expected texts and whole numbers as keys")
    return key


def _set_aside(value: torch.Tensor, tensors: dict[str, torch.Tensor], path: tuple) -> str:
    if (reason := unsuitable(value)) is not None:
        raise ConfigError(f"{_spelt(path)} is {reason}; expected tensors and plain values")
    name = "/".join(map(str, path))
    while name in tensors or name == "__metadata__":  # as for the keys 1 and "1"; the other is the library's
        name += "'"
    tensors[name] = torch.clone(value.detach().cpu(), memory_format=torch.contiguous_format)
    return name


def unsuitable(tensor: torch.Tensor) -> str | None:
    """What a tensor is that no file may hold."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return "a tensor that is sparse, quantized or without data"
    return None if tensor.dtype in DTYPES else f"a tensor of {tensor.dtype}"


def _spelt(path: tuple) -> str:
    return f"{path[0]}{''.join(f'[{key!r}]' for key in path[1:])}" if path else "content"


def decode(value, tensors: dict[str, torch.Tensor], depth: int = 0):
    """What was encoded; each tensor is taken out of `tensors`. Raises ValueError, KeyError for what never was."""
    if depth > DEPTH:
        raise ValueError(f"its values are nested more than {DEPTH} deep")
    if isinstance(value, list):
        return [decode(v, tensors, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    special = [key for key in value if key.startswith("$")]
    if special:
        return _decode_special(special[0], value, tensors, depth)
    return {key: decode(v, tensors, depth + 1) for key, v in value.items()}


def _decode_special(key: str, value: dict, tensors: dict[str, torch.Tensor], depth: int):
    inner = value[key]
    if len(value) == 1 and key == "$float" and isinstance(inner, str) and inner in NO_NUMBERS:
        return NO_NUMBERS[inner]
    if len(value) == 1 and key == "$tensor" and isinstance(inner, str) and inner in tensors:
        return tensors.pop(inner)
    if len(value) == 1 and key == "$items" and isinstance(inner, list):
        return without_repeats((_decoded_key(k), decode(v, tensors, depth + 1)) for k, v in inner)
    raise ValueError(f"it holds {in_short(value)}, which stands for nothing")


def _decoded_key(key) -> str | int:
    if type(key) not in (str, int):
        raise ValueError(f"{in_short(key)} is a key; expected texts and whole numbers")
    return key


def without_repeats(pairs: Iterable[tuple]) -> dict:
    """A dict of the pairs. Raises ValueError where a key comes twice: readers differ in which one counts."""
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {in_short(key)} comes twice")
        found[key] = value
    return found


def parse_json(text: str):
    """JSON of a stranger. Raises ValueError, RecursionError for what is wrong, repeated, too large or too deep."""
    if count_values(text) > VALUES:  # a list takes three bytes of text, and seventy of memory
        raise ValueError(f"it holds more than {VALUES} values")
    return json.loads(text, object_pairs_hook=without_repeats, parse_constant=_no_constant)


def count_values(text: str) -> int:
    """At least as many values as the JSON text has."""
    return 1 + sum(map(text.count, "[{,"))


def _no_constant(word: str):
    raise ValueError(f"{word} is no JSON")
