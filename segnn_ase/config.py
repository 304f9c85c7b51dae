"""Validated settings and the typed errors of the package. Unknown keys are errors."""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

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


class OutputError(SEGNNError, OSError):
    """A file cannot be written: no space, no permission, no such folder. What was there before is intact."""


class DeviceError(SEGNNError, RuntimeError):
    """The requested device does not exist here."""


class MDError(SEGNNError, RuntimeError):
    """A simulation was stopped by a guard, or cannot be resumed from its restart file."""


class OutOfTime(SEGNNError, RuntimeError):
    """`max_minutes` are over: everything is saved, and the same call goes on."""


class AccelerationError(SEGNNError, RuntimeError):
    """Fused kernels were required but cannot be compiled here, or do not reproduce plain PyTorch."""


class DomainError(SEGNNError, ValueError):
    """A structure is outside what the potential was trained on."""


class DomainWarning(UserWarning):
    """A structure is outside what the potential was trained on: its results may be worth nothing."""


class AccelerationWarning(UserWarning):
    """Plain PyTorch is used where fused kernels were expected: slower, the same numbers."""


def expect(good: bool, argument: str, value, expected: str) -> None:
    """Raise ConfigError with the argument, its value and what is expected, unless it is good."""
    if not good:
        raise ConfigError(f"{argument} is {in_short(value)}; expected {expected}")


def in_short(value) -> str:
    """The value on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


class Settings(BaseModel):
    """Frozen settings; any mistake is a `ConfigError` that names the key and the remedy."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(type(self), item, "") for item in error.errors())) from None

    __init__.__pydantic_base_init__ = True  # pydantic makes settings within settings without it, to name their section

    @classmethod
    def parse(cls, values: dict, *, section: str = ""):
        """Validate a plain dict. Raises ConfigError listing every wrong key with what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, item, section) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: dict, section: str) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join([section, *location] if section else location)
    if item["type"] == "missing":
        return f"setting {name!r} is missing"
    if item["type"] == "extra_forbidden":
        for part in item["loc"][:-1]:
            cls = cls.model_fields[part].annotation
        known = list(cls.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown setting {name!r}: {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"setting {name!r} is {in_short(item['input'])}: {message}" if location else message


MOST_CHANNELS = 4096  # of one irrep


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
    radial_hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((64, 64), max_length=8)
    body_order: int = Field(3, ge=1, le=3, description="highest power of the node's own message in self-products")
    readout_hidden: int = Field(16, ge=1, le=4096)
    core_repulsion: bool = Field(True, description="keeps atoms apart below the shortest distances of the data")

    @field_validator("hidden_irreps")
    @classmethod
    def _hidden(cls, value: str) -> str:
        from segnn_ase.o3 import SCALAR, kinds, multiplicities, parse_irreps

        irreps = parse_irreps(value)
        counts = dict(zip(kinds(irreps), multiplicities(irreps), strict=True))
        if SCALAR not in counts:
            raise ValueError("expected some 0e channels: they carry the energy and drive the gates")
        if max(counts.values()) > MOST_CHANNELS or max(kind.l for kind in counts) > 8:
            raise ValueError(f"expected at most {MOST_CHANNELS} channels of an irrep, and degrees up to 8")
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
    "segnn2022": {
        "message": "published",
        "smooth": False,
        "body_order": 1,
        "lmax_attr": 2,
        "core_repulsion": False,
    },
    "tfn": {"message": "linear", "body_order": 1},
    "egnn": {"hidden_irreps": "64x0e", "lmax_attr": 0, "body_order": 1},
    "schnet": {"hidden_irreps": "64x0e", "lmax_attr": 0, "message": "linear", "body_order": 1},
}


def model_config(preset: str = "segnn", **overrides) -> ModelConfig:
    """Return the settings of a preset with some replaced. Raises ConfigError for unknown names and values."""
    expect(isinstance(preset, str) and preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    return ModelConfig.parse({**PRESETS[preset], **overrides}, section="model")


def existing_file(path: "str | Path", argument: str) -> Path:
    """Return the path if it is a file. Raises FileNotFoundError naming the argument."""
    expect(isinstance(path, str | os.PathLike), argument, path, "a path")
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"{argument} is {str(path)!r}, which is a folder; expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{argument} is {str(path)!r}, but there is no such file (working folder {Path.cwd()})")
    return path


class DataConfig(Settings):
    """Where the frames are and what their labels are called; paths may carry ASE's index, "run.xyz@:100"."""

    train: tuple[str, ...] = Field(min_length=1)
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    valid_fraction: float = Field(0.1, ge=0, lt=1, description="drawn from train when valid is empty")
    isolated_atoms: str | None = Field(None, description="file with one frame per element, for E0")
    reference_energies: dict[str, float] | None = Field(None, description="E0 by symbol, eV")
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    refuse_flaws: bool = Field(True, description="False only tells what `segnn check` would call an error")

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return (value,) if isinstance(value, str) else value


class OptimConfig(Settings):
    """The training loop's settings."""

    epochs: int = Field(420, ge=1)
    batch_size: int = Field(5, ge=1, description="structures")
    max_edges: int | None = Field(None, ge=1, description="fill batches up to this many edges instead")
    learning_rate: float = Field(0.015, gt=0)
    beta2: float = Field(0.999, gt=0, lt=1, description="Adam's memory of squared gradients")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.002, ge=0, description="AdamW when positive, Adam for zero")
    ema_decay: float = Field(0.99, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    energy_weight: float = Field(1.0, ge=0)
    forces_weight: float = Field(1.0, ge=0)
    stress_weight: float = Field(0.05, ge=0)
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without improvement")
    validate_every: int = Field(1, ge=1, description="epochs")
    rollout_steps: int = Field(200, ge=0, description="of short dynamics at some validations; 0 for none")
    rollout_every: int | None = Field(None, ge=1, description="epochs between them; None for five in all")
    rollout_temperature: float = Field(300.0, gt=0, le=10_000, description="K; one rollout is twice as hot")
    select: Literal["loss", "stability"] = Field(
        "loss", description="keep the lowest validation loss, or that among the longest rollouts"
    )
    save_minutes: float = Field(1.0, ge=0, description="time between resume files")
    max_minutes: float | None = Field(
        None, gt=0, description="of wall-clock time; then the training can be gone on with"
    )
    seed: int = Field(0, ge=0)
    committee: int = Field(1, ge=1, le=100, description="potentials that differ in their seeds, for uncertainties")
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    freeze: tuple[str, ...] = Field(
        (), description="parts to keep as they are when fine-tuning, such as 'segnn.messages.0'"
    )
    tensorboard: bool = False
    accelerate: Literal["auto", "off", "require"] = Field("auto", description="compiled code")

    @model_validator(mode="after")
    def _something_to_learn(self):
        if not max(self.energy_weight, self.forces_weight, self.stress_weight) > 0:
            raise ValueError("energy_weight, forces_weight and stress_weight are all 0; expected one above")
        if self.select == "stability" and not self.rollout_steps:
            raise ValueError("select is 'stability', but rollout_steps is 0: nothing tells how stable a model is")
        return self


class TrainConfig(Settings):
    """Everything that defines a training; `[model]` takes a preset and any field of `ModelConfig`."""

    out: str = "model.pt"
    data: DataConfig
    model: dict = Field(default_factory=dict)
    training: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _model(self):
        model_config(**self.model)
        return self


def read_toml(path: "str | Path") -> dict:
    """Read a TOML file. Raises FileNotFoundError, or ConfigError with the line of a mistake."""
    path = existing_file(path, "config")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is not valid TOML: {error}") from None
