"""Settings of a time-stepper, and the networks of the published comparison as values of them."""

from typing import Literal

from pydantic import Field, model_validator

from segnn_ase.base.errors import expect
from segnn_ase.base.settings import Settings
from segnn_ase.model.irreps import Kind, kinds, parse_irreps
from segnn_ase.model.settings import ModelConfig
from segnn_ase.train.settings import LoopConfig

FAR = 10.0  # times the scale of positions: a cutoff that hardly any pair reaches, where a network needs one


VECTOR = Kind(1, -1)
OF_SEGNN = ("lmax_attr", "message", "velocity_attribute", "velocities", "steps", "equivariant")


class StepperConfig(Settings):
    """A network that takes positions, velocities and charges or masses to positions a fixed time later.

    The published variants are values of these settings: see `STEPPERS`.
    """

    network: Literal["segnn", "egnn"] = Field(
        "segnn", description="steerable features, or the scalars of EGNN with an update of the coordinates"
    )
    hidden_irreps: str = Field("32x0e+32x1o", description="features of a body: channels of each irrep")
    lmax_attr: int = Field(1, ge=0, le=8, description="degree of the spherical harmonics in edge and node attributes")
    interactions: int = Field(4, ge=1, le=8, description="rounds of messages between bodies")
    message: Literal["published", "linear"] = Field(
        "published", description="the paper's two gated layers, or a linear one with radial networks (TFN)"
    )
    velocity_attribute: bool = Field(True, description="whether harmonics of the velocity steer the nodes, too")
    pair_functions: Literal["published", "many"] = Field(
        "published",
        description="invariants of a pair: its squared distance and product of charges, or Bessel functions, inverse "
        "distance, Coulomb energy, and how fast the two move against each other besides",
    )
    features: bool = Field(True, description="of EGNN: features beside the coordinates; false is the radial field")
    velocities: bool = Field(
        False, description="whether velocities are predicted, too, so that it can go on from there"
    )
    steps: int = Field(
        1, ge=1, le=100, description="times that the network is applied, each over an equal part of the time"
    )
    equivariant: bool = Field(True, description="false: components of vectors enter as scalars (message passing)")
    neighbors: int | None = Field(None, ge=1, description="nearest bodies that send messages; none: all")

    @property
    def moves_velocities(self) -> bool:
        """Whether the network says velocities, too: to be told, or to go on from."""
        return self.velocities or self.steps > 1

    @model_validator(mode="after")
    def _consistent(self):
        backbone = self.backbone()
        if self.network == "egnn":
            self._refuse(OF_SEGNN, "network is 'egnn'")
            if len(parse_irreps(backbone.hidden_irreps)) > 1:
                raise ValueError(f"hidden_irreps is {backbone.hidden_irreps!r} and network is 'egnn'; expected 0e only")
            return self
        self._refuse(("features",), "network is 'segnn'")
        if not self.equivariant and self.lmax_attr:
            raise ValueError(f"equivariant is false and lmax_attr is {self.lmax_attr}; expected 0")
        if self.equivariant and not (self.lmax_attr and VECTOR in kinds(parse_irreps(backbone.hidden_irreps))):
            raise ValueError("equivariant is true: expected lmax_attr above 0 and some 1o in hidden_irreps")
        for name, asked in (("velocities", self.velocities), ("steps", self.steps > 1)):
            if asked and not self.equivariant:
                raise ValueError(f"{name} is {getattr(self, name)}: expected equivariant = true")
        if self.message == "linear" and self.pair_functions == "many":
            raise ValueError("message is 'linear' and pair_functions is 'many': a linear message has radial networks")
        return self

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        """Raise ValueError for what is set and would do nothing."""
        for name in names:
            value, usual = getattr(self, name), type(self).model_fields[name].default
            if value != usual:
                raise ValueError(f"{name} is {value!r}, but {reason}, which has none; leave it out")

    def backbone(self) -> ModelConfig:
        """The settings of the network between embedding and head."""
        linear = self.message == "linear"
        return ModelConfig(
            cutoff=FAR,
            hidden_irreps=self.hidden_irreps,
            lmax_attr=self.lmax_attr,
            interactions=self.interactions,
            message=self.message,
            smooth=linear,
            n_radial=16 if linear else 1,
            body_order=1,
            core_repulsion=False,
        )


STEPPERS: dict[str, dict] = {
    "segnn": {},
    "segnn-geometry": {"velocity_attribute": False},
    "segnn-pairs": {"hidden_irreps": "14x0e+14x1o", "pair_functions": "many"},
    "tfn": {"message": "linear", "velocity_attribute": False},
    "egnn": {"network": "egnn", "hidden_irreps": "64x0e"},
    "radial-field": {"network": "egnn", "hidden_irreps": "64x0e", "features": False},
    "message-passing": {"hidden_irreps": "64x0e", "lmax_attr": 0, "equivariant": False},
}


def stepper_config(preset: str = "segnn", **overrides) -> StepperConfig:
    """Return the settings of a preset with some replaced. Raises ConfigError for unknown names and values."""
    expect(isinstance(preset, str) and preset in STEPPERS, "preset", preset, f"one of {', '.join(STEPPERS)}")
    return StepperConfig.parse({**STEPPERS[preset], **overrides}, section="model")


class MotionConfig(Settings):
    """Bodies at two times, in a file as `write_motion` makes it: the first ones are learned, and so on."""

    motion: str = Field(description="file of charges, and of positions and velocities at one time and another")
    train: int = Field(3000, ge=1, description="systems to learn from")
    valid: int = Field(2000, ge=1, description="systems that choose the model")
    backwards: bool = Field(
        False,
        description="learn every system backwards, too, with velocities turned round: right where forces do not depend "
        "on velocities",
    )
    test: int = Field(2000, ge=1, description="systems on which the finished model is measured")


class StepperTraining(Settings):
    """Everything that defines a training; `[model]` takes a preset and any field of `StepperConfig`."""

    out: str = Field("stepper.pt", description="file of the model; all others are named after it")
    data: MotionConfig
    model: dict = Field(default_factory=dict, description="preset and settings of the network")
    training: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _consistent(self):
        stepper_config(**self.model)
        return self
