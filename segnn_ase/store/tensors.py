"""The model file: tensors and plain values only, versioned, checked, written atomically.

Loading never runs code: `torch.load(weights_only=True)` reads tensors, dicts, lists, strings and numbers.
A checksum over the whole content refuses what is bit-flipped or spliced.
"""

import hashlib
import io
from pathlib import Path

import torch

from segnn_ase.base.errors import ConfigError, ModelFileError, in_short
from segnn_ase.base.files import existing_file, write_atomically
from segnn_ase.store.archive import read_tensors


def save_tensors(path: "str | Path", content: dict) -> None:
    """Save a dict of tensors and plain values with a checksum, atomically. Raises ConfigError for other values."""
    for name, value in content.items():
        _check_plain(value, name)
    buffer = io.BytesIO()
    torch.save({**content, "checksum": checksum(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def _check_plain(value, name: str) -> None:
    """Refuse what `load_tensors` would refuse: a numpy number, say, can be written but not read back safely."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(item, f"{name}[{key!r}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise ConfigError(f"{name} is {in_short(value)}, a {type(value).__name__}; expected tensors and plain values")


def load_tensors(path: "str | Path", argument: str = "model") -> dict:
    """Load what `save_tensors` wrote. Raises FileNotFoundError or ModelFileError with the reason."""
    path = existing_file(path, argument)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    content = read_tensors(data, str(path))
    if not isinstance(content, dict) or "checksum" not in content:
        raise ModelFileError(f"{path} was not written by segnn_ase: it has no checksum")
    stored = content.pop("checksum")
    if stored != checksum(content):
        raise ModelFileError(f"{path} is damaged: its content does not match its checksum. Copy it again.")
    return content


def checksum(content) -> str:
    """SHA-256 over names, values, shapes and bits of nested dicts, lists, tensors and plain values."""
    digest = hashlib.sha256()
    _digest(content, digest)
    return digest.hexdigest()


def _digest(value, digest) -> None:
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for key, item in value.items():
            _digest(key, digest)
            _digest(item, digest)
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for item in value:
            _digest(item, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())
