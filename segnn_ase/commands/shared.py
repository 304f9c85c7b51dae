"""What the sub-commands of `segnn` share: the application, types of arguments, and how errors are told."""

import ctypes
import sys
from pathlib import Path
from typing import Annotated

import typer

from segnn_ase.base.errors import ConfigError, OutOfTime, SEGNNError
from segnn_ase.base.files import existing_file
from segnn_ase.base.launch import is_said, let_first_speak
from segnn_ase.base.settings import read_toml

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SEGNN interatomic potentials: train, fine-tune, evaluate and run molecular dynamics.",
)
RIVALS = {"epochs": "minutes", "minutes": "epochs"}
OUT_OF_TIME = 75  # exit status: sysexits.h calls it a temporary failure, try again
Model = Annotated[str, typer.Argument(help="model file or name of a shipped potential")]
Structure = Annotated[str, typer.Argument(help="file that ASE reads; its last frame is used")]
Toml = Annotated[Path | None, typer.Option(help="TOML file with \\[data], \\[training] and \\[finetune]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1")]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64; default: that of the model")]
Accelerate = Annotated[str, typer.Option(help="compiled code", metavar="auto|off|require")]
Dispersion = Annotated[
    str | None, typer.Option(help="D3 to add where the labels had none, as d3bj:pbe; default: what they had")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace files that are there")]
Out = Annotated[str | None, typer.Option(help="model file that is written; default: model.pt")]


def refuse_suffix(name: str, path: Path, suffix: str) -> None:
    """Raise ConfigError before the work for a name that does not end so: it may be that of another file."""
    if path.suffix != suffix:
        raise ConfigError(f"{name} is {str(path)!r}; expected a name that ends in {suffix}")


def read_structure(path: str):
    """Read the last frame of a file. Raises FileNotFoundError, or ConfigError for what ASE cannot read."""
    import ase.io

    from segnn_ase.data.counts import refuse_impossible_counts

    existing_file(path, "structure")
    try:
        refuse_impossible_counts(path)
        return ase.io.read(path, -1)
    except Exception as error:  # ASE raises anything on a bad file
        raise ConfigError(
            f"structure is {str(path)!r}, which ASE cannot read: {type(error).__name__}: {error}"
        ) from error


class reported_errors:
    """Turn the package's and the system's errors into one line on stderr, exit status 1; bugs keep their traceback."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OutOfTime):
            status, told = OUT_OF_TIME, str(error)
        elif isinstance(error, SEGNNError | OSError | ImportError):
            status, told = 1, f"error: {error}"
        elif isinstance(error, KeyboardInterrupt):
            status, told = 130, str(error) or "interrupted"
        else:
            return False
        if is_said(error):
            let_first_speak()
        else:
            typer.echo(told, err=True)
        sys.exit(status)


def with_file(config: Path | None, out: str | None, **sections: dict) -> dict:
    """Merge TOML file and options, which go first: also of epochs and minutes, which cannot both be."""
    values = {} if config is None else read_toml(config)
    for name, options in sections.items():
        section = values.get(name, {})
        if isinstance(section, dict):  # what is no table is refused by `parse`
            gone = {RIVALS[option] for option in options.keys() & RIVALS.keys()}
            values[name] = {**{key: value for key, value in section.items() if key not in gone}, **options}
    return values if out is None else {**values, "out": out}


def prepare_process(threads: int | None) -> None:
    """Settings that belong to a process of our own, never to the library: threads and the memory allocator."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        # glibc gives blocks of over 128 kB back to the system after every use; getting them again, page by page,
        # costs a quarter of a training step
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
