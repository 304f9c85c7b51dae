"""The settings of a training of properties."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings
from segnn_ase.model.settings import model_config
from segnn_ase.train.settings import LoopConfig


class PropertyData(Settings):
    """Where the frames are, and which of their properties are learned; paths may carry ASE's index."""

    train: tuple[str, ...] = Field(min_length=1, description="files of frames to learn from, of any format of ASE")
    valid: tuple[str, ...] = Field((), description="files of frames that choose the model; none: drawn from train")
    test: tuple[str, ...] = Field((), description="files of frames on which the finished model is measured")
    valid_fraction: float = Field(
        0.1, ge=0, lt=1, description="part of train that is drawn for valid, where that is empty"
    )
    target: tuple[str, ...] = Field(
        (),
        min_length=1,
        description="property to learn instead of energies and forces, by its name in info, arrays or results: "
        "dipole, polarizability, charges, ...; may be repeated",
    )
    irreps: dict[str, str] = Field(
        {}, description="how a property turns, as quadrupole=1x2e; none: 0e of a number, 1o of a vector, 0e+2e of a 3x3"
    )
    pooling: dict[str, Literal["sum", "mean"]] = Field(
        {}, description="what a structure has of its atoms, as gap=mean; none: what the compositions say, else the sum"
    )

    @field_validator("train", "valid", "test", "target", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_targets(self):
        if len(set(self.target)) < len(self.target):
            raise ValueError(f"target is {list(self.target)}; expected each once")
        for name, table in (("irreps", self.irreps), ("pooling", self.pooling)):
            if strange := sorted(set(table) - set(self.target)):
                raise ValueError(f"{name} has {', '.join(strange)}, which is no target; targets are {self.target}")
        return self


OF_TARGETS = ("target", "irreps", "pooling")


class PropertyTraining(Settings):
    """Everything that defines a training; `[model]` takes a preset and any field of `ModelConfig`."""

    out: str = Field("model.pt", description="file of the model; all others are named after it")
    data: PropertyData
    model: dict = Field(default_factory=dict, description="preset and settings of the network")
    training: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _consistent(self):
        model_config(**self.model)
        return self
