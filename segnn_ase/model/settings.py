"""Validated settings and the typed errors of the package. Unknown keys are errors."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.errors import expect
from segnn_ase.base.settings import Settings
from segnn_ase.structure.cue_settings import FIELD, Cue, check_cues

MOST_CHANNELS = 4096  # of one irrep


class ModelConfig(Settings):
    """Architecture of the potential; see DESIGN notes in the README for the equations.

    The published variants are values of these settings, not other classes: see `PRESETS`.
    """

    cutoff: float = Field(5.0, gt=0.5, le=20, description="largest distance of neighbours, Å")
    hidden_irreps: str = Field("32x0e+32x1o+32x2e", description="features of an atom: channels of each irrep")
    lmax_attr: int = Field(3, ge=0, le=8, description="degree of the spherical harmonics in edge and node attributes")
    interactions: int = Field(2, ge=1, le=8, description="rounds of messages between neighbours")
    message: Literal["steerable", "linear", "published"] = Field(
        "steerable", description="gated product with the edge attribute, without the gate, or the paper's two layers"
    )
    smooth: bool = Field(True, description="envelope on messages and smooth node attributes; False is the paper's")
    n_radial: int = Field(8, ge=1, le=64, description="Bessel functions")
    radial_hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (64, 64), max_length=8, description="widths of the hidden layers of the radial networks"
    )
    body_order: int = Field(3, ge=1, le=3, description="highest power of the node's own message in self-products")
    density_weighting: bool = Field(
        False, description="what an atom sends is divided by how dense its surroundings are, as in PointConv"
    )
    bound: float = Field(
        4.0,
        ge=0,
        description="what a channel of messages does not exceed in self-products, in its usual sizes; 0: unbounded",
    )
    power_scale: float = Field(
        0.3,
        gt=0,
        le=1,
        description="what each power of messages is multiplied with: below 1, powers are learned later",
    )
    readout_hidden: int = Field(16, ge=1, le=4096, description="width of the hidden layer of the last readout")
    electrostatics: Literal["none", "latent", "given"] = Field(
        "none",
        description="of charges whose Coulomb energy has no cutoff: latent, learned without labels, or given, those of "
        "the cue initial_charges",
    )
    smearing: float = Field(1.5, gt=0.2, le=5, description="width of the charges of electrostatics, Å")
    core_repulsion: bool = Field(True, description="keeps atoms apart below the shortest distances of the data")
    cues: tuple[Cue, ...] = Field((), description="what it is told of a structure besides: charges, moments, spin")

    @field_validator("hidden_irreps")
    @classmethod
    def _hidden(cls, value: str) -> str:
        from segnn_ase.model.irreps import SCALAR, kinds, multiplicities, parse_irreps

        irreps = parse_irreps(value)
        counts = dict(zip(kinds(irreps), multiplicities(irreps), strict=True))
        if SCALAR not in counts:
            raise ValueError("expected some 0e channels: they carry the energy and drive the gates")
        if max(counts.values()) > MOST_CHANNELS or max(kind.l for kind in counts) > 8:
            raise ValueError(f"expected at most {MOST_CHANNELS} channels of an irrep, and degrees up to 8")
        if max(counts.values()) > counts[SCALAR]:
            raise ValueError("expected no irrep with more channels than 0e: each channel is gated by its own scalar")
        return str(irreps)

    @field_validator("cues")
    @classmethod
    def _cues(cls, value: tuple[Cue, ...]) -> tuple[Cue, ...]:
        return check_cues(value)

    @property
    def in_field(self) -> bool:
        """Whether it knows dipoles and polarizabilities, and what a uniform electric field does to them."""
        return any(cue.name == FIELD for cue in self.cues)

    @model_validator(mode="after")
    def _variants(self):
        if self.message != "published" and not self.smooth:
            raise ValueError("smooth = false is only meaningful with message = 'published'")
        if self.in_field and not {"1o", "2e"} <= {term.split("x")[-1] for term in self.hidden_irreps.split("+")}:
            raise ValueError(
                f"hidden_irreps is {self.hidden_irreps!r} and external_field is a cue; expected some 1o and 2e, of "
                "which dipoles and polarizabilities are made"
            )
        if any(cue.kind == "polar" for cue in self.cues) and "1o" not in self.hidden_irreps:
            raise ValueError(f"hidden_irreps is {self.hidden_irreps!r}; expected some 1o, which polar cues steer")
        if self.electrostatics != "none" and self.in_field:
            raise ValueError(
                f"electrostatics is {self.electrostatics!r} and external_field is a cue: what a field does to charges "
                "that act at any distance is not known yet; expected one of both"
            )
        if self.electrostatics == "given" and "initial_charges" not in {cue.name for cue in self.cues}:
            raise ValueError(
                "electrostatics is 'given' and initial_charges is no cue; expected it among cues, which gives the "
                "charges, or 'latent'"
            )
        if self.message == "published" and self.electrostatics != "none":
            raise ValueError("electrostatics is none of message = 'published'; leave it out")
        if self.message == "published" and self.cues:
            raise ValueError("cues are none of message = 'published'; leave them out")
        if self.message == "published" and self.density_weighting:
            raise ValueError("density_weighting = true is none of message = 'published'; leave it out")
        if self.message == "published" and self.body_order != 1:
            raise ValueError("message = 'published' has no self-products: set body_order = 1")
        return self


PRESETS: dict[str, dict] = {
    "segnn": {},
    "fast": {"hidden_irreps": "64x0e+64x1o", "lmax_attr": 2},
    "accurate": {
        "hidden_irreps": "64x0e+64x1o+64x2e",
        "interactions": 3,
        "n_radial": 5,
        "radial_hidden": (32,),
    },
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
