"""Validated settings and the typed errors of the package. Unknown keys are errors."""

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class SEGNNError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(SEGNNError, ValueError):
    """A setting is unknown, missing or out of range."""


class StructureError(SEGNNError, ValueError):
    """A structure cannot be evaluated: unknown element, NaN position, overlapping atoms, bad cell."""


class DataError(SEGNNError, ValueError):
    """Labelled frames are missing, inconsistent or useless."""


class ModelFileError(SEGNNError, ValueError):
    """A file is not a readable model of this package."""


class DeviceError(SEGNNError, RuntimeError):
    """The requested device does not exist here."""


class Settings(BaseModel):
    """Frozen settings; `parse` turns any mistake into a `ConfigError` that names the key and the remedy."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def parse(cls, values: dict, *, section: str = ""):
        """Validate a plain dict. Raises ConfigError listing every wrong key with what was expected."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, item, section) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: dict, section: str) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join([section, *location] if section else location)
    if item["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown setting {name!r}: {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"setting {name!r} is {item['input']!r}: {message}" if location else message


class ModelConfig(Settings):
    """Architecture of the potential; see DESIGN notes in the README for the equations.

    The published variants are values of these settings, not other classes: see `PRESETS`.
    """

    cutoff: float = Field(5.0, gt=0.5, le=20, description="Å")
    hidden_irreps: str = "32x0e+32x1o+32x2e"
    lmax_attr: int = Field(3, ge=0, le=8, description="degree of the spherical harmonics in edge and node attributes")
    interactions: int = Field(2, ge=1, le=8)
    message: Literal["steerable", "linear", "published"] = "steerable"
    smooth: bool = Field(True, description="envelope on messages and smooth node attributes; False is the paper's")
    n_radial: int = Field(8, ge=1, le=64, description="Bessel functions")
    radial_hidden: tuple[int, ...] = (64, 64)
    body_order: int = Field(3, ge=1, le=3, description="highest power of the node's own message in self-products")
    readout_hidden: int = Field(16, ge=1)
    zbl: bool = Field(False, description="add the Ziegler-Biersack-Littmark core repulsion")

    @field_validator("hidden_irreps")
    @classmethod
    def _hidden(cls, value: str) -> str:
        from segnn_ase.o3 import SCALAR, kinds, multiplicities, parse_irreps

        irreps = parse_irreps(value)
        counts = dict(zip(kinds(irreps), multiplicities(irreps), strict=True))
        if SCALAR not in counts:
            raise ValueError("expected some 0e channels: they carry the energy and drive the gates")
        if max(counts.values()) > counts[SCALAR]:
            raise ValueError("expected no irrep with more channels than 0e: each channel is gated by its own scalar")
        return str(irreps)

    @model_validator(mode="after")
    def _variants(self):
        if self.message != "published" and not self.smooth:
            raise ValueError("smooth = false is only meaningful with message = 'published'")
        if self.message == "published" and self.body_order != 1:
            raise ValueError("message = 'published' has no self-products: set body_order = 1")
        return self


PRESETS: dict[str, dict] = {
    "segnn": {},
    "fast": {"hidden_irreps": "64x0e+64x1o", "lmax_attr": 2},
    "segnn2022": {"message": "published", "smooth": False, "body_order": 1, "lmax_attr": 2},
    "tfn": {"message": "linear", "body_order": 1},
    "egnn": {"hidden_irreps": "64x0e", "lmax_attr": 0, "body_order": 1},
    "schnet": {"hidden_irreps": "64x0e", "lmax_attr": 0, "message": "linear", "body_order": 1},
}


def model_config(preset: str = "segnn", **overrides) -> ModelConfig:
    """Return the settings of a preset with some replaced. Raises ConfigError for unknown names and values."""
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    return ModelConfig.parse({**PRESETS[preset], **overrides}, section="model")


def existing_file(path: "str | Path", argument: str) -> Path:
    """Return the path if it is a file. Raises FileNotFoundError naming the argument."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{argument} is {str(path)!r}, but there is no such file (working folder {Path.cwd()})")
    return path
