"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

from pathlib import Path
from typing import NamedTuple

from segnn_ase.base.errors import ConfigError
from segnn_ase.data.batches import Item
from segnn_ase.model.potential import Potential


class Training(NamedTuple):
    """What a training works on, prepared once."""

    potential: Potential
    train: list[Item]
    valid: list[Item]
    test: dict[str, list[Item]]
    closest: dict[tuple[int, int], float]  # Å, see `smallest_distances`
    lone_atoms: bool  # whether E0 are energies of lone atoms
    before: Potential | None  # that is fine-tuned
    metadata: dict
    fingerprint: dict  # of settings, data and starting point


def output_files(out: str) -> dict[str, Path]:
    """Every file that a training writes, by what it is."""
    path = Path(out)
    if path.suffix != ".pt":
        raise ConfigError(f"out is {out!r}; expected a name that ends in .pt")
    names = {
        "last": "last.pt",
        "resume": "resume.pt",
        "csv": "csv",
        "curve": "learning_curve.png",
        "tensorboard": "tensorboard",
    }
    return {kind: path.with_suffix(f".{ending}") for kind, ending in names.items()}


def refuse_overwriting(out: str) -> None:
    """Raise ConfigError for a model that is there without the resume file of its training."""
    if Path(out).exists() and not output_files(out)["resume"].exists():
        raise ConfigError(f"out is {out!r}, which exists and is no training to go on with: rename or remove it")
