"""A dict of tensors and plain values as one file: safetensors, checked, written atomically.

The file is that of the library `safetensors`: eight bytes that say how long the header is, the header in JSON (name,
type, shape and place of each tensor), the numbers of the tensors. Its metadata has one entry, "segnn_ase": JSON text
with all values that are no tensors (see `nested`) and a checksum over everything. The name of the file is free.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.base.files import existing_file, write_atomically
from segnn_ase.store.nested import VALUES, count_values, decode, encode, parse_json, unsuitable

ENTRY = "segnn_ase"  # of the metadata
HEADER = 32 * 1024**2  # bytes; the library itself reads up to 100 MB
ZIP = b"PK\x03\x04"


def save_tensors(path: "str | Path", content: dict) -> None:
    """Save a dict of tensors and plain values with a checksum, atomically. Raises ConfigError for other values."""
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode(content, tensors)
    text = json.dumps({"checksum": checksum(content), "content": encoded}, allow_nan=False)
    data = safetensors.torch.save(tensors, {ENTRY: text})
    length = _header_length(data)
    if length > HEADER or count_values(data[8 : 8 + length].decode()) > VALUES:
        raise ConfigError(f"content has more than {VALUES} values or {HEADER} bytes beside its tensors; expected fewer")
    write_atomically(path, data)


def load_tensors(path: "str | Path", argument: str = "model") -> dict:
    """Load what `save_tensors` wrote. Raises FileNotFoundError or ModelFileError with the reason."""
    path = existing_file(path, argument)
    data = _read(path)
    try:
        stored = _stored(data)
        tensors = _tensors(data)
        content = decode(stored["content"], tensors)
        if tensors or not isinstance(content, dict):
            raise ValueError("its content is no dict, or does not name all of its tensors")
        damaged = stored["checksum"] != checksum(content)
    except Exception as error:  # the readers of the header and of tensors raise anything on what is torn
        raise _unreadable(path, _first_line(error)) from None
    if damaged:
        raise ModelFileError(f"{path} is damaged: its content does not match its checksum. Copy it again.")
    return content


def load_form(path: str | Path, form: str, version: int) -> dict:
    """The same of a file that is no potential. Raises ModelFileError for another form or version."""
    content = load_tensors(path)
    if (content.get("format"), content.get("version")) != (form, version):
        found = f"a {content.get('format')!r} of version {content.get('version')!r}"
        raise ModelFileError(f"{path} is {found}; expected a {form!r} of version {version}")
    return content


def _read(path: Path) -> bytes:
    """The bytes of a file that begins like one of safetensors; what begins otherwise may be large."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if (reason := _foreign(start)) is not None:
                raise _unreadable(path, reason)
            return start + file.read()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error


def _foreign(start: bytes) -> str | None:
    if start.startswith(ZIP):
        return "it is a zip archive, such as torch.save writes; since version 0.1.0 model files are safetensors"
    if len(start) < 9:
        return "it is too short"
    if _header_length(start) > HEADER or start[8:] != b"{":
        return "it has no header of safetensors"
    return None


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _stored(data: bytes) -> dict:
    """Checksum and encoded content. Raises ValueError for safetensors of another program."""
    metadata = parse_json(data[8 : 8 + _header_length(data)].decode()).get("__metadata__")
    text = metadata.get(ENTRY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"its header has no entry {ENTRY!r}")
    stored = parse_json(text)
    if not isinstance(stored, dict) or not {"checksum", "content"} <= set(stored):
        raise ValueError(f"its entry {ENTRY!r} has no content with a checksum")
    return stored


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors by name, in memory of their own, which PyTorch aligns."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    for name, tensor in tensors.items():
        if (reason := unsuitable(tensor)) is not None:
            raise ValueError(f"{name} is {reason}")
    return tensors


def _unreadable(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} is not a readable model file (truncated, damaged, or of another program): {reason}")


def _first_line(error: Exception) -> str:
    """What an error says, without the list of calls that PyTorch appends."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
