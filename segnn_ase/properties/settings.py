"""The settings of a training of properties."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings
from segnn_ase.model.settings import model_config
from segnn_ase.train.settings import FilesConfig, LoopConfig


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name of a target."""
    from segnn_ase.base.label_names import usual_name  # which imports NumPy

    good = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100
    if not good or name in ("numbers", "positions"):
        raise ValueError(f"target is {name!r}; expected a name of at most 100 letters")
    if usual_name(name) is not None:
        raise ValueError(f"target is {name!r}, which a potential learns: leave --target out")


class PropertyData(FilesConfig):
    """Where the frames are, and which of their properties are learned."""

    target: tuple[str, ...] = Field(
        (),
        min_length=1,
        description="property to learn instead of energies and forces, by its name in info, arrays or results: "
        "dipole, polarizability, charges, ...; may be repeated",
    )
    irreps: dict[str, str] = Field(
        {},
        description="how a property turns, as quadrupole=1x2e; none: 0e of a number, 1o of a vector, 0e+2e of a "
        "symmetric matrix",
    )
    pooling: dict[str, Literal["sum", "mean", "free", "zero"]] = Field(
        {},
        description="what a structure has of its atoms, as gap=mean; none: what the compositions say, else the sum; of "
        "atoms' numbers zero or free: whether they always add up to nothing; none: as charges do in all frames",
    )

    @field_validator("target", mode="before")
    @classmethod
    def _one_or_many_targets(cls, value):
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_targets(self):
        for name in self.target:
            check_name(name)
        if len(set(self.target)) < len(self.target):
            raise ValueError(f"target is {list(self.target)}; expected each once")
        for name, table in (("irreps", self.irreps), ("pooling", self.pooling)):
            if strange := sorted(set(table) - set(self.target)):
                raise ValueError(f"{name} has {', '.join(strange)}, which is no target; targets are {self.target}")
        return self


OF_ENERGY = {"core_repulsion", "readout_hidden"}
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
        for name in OF_ENERGY & self.model.keys():
            raise ValueError(f"setting 'model.{name}' is {self.model[name]!r}: it is of potentials only; leave it out")
        return self
