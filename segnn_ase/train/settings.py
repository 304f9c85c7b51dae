"""Validated settings and the typed errors of the package. Unknown keys are errors."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings
from segnn_ase.model.settings import model_config


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


FINETUNE_DEFAULTS = {"epochs": 50, "learning_rate": 0.002, "weight_decay": 0.0}  # for settings that are not given
