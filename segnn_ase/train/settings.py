"""The settings of a training: where its frames are, what the model is, and how the loop runs."""

from typing import Literal, Protocol

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.dispersion_name import EXPECTED, is_dispersion
from segnn_ase.base.settings import Settings
from segnn_ase.model.settings import model_config
from segnn_ase.train.tuning_settings import FinetuneConfig


class FilesConfig(Settings):
    """Where the frames are; paths may carry ASE's index, "run.xyz@:100"."""

    train: tuple[str, ...] = Field(min_length=1, description="files of frames to learn from, of any format of ASE")
    valid: tuple[str, ...] = Field((), description="files of frames that choose the model; none: drawn from train")
    test: tuple[str, ...] = Field((), description="files of frames on which the finished model is measured")
    valid_fraction: float = Field(
        0.1, ge=0, lt=1, description="part of train that is drawn for valid, where that is empty"
    )

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return (value,) if isinstance(value, str) else value


class DataConfig(FilesConfig):
    """Where the frames are and what their labels are called."""

    isolated_atoms: str | None = Field(None, description="file with one frame per element, for E0")
    reference_energies: dict[str, float] | None = Field(None, description="E0 of each element by symbol, eV")
    energy_key: str | None = Field(None, description="name of the energies, eV; none: the usual names are tried")
    forces_key: str | None = Field(None, description="name of the forces, eV/Å; none: the usual names are tried")
    stress_key: str | None = Field(None, description="name of the stresses, eV/Å^3; none: the usual names are tried")
    virial_key: str | None = Field(None, description="name of the virials, eV, -volume * stress; none: the usual names")
    forces_mask_key: str | None = Field(
        None, description="name of the array that is true where a force counts; none: forces_mask, if it is there"
    )
    teacher: str | None = Field(
        None,
        description="model that labels more structures, near the frames, to be learned beside them; of many the mean",
    )
    taught: int | None = Field(
        None,
        ge=2,
        description="structures that the teacher labels; none: 10 for each frame, at most 500 or 20,000 atoms",
    )
    dispersion: str | None = Field(
        None, description="D3 that the labels contain, as d3bj:pbe: taken off before training, added by the calculator"
    )
    refuse_flaws: bool = Field(True, description="refuse what `segnn check` calls an error; false only tells")

    @field_validator("dispersion")
    @classmethod
    def _known_form(cls, value):
        if value is not None and not is_dispersion(value.strip().lower()):
            raise ValueError(f"expected {EXPECTED}")
        return value and value.strip().lower()


USUAL_MINUTES = 20.0


class LoopConfig(Settings):
    """How the training loop runs, whatever is learned; `resume.INDIFFERENT` lists what may change when it goes on."""

    epochs: int | None = Field(
        None, ge=1, description="passes over the training frames, at most; none: as minutes allow"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="time of each potential, or of one and its teachers, from which epochs are chosen in the first "
        f"seconds (four a frame at most, 400 to 2000); none: {USUAL_MINUTES:g}",
    )
    batch_size: int = Field(5, ge=1, description="structures in a step, at most")
    max_edges: int = Field(
        4000, ge=1, description="pairs of neighbours in a step, at most; a larger structure is a step of its own"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="step size of SOAP after the warm-up; falls to zero; none: the best of a few in short trainings",
    )
    beta1: float = Field(0.95, ge=0, lt=1, description="memory of gradients")
    beta2: float = Field(0.95, gt=0, lt=1, description="memory of squared gradients and of their eigenvectors")
    turn_every: int = Field(20, ge=1, description="steps between improvements of the eigenvectors")
    warmup_steps: int = Field(50, ge=0, description="steps in which the learning rate rises from zero")
    weight_decay: float = Field(0.0, ge=0, description="decay of the weights, times the learning rate")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="memory of the moving average of the weights, which is kept")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the loss's gradient")
    patience: int | None = Field(
        None,
        ge=1,
        description="when the validation loss falls no more over so many epochs, the learning rate falls to zero "
        "within as many, and the training ends; none: a tenth of all epochs, at least 10; as many as epochs: never",
    )
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    save_minutes: float = Field(1.0, ge=0, description="minutes between resume files")
    max_minutes: float | None = Field(
        None, gt=0, description="wall-clock minutes after which it stops; the same call goes on"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of first weights, batches and frames drawn for valid")
    device: str = Field("auto", description="where it runs: auto (a GPU, if there is one), cpu, cuda or cuda:1")
    dtype: Literal["float32", "float64"] = Field(
        "float32", description="precision of the weights; fine-tuning keeps that of its start"
    )
    freeze: tuple[str, ...] = Field((), description="parts kept as they are when fine-tuning, as segnn.messages.0")
    tensorboard: bool = Field(False, description="write the learning curves for TensorBoard, too")

    @property
    def by_stability(self) -> bool:
        """Whether short dynamics choose the model."""
        return False

    @model_validator(mode="after")
    def _one_length(self):
        if None not in (self.epochs, self.minutes):
            raise ValueError(f"epochs is {self.epochs} and minutes is {self.minutes}; expected one of them")
        return self


class Looped(Protocol):
    """What the loop asks of the settings of a training."""

    @property
    def out(self) -> str: ...
    @property
    def training(self) -> LoopConfig: ...


class OptimConfig(LoopConfig):
    """How the training of a potential runs."""

    energy_weight: float = Field(0.1, ge=0, description="weight of squared errors of energy / sqrt(atoms), eV^2")
    forces_weight: float = Field(1.0, ge=0, description="weight of squared errors of force components, (eV/Å)^2")
    stress_weight: float = Field(
        0.002, ge=0, description="weight of squared errors of stress * volume / sqrt(atoms), eV^2"
    )
    response_weight: float = Field(
        1.0,
        ge=0,
        description="weight of squared errors of magnetic forces and electronegativities, times scales of cues, eV^2",
    )
    dipole_weight: float = Field(10.0, ge=0, description="weight of squared errors of dipole / sqrt(atoms), (e Å)^2")
    polarizability_weight: float = Field(
        10.0, ge=0, description="weight of squared errors of polarizability / sqrt(atoms), (e Å^2/V)^2"
    )
    born_weight: float = Field(10.0, ge=0, description="weight of squared errors of Born charges, e^2")
    rollout_steps: int = Field(200, ge=0, description="steps of the short dynamics at some validations; 0: none")
    rollout_every: int | None = Field(None, ge=1, description="epochs between short dynamics; none: up to five in all")
    rollout_temperature: float = Field(
        300.0, gt=0, le=10_000, description="temperature of the short dynamics, K; a second run is twice as hot"
    )
    select: Literal["loss", "stability"] = Field(
        "loss",
        description="keep the latest model whose losses on validation frames are not surely higher than those of the "
        "best, or that of the longest short dynamics",
    )
    committee: int = Field(1, ge=1, le=100, description="potentials that differ in their seeds, for uncertainties")
    teachers: int | None = Field(
        None,
        ge=0,
        le=100,
        description="potentials that are trained first, whose mean is learned beside the frames; none: 2 to 4 where "
        "frames are so few that the minutes are enough for that, none where epochs, committee or teacher are given",
    )
    accelerate: Literal["auto", "off", "require"] = Field(
        "auto", description="compiled code: auto takes it where it is right, require fails without it"
    )

    @property
    def by_stability(self) -> bool:
        return self.select == "stability"

    @model_validator(mode="after")
    def _consistent(self):
        if self.teachers == 1:
            raise ValueError("teachers is 1; expected 0, or 2 and more, as the mean of one is no better than itself")
        if self.teachers and self.committee > 1:
            raise ValueError(f"teachers is {self.teachers} and committee is {self.committee}; expected one of them")
        if not max(self.energy_weight, self.forces_weight, self.stress_weight) > 0:
            raise ValueError("energy_weight, forces_weight and stress_weight are all 0; expected one above")
        if self.by_stability and not self.rollout_steps:
            raise ValueError("select is 'stability', but rollout_steps is 0: nothing tells how stable a model is")
        return self


class TrainConfig(Settings):
    """Everything that defines a training; `[model]` takes a preset and any field of `ModelConfig`."""

    out: str = Field("model.pt", description="file of the model; all others are named after it")
    data: DataConfig
    model: dict = Field(default_factory=dict, description="preset and settings of the network")
    training: OptimConfig = OptimConfig()
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="of `segnn finetune` only")

    @model_validator(mode="after")
    def _consistent(self):
        model_config(**self.model)
        if self.training.teachers and self.data.teacher is not None:
            given = f"training.teachers is {self.training.teachers} and data.teacher is {self.data.teacher!r}"
            raise ValueError(f"{given}; expected one of them")
        if self.training.teachers and not model_config(**self.model).smooth:
            raise ValueError(
                f"training.teachers is {self.training.teachers}, but the energy of this model jumps at the cutoff, so "
                "that there are no dynamics that teachers could label; leave it out, or take another preset"
            )
        return self


FINETUNE_DEFAULTS = {"learning_rate": 0.004}  # for settings that are not given
