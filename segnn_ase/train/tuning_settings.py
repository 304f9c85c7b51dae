"""The settings that only fine-tuning has: what becomes of the old, and how new elements begin."""

from typing import Literal

from pydantic import Field, field_validator

from segnn_ase.base.settings import Settings


class FinetuneConfig(Settings):
    """What a potential that is fine-tuned is to keep; paths may carry ASE's index, "run.xyz@:100"."""

    keep: Literal["auto", "old", "nothing"] = Field(
        "auto",
        description="learn old structures beside the new frames, or measure them only; auto: learn those that it has "
        "stored unless the new labels contradict it where it knows its way, as of another level of theory do",
    )
    replay: tuple[str, ...] = Field((), description="files of old frames, with labels of the same level of theory")
    structures: tuple[str, ...] = Field(
        (),
        description="files of old structures, which the starting model labels itself; none: those that it has stored",
    )
    replay_frames: int | None = Field(
        None, ge=1, description="old frames or structures in an epoch; none: twice as many as new ones, at least 16"
    )
    rattled: int = Field(
        3, ge=0, description="copies with displaced atoms of each old structure that it labels itself, to learn as well"
    )
    l2_sp: float = Field(0.0, ge=0, description="weight of half the squared distance from the starting weights")
    new_elements: Literal["fresh", "nearest"] = Field(
        "fresh", description="a new element begins with random weights, or like the nearest one in the periodic table"
    )

    @field_validator("replay", "structures", mode="before")
    @classmethod
    def _one_path_or_many(cls, value):
        return (value,) if isinstance(value, str) else value
