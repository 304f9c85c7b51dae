"""Files of time-steppers: plain content, as those of potentials."""

import math
from pathlib import Path

import torch

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.dynamics.settings import StepperConfig
from segnn_ase.dynamics.stepper import Scales, TimeStepper
from segnn_ase.model.irreps import CONVENTION
from segnn_ase.store.model_file import WRONG
from segnn_ase.store.tensors import load_form, save_tensors

FORMAT, VERSION = "segnn_ase time-stepper", 1


def save_stepper(path: "str | Path", stepper: TimeStepper, *, metadata: dict | None = None) -> None:
    """Write a time-stepper with its provenance; metadata holds plain values."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "convention": CONVENTION,
        "config": stepper.config.model_dump(mode="json"),
        "scales": list(stepper.scales),
        "weights": stepper.state_dict(),
        "metadata": metadata or {},
    }
    save_tensors(path, content)


def load_stepper(path: "str | Path") -> tuple[TimeStepper, dict]:
    """Load a time-stepper on the CPU, and its metadata. Raises FileNotFoundError, ModelFileError for others."""
    content = load_form(path, FORMAT, VERSION)
    try:
        if content["convention"] != CONVENTION:
            raise ValueError(f"its convention is {content['convention']!r}; expected {CONVENTION!r}")
        if not all(bool(torch.isfinite(weight).all()) for weight in content["weights"].values()):
            raise ValueError("its weights are not finite")
        if not all(math.isfinite(scale) and scale > 0 for scale in content["scales"]):
            raise ValueError(f"its scales are {content['scales']}; expected positive numbers")
        stepper = TimeStepper(StepperConfig.parse(content["config"]), scales=Scales(*content["scales"]))
        stepper.to(next(iter(content["weights"].values())).dtype)
        stepper.load_state_dict(content["weights"])
        return stepper.eval(), dict(content["metadata"])
    except (*WRONG, ConfigError, StopIteration) as error:
        raise ModelFileError(f"{path} is no usable time-stepper: {' '.join(str(error).split())[:200]}") from error
