"""The settings of `segnn learn`: from which structures, by which reference, at which conditions, how well, how long."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from segnn_ase.base.settings import Settings
from segnn_ase.learn.references import resolve_reference
from segnn_ase.model.settings import model_config
from segnn_ase.store.shipped import shipped_potentials
from segnn_ase.train.settings import OptimConfig

BETWEEN = 3  # temperatures of "300:1200"
FIRST, FEWEST = 20, 8  # labels of a first training
ALONE = 2  # labels of each structure besides: itself, and where dynamics of the reference begin


class ReferenceConfig(Settings):
    """What labels frames: an ASE calculator, in processes of its own."""

    calculator: str = Field(description="short name, or module:Class of an ASE calculator")
    arguments: dict[str, Any] = Field(default_factory=dict, description="of the calculator, by name")
    python: str | None = Field(None, description="interpreter that has it; none: this one")
    workers: int = Field(1, ge=1, le=256, description="processes that label side by side")
    threads: int | None = Field(None, ge=1, description="CPU threads of each; none: all cores, shared out")
    label_minutes: float = Field(30.0, gt=0, description="minutes a label may take before it is given up")
    memory: float | None = Field(None, gt=0, description="GB each process may use; none: no limit")

    @model_validator(mode="after")
    def _known(self):
        resolve_reference(self.calculator, self.arguments)
        return self

    def on_threads(self, threads: int) -> "ReferenceConfig":
        """With so many for all processes, unless their threads are given."""
        if self.threads is not None:
            return self
        return self.model_copy(update={"threads": max(threads // self.workers, 1)})


class PretrainingConfig(Settings):
    """A potential to begin with, which trainings then go on from: one that is there, or that learns a cheaper reference
    first."""

    reference: ReferenceConfig | None = Field(None, description="cheaper one, learned first by a loop of its own")
    model: str | None = Field(None, description="model file or name of a shipped potential")
    share: float = Field(0.3, gt=0, le=0.8, description="of the minutes of the budget, for that loop")

    @field_validator("reference", mode="before")
    @classmethod
    def _by_name(cls, value):
        return {"calculator": value} if isinstance(value, str) else value

    @staticmethod
    def named(given: str) -> dict[str, Any]:
        """Which of both a name means."""
        return {"model" if given.endswith(".pt") or given in shipped_potentials() else "reference": given}

    @model_validator(mode="after")
    def _one_of_them(self):
        if (self.reference is None) == (self.model is None):
            given = "neither" if self.model is None else f"both, model is {self.model!r}"
            raise ValueError(f"expected a reference or a model, got {given}")
        return self


class ConditionsConfig(Settings):
    """Where the potential is to hold."""

    temperature: tuple[float, ...] = Field(
        (300.0,), min_length=1, description="K; 300:1200 takes three from the first to the second, 300,600 both"
    )
    pressure: tuple[float, ...] = Field(
        (),
        description="GPa, each at every temperature, of structures periodic in three directions: their volume moves; "
        "none: it stays",
    )
    npt_cell: Literal["isotropic", "full"] = Field(
        "isotropic", description="what moves at a pressure: the volume, or lengths and angles of the cell as well"
    )
    picoseconds: float = Field(10.0, gt=0, description="ps that must run at every condition without a stop")
    timestep: float | None = Field(None, gt=0, le=20, description="fs; none: by the lightest element, 0.5 to 2")
    starts: int = Field(2, ge=1, le=100, description="runs at every condition, from structures of different origin")

    @field_validator("temperature", mode="before")
    @classmethod
    def _in_words(cls, value):
        parts = [value] if isinstance(value, str | int | float) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(number for part in parts for number in _kelvins(part))

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, value):
        if not all(0 < kelvin <= 10_000 for kelvin in value):
            raise ValueError("expected temperatures above 0 and up to 10,000 K")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _consistent(self):
        if self.npt_cell != "isotropic" and not self.pressure:
            raise ValueError(f"npt_cell is {self.npt_cell!r} without a pressure, at which it would move: give one")
        return self


def _kelvins(part) -> list[float]:
    """What "300", "300,600" and "300:1200" mean."""
    if not isinstance(part, str):
        return [part]
    try:
        if ":" in part:
            first, last = map(float, part.split(":"))
            return [first + (last - first) * n / (BETWEEN - 1) for n in range(BETWEEN)]
        return [float(word) for word in part.split(",")]
    except ValueError:
        raise ValueError("expected temperatures in K, as 300, 300,600 or 300:1200") from None


class AimConfig(Settings):
    """When it is good enough."""

    forces: float = Field(
        40.0, gt=0, description="meV/Å, rms error on frames of its own dynamics that are labelled afterwards"
    )
    energy: float | None = Field(None, gt=0, description="meV/atom, likewise; none: not asked for")
    stress: float | None = Field(None, gt=0, description="meV/Å^3, likewise; none: not asked for")
    uncertainty: float = Field(
        5.0,
        ge=1,
        description="dynamics stop where a force component is uncertain by so many times the aim, or the usual "
        "uncertainty where that is larger; the aim is divided by what errors were measured to be of those expected",
    )


class BudgetConfig(Settings):
    """What it may cost."""

    labels: int | None = Field(None, ge=20, description="labels in all; none: as many as the minutes allow")
    minutes: float = Field(
        60.0, gt=0, description="minutes in all, roughly, of which the last training gets three tenths or more"
    )
    rounds: int = Field(30, ge=1, description="rounds of dynamics, labels and training")
    first_labels: int | None = Field(
        None,
        ge=8,
        description="frames of the first training, rattled and strained or of a pretrained potential's dynamics; none: "
        "20, and where labels are limited no more than a quarter of them, but 8",
    )
    round_labels: int | None = Field(
        None,
        ge=4,
        description="labels in a round, of which a third, up to 24, measure the error first (where it seems small "
        "enough all, up to 24); none: 24, or 0.4 times the frames there are, where that is more, and as many as these "
        "while a short training passes each 100 times; "
        "where labels are limited a sixth of them; twice as many as there are conditions, where there is time",
    )


class StartConfig(Settings):
    """The frames before the first training."""

    relax_steps: int = Field(
        10,
        ge=0,
        description="steps of relaxation by the reference, at most, each a label; where labels are limited and a "
        "pretrained potential is there none, unless this is given",
    )
    dynamics_steps: int | None = Field(
        None,
        ge=0,
        description="steps of dynamics by the reference at the hottest condition, each a label, some of which are "
        "learned; none: what takes 4 % of the minutes, if that is 50 or more and labels are not limited",
    )
    rattle: float = Field(0.15, gt=0, le=0.5, description="Å, largest rms displacement of rattled frames")
    strain: float = Field(0.04, ge=0, le=0.3, description="largest strain of frames periodic in three directions")


class LearnConfig(Settings):
    """Everything that defines a loop."""

    out: str = Field("model.pt", description="file of the potential; the folder beside it has all the rest")
    structures: tuple[str, ...] = Field(min_length=1, description="files of structures, the last frame of each")
    frames: tuple[str, ...] = Field(
        (), description="files of frames that the reference has labelled before; they are learned from the beginning"
    )
    reference: ReferenceConfig
    pretraining: PretrainingConfig | None = Field(None, description="a potential to begin with; none: from scratch")
    conditions: ConditionsConfig = ConditionsConfig()
    aim: AimConfig = AimConfig()
    budget: BudgetConfig = BudgetConfig()
    start: StartConfig = StartConfig()
    model: dict = Field(default_factory=dict, description="preset and settings of the network, as of segnn train")
    training: OptimConfig = Field(
        OptimConfig(),
        description="as of segnn train; its length is of the last training, those in the rounds are short",
    )
    refuse_flaws: bool = Field(True, description="stop where `segnn check` calls the labels wrong; false only tells")
    seed: int = Field(0, ge=0, lt=2**31, description="of first frames, dynamics and trainings")

    @field_validator("structures", "frames", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return (value,) if isinstance(value, str) else value

    @field_validator("reference", mode="before")
    @classmethod
    def _by_name(cls, value):
        return {"calculator": value} if isinstance(value, str) else value

    @field_validator("pretraining", mode="before")
    @classmethod
    def _model_or_reference(cls, value):
        return PretrainingConfig.named(value) if isinstance(value, str) else value

    @field_validator("out")
    @classmethod
    def _a_model(cls, value):
        if Path(value).suffix != ".pt":
            raise ValueError("expected a name that ends in .pt")
        return value

    @model_validator(mode="after")
    def _consistent(self):
        if not model_config(**self.model).smooth:
            raise ValueError(
                "the energy of this model jumps at the cutoff, nothing can move by it; take another preset"
            )
        if self.training.committee > 1:
            raise ValueError(f"training.committee is {self.training.committee}; expected one potential")
        self._refuse_with_pretraining()
        labels, steps = self.budget.labels, self.start.dynamics_steps or 0
        structures = len(self.structures)
        if labels is not None:
            others = (ALONE + self.relaxations(structures)) * structures + 1
            if self.first_labels + steps + others > labels:
                first = f"budget.first_labels and start.dynamics_steps are {self.first_labels} and {steps}"
                rest = f"{others} for structures, their relaxations and a control"
                raise ValueError(f"{first}; with {rest} that is more than budget.labels, {labels}")
        return self

    def _refuse_with_pretraining(self) -> None:
        given = self.pretraining
        if given is None:
            return
        if given.model and self.model:
            told = f"model is {self.model}, but the network is that of {given.model}, which pretraining names"
            raise ValueError(f"{told}: leave it out")
        if self.training.teachers:
            told = f"training.teachers is {self.training.teachers}, but trainings go on from a pretrained potential"
            raise ValueError(f"{told}, which has no teachers: leave it out")
        own, first = self.reference, given.reference
        if first is not None and (first.calculator, first.arguments) == (own.calculator, own.arguments):
            raise ValueError(f"pretraining has the reference itself, {own.calculator!r}: leave it out")

    @property
    def folder(self) -> Path:
        return Path(self.out).with_suffix(".learn")

    @property
    def pretrained(self) -> Path:
        """Where the potential to begin with is kept, where there is one."""
        return self.folder / "pretrained.pt"

    @property
    def first_labels(self) -> int:
        """As `budget` says, or what is usual."""
        given, labels = self.budget.first_labels, self.budget.labels
        usual = FIRST if labels is None else max(min(FIRST, labels // 4), FEWEST)
        return usual if given is None else given

    def relaxations(self, structures: int) -> int:
        """Steps of a relaxation of each structure: a tenth of limited labels is for all, but none where a pretrained
        potential shows better frames."""
        labels, steps = self.budget.labels, self.start.relax_steps
        if labels is not None and self.pretraining is not None and "relax_steps" not in self.start.model_fields_set:
            return 0
        return steps if labels is None else min(steps, labels // (10 * structures))

    def steps_of(self, timestep: float, picoseconds: float) -> int:
        return max(math.ceil(1000 * picoseconds / timestep), 1)
