"""What a loop remembers beside its frames: for which settings it is, how long it took, and what each round found."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError
from segnn_ase.base.files import write_atomically
from segnn_ase.learn.explore import Condition, conditions_of
from segnn_ase.learn.labelled import SECONDS
from segnn_ase.learn.labeller import Labeller
from segnn_ase.learn.settings import LearnConfig

VERSION = 2
UNLIMITED = 10**9  # labels
MEASURED = 1 / 6  # of a limited number of labels
OVERHEAD = 0.01  # s, of a label at least
FEW, LATELY = 5, 20  # labels that tell how long one takes: at least, or two of each worker, and the last ones
HOW = {"device", "accelerate", "save_minutes", "max_minutes"}  # settings of a training that leave its result the same
INDIFFERENT = {  # settings that may change when a loop goes on
    "aim": ("forces", "energy", "stress"),
    "budget": ("labels", "minutes", "rounds"),
    "reference": ("python", "workers", "threads", "label_minutes", "memory"),
    "training": ("epochs", "minutes", *HOW),
}


class LoopState:
    """`state.json`; written anew after everything that was done."""

    def __init__(self, config: LearnConfig, structures: Sequence[Atoms] = ()):
        """Raises ConfigError where the loop in this folder was begun with other settings."""
        self.path = config.folder / "state.json"
        self.rounds: list[dict[str, Any]] = []
        self.decided: dict[str, int] = {}  # by the clock, once
        self.last_minutes = 0.0  # of trainings at the end, which leave the rounds their share
        self.finished: dict[str, Any] | None = None  # what was returned, and the settings that ended it
        self.seconds, self._since = 0.0, time.monotonic()
        self._settings = {**settings_that_count(config), "files": [digest_of(atoms) for atoms in structures]}
        if self.path.exists():
            known = read_state(self.path)
            refuse_others(config, known["settings"], self._settings)
            self.rounds, self.seconds, self.finished = (known[name] for name in ("rounds", "seconds", "finished"))
            self.decided, self.last_minutes = known["decided"], known["last_minutes"]

    @property
    def minutes(self) -> float:
        """Since the loop was begun, without the time between a stop and when it went on."""
        return (self.seconds + time.monotonic() - self._since) / 60

    def once(self, what: str, decide: Callable[[], int]) -> int:
        """A number that depends on the clock or on what there is now, as it was when it was decided first."""
        if what not in self.decided:
            self.decided[what] = decide()
            self.save()
        return self.decided[what]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While another loop runs, which has its own clock."""
        self.save()
        yield
        self._since = time.monotonic()

    def save(self) -> None:
        self.seconds, self._since = 60 * self.minutes, time.monotonic()
        content = {"version": VERSION, "seconds": self.seconds, "settings": self._settings, "rounds": self.rounds}
        content |= {"finished": self.finished, "decided": self.decided, "last_minutes": self.last_minutes}
        write_atomically(self.path, json.dumps(content, indent=1).encode())


class Loop(NamedTuple):
    """What all its parts need."""

    config: LearnConfig
    structures: list[Atoms]
    labeller: Labeller
    state: LoopState
    report: Callable[[str], None]

    @property
    def conditions(self) -> list[Condition]:
        return conditions_of(self.config.conditions, self.structures)

    @property
    def labels_left(self) -> int:
        budget = self.config.budget.labels
        return UNLIMITED if budget is None else budget - self.labeller.labelled.count

    @property
    def labels_for_rounds(self) -> int:
        """Without those that measure the potential in the end: where they are limited a sixth, and one a condition."""
        budget = self.config.budget.labels
        if budget is None:
            return UNLIMITED
        return self.labels_left - max(round(MEASURED * budget), len(self.conditions) + 1)

    def labels_within(self, share: float) -> int:
        """How many labels this share of the minutes allows."""
        return int(60 * share * self.config.budget.minutes * self.config.reference.workers / self.seconds_of_label)

    @property
    def seconds_of_label(self) -> float:
        """Of one of the structures, on the mean, each by those of its size."""
        taken: dict[int, list[float]] = {}
        for frame in self.labeller.labelled.frames.values():
            taken.setdefault(len(frame), []).append(frame.info[SECONDS])
        few = max(FEW, 2 * self.config.reference.workers)
        usual = {size: usual_seconds(seconds, few) for size, seconds in taken.items()}
        known = [usual[len(atoms)] for atoms in self.structures if len(atoms) in usual]
        return max(float(np.mean(known or list(usual.values()))), OVERHEAD)


def usual_seconds(taken: Sequence[float], few: int) -> float:
    """Of labels one after another: the usual of late, but the fastest of the first few, which start something up."""
    return float(np.median(taken[-LATELY:])) if len(taken) >= few else min(taken)


def read_state(path: Path) -> dict[str, Any]:
    """Raises ConfigError for what is damaged or of another version."""
    try:
        known = json.loads(path.read_bytes())
        version = known["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}): begin anew under another name of out; the labels are in "
            f"{path.with_name('frames.xyz')}"
        ) from None
    if version != VERSION:
        raise ConfigError(f"{path} is of version {version!r}; expected {VERSION}: end that loop as it was begun")
    return known


def digest_of(atoms: Atoms) -> str:
    """Of a structure and what belongs to it, as a file has it."""
    plain = [atoms.numbers.tolist(), *(x.round(6).tolist() for x in (atoms.positions, atoms.cell.array))]
    plain += [atoms.pbc.tolist(), atoms.get_initial_charges().tolist(), atoms.get_initial_magnetic_moments().tolist()]
    plain += [str(atoms.info.get(name)) for name in ("charge", "spin")]
    plain += [type(each).__name__ for each in atoms.constraints]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]


def what_ends(config: LearnConfig) -> dict[str, Any]:
    """The settings that say when a loop ends, and how its potential is trained."""
    values = config.model_dump(mode="json", include={"aim", "budget"})
    return {**values, "training": config.training.model_dump(mode="json", exclude_unset=True, exclude=HOW)}


def settings_that_count(config: LearnConfig) -> dict[str, Any]:
    """Of the settings those that may not change, as JSON has them."""
    values = config.model_dump(mode="json", exclude={"out", "refuse_flaws"})
    values["training"] = config.training.model_dump(mode="json", exclude_unset=True)
    if values["pretraining"] and values["pretraining"]["reference"]:
        values["pretraining"]["reference"] = leaving_out(values["pretraining"]["reference"], INDIFFERENT["reference"])
    return values | {section: leaving_out(values[section], names) for section, names in INDIFFERENT.items()}


def leaving_out(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def refuse_others(config: LearnConfig, known: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError that names the first setting that is another; one that was not there yet had its default."""
    usual = settings_that_count(LearnConfig(structures=config.structures, reference=config.reference.calculator))
    for section in now:
        old, new = known.get(section, usual.get(section)), now[section]
        if isinstance(old, dict):
            old = {**(usual[section] or {}), **old}
        if old == new:
            continue
        name, before, after = section, old, new
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            name, before, after = f"{section}.{key}", old.get(key), new.get(key)
        raise ConfigError(
            f"setting {name!r} is {after!r}, but the loop in {config.folder} was begun with {before!r}: give that "
            "again to go on, or another name of out"
        )
