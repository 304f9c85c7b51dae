"""Settings of a small loop."""

from pathlib import Path

from ase import Atoms

from segnn_ase.learn.labelled import LabelledFrames
from segnn_ase.learn.labeller import Labeller
from segnn_ase.learn.pool import LabelPool
from segnn_ase.learn.settings import ReferenceConfig

SMALL = {"hidden_irreps": "4x0e+4x1o", "lmax_attr": 1, "cutoff": 3.5, "n_radial": 4, "radial_hidden": [8]}


def loop_settings(folder: Path, crystal: Atoms, **sections) -> dict:
    crystal.write(folder / "cu.xyz")
    values = {
        "out": str(folder / "cu.pt"),
        "structures": [str(folder / "cu.xyz")],
        "reference": {"calculator": "emt"},
        "conditions": {"temperature": [300.0], "picoseconds": 0.04, "starts": 2},
        "budget": {"labels": 60, "minutes": 600.0, "rounds": 2, "first_labels": 8, "round_labels": 6},
        "start": {"relax_steps": 2},
        "model": SMALL,
        "training": {"epochs": 3, "device": "cpu"},
        "aim": {"forces": 1.0},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return values


def asking(folder: Path, model: str) -> tuple[LabelPool, Labeller]:
    """A shipped potential as the reference."""
    reference = {"calculator": "segnn_ase:SEGNNCalculator", "arguments": {"model": model, "domain": "ignore"}}
    pool = LabelPool(ReferenceConfig(**reference, threads=1), folder / "workers")
    return pool, Labeller(pool, LabelledFrames(folder))
