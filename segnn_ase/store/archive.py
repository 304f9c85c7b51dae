"""Reading a file of tensors and plain values that a stranger may have made.

PyTorch's safe reader runs no code, but it trusts sizes. So before it sees the bytes, the archive must be one that
`torch.save` could have written for tensors and plain values, and afterwards the content must be no larger than that.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from pickle import UnpicklingError

import torch

from segnn_ase.base.errors import ModelFileError

GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
DTYPES = {torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
CONTAINERS = (dict, list, tuple)
PLAIN = (str, int, float, bool, type(None))
DEPTH, VALUES = 64, 1_000_000  # of nested containers, and of values in all
SHARED = 16  # tensors may share memory; together they are no larger than so many times the file


def read_tensors(data: bytes, name: str):
    """What `torch.save` wrote. Raises ModelFileError with the file's name and the reason for anything else."""
    try:
        check_archive(data, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a torn pickle made PyTorch try
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ModelFileError:
        raise
    except UnpicklingError:  # PyTorch's text tells how to run the code of a stranger
        raise _unreadable(name, "its pickle holds more than tensors and plain values, or is damaged") from None
    except Exception as error:  # zip, pickle and tensor readers raise anything on foreign or torn files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _unreadable(name, reason) from None
    check_plain(content, name, room=SHARED * len(data))
    return content


def check_archive(data: bytes, name: str) -> None:
    """Raise ModelFileError for a bad checksum, compressed or foreign members, and names of other code in the pickle."""
    if not data.startswith(b"PK\x03\x04"):
        raise _unreadable(name, "it is no zip archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        check_members(members, len(data), name)
        if damaged := archive.testzip():
            raise ModelFileError(f"{name} is damaged: checksum error in {damaged}. Copy it again from the source.")
        pickle = archive.read(next(m for m in members if m.filename.endswith("/data.pkl")))
    check_pickle(pickle, name)


def check_pickle(pickle: bytes, name: str) -> None:
    """Raise ModelFileError for names of anything but tensors, without running any of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the decoders of strings that `torch.save` does not write
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise _unreadable(name, f"its pickle has the operation {opcode.name}")
            if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(argument):
                raise _unreadable(name, f"its pickle names {argument!r}, which is neither tensor nor plain value")


def check_members(members: list[zipfile.ZipInfo], size: int, name: str) -> None:
    names = [member.filename for member in members]
    folders = {path.partition("/")[0] for path in names}
    twice = [path for path, count in Counter(names).items() if count > 1]
    odd = [path for path in names if {"", ".", ".."} & set(path.split("/")) or "\\" in path]
    if len(folders) != 1 or f"{next(iter(folders))}/data.pkl" not in names or twice or odd:
        raise _unreadable(name, f"its members are {', '.join(twice or odd or names)[:200]}")
    if f"{next(iter(folders))}/constants.pkl" in names:
        raise _unreadable(name, "it is a TorchScript archive")
    packed = any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members)
    if packed or sum(m.file_size for m in members) > size:
        raise _unreadable(name, "its members are compressed, or claim to be larger than the file")


def check_plain(content, name: str, *, room: int) -> None:
    """Raise ModelFileError unless these are plain values and tensors of at most `room` bytes, not nested too deeply."""
    level, values = [content], 1
    for _ in range(DEPTH):
        room -= sum(tensor_bytes(x, name) for x in level if not isinstance(x, CONTAINERS + PLAIN))
        if room < 0:
            raise _unreadable(name, "its tensors claim to be larger than the file")
        containers = [x for x in level if isinstance(x, CONTAINERS)]
        values += sum(2 * len(x) for x in containers)
        if values > VALUES:
            raise _unreadable(name, f"it holds more than {VALUES} values")
        level = _items(containers)
        if not level:
            return
    raise _unreadable(name, f"its values are nested more than {DEPTH} deep")


def _items(containers: list) -> list:
    return [y for x in containers for y in ((*x, *x.values()) if isinstance(x, dict) else x)]


def tensor_bytes(value, name: str) -> int:
    if type(value) is not torch.Tensor or value.dtype not in DTYPES or value.layout != torch.strided:
        raise _unreadable(name, f"it holds a {type(value).__name__} that is neither plain value nor dense tensor")
    if value.device.type != "cpu":
        raise _unreadable(name, f"it holds a tensor of the device {value.device}")
    return value.numel() * value.element_size()


def _unreadable(name: str, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{name} is not a readable model file (truncated, damaged, or of another program): {' '.join(reason.split())}"
    )
