"""A potential to begin with: of a cheaper reference, learned by a loop of its own, or one that is there.

It knows the shapes of molecules and crystals, and most of how they vibrate. Then labels are needed for the difference
alone, which is smooth, and the first of them are of frames that its dynamics visit, of other conformers too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from segnn_ase.base.errors import ConfigError
from segnn_ase.base.files import write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.explore import SHARE, Ran, explore, largest_uncertainty, plan_runs
from segnn_ase.learn.settings import BudgetConfig, LearnConfig
from segnn_ase.learn.state import Loop, LoopState
from segnn_ase.model.more_elements import named
from segnn_ase.store.model_file import load_committee, load_potential, settings_of
from segnn_ase.store.shipped import find_model
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import finetune, train

COARSER = 2.0  # times the aim for forces: where the rounds of the cheaper reference end, as its last training has more
FOR_TUNING = {"epochs", "minutes", "learning_rate", "freeze"}  # settings of trainings that go on from the potential
HOTTER, HOTTEST = 2, 1000  # times the highest temperature, and K: where molecules are sampled besides
LEAST = 0.1  # of the minutes, for the loop itself, where these were lowered since
DECIDED, TOOK = "seconds of pretraining", "seconds that pretraining took"


def model_to_begin_with(config: LearnConfig, structures: Sequence[Atoms]) -> Path | None:
    """The file of a potential that is given, or of what was kept of it; None where none is. Raises ConfigError for one
    that cannot be, FileNotFoundError and ModelFileError."""
    if config.pretraining is None or config.pretraining.model is None:
        return None
    if config.pretrained.exists():
        return config.pretrained
    found = find_model(config.pretraining.model)
    refuse_model(str(found), structures)
    return found


def in_effect(config: LearnConfig, state: LoopState, begin: Path | None) -> LearnConfig:
    """The settings of the loop itself: the minutes that pretraining leaves, or the network of the potential to begin
    with, which is kept in the folder."""
    given = config.pretraining
    if given is None:
        return config
    if begin is None:
        whole = config.budget.minutes
        taken = state.decided.get(DECIDED, 60 * given.share * whole) / 60
        budget = config.budget.model_copy(update={"minutes": max(whole - taken, LEAST * whole)})
        return config.model_copy(update={"budget": budget})
    if begin != config.pretrained:
        write_atomically(config.pretrained, begin.read_bytes())
    return config.model_copy(update={"model": settings_of(load_potential(config.pretrained).config)})


def refuse_model(path: str, structures: Sequence[Atoms]) -> None:
    """Raise ConfigError for what a loop cannot begin with."""
    potentials = load_committee(path).potentials
    if len(potentials) > 1:
        raise ConfigError(f"pretraining has {path!r} of {len(potentials)} potentials; expected one: give a member")
    if not potentials[0].config.smooth:
        raise ConfigError(f"pretraining has {path!r}, whose energy jumps at the cutoff: nothing can move by it")
    if potentials[0].domain is None:
        raise ConfigError(
            f"pretraining has {path!r}, which does not say what it was trained on, so that nothing tells where its "
            "dynamics should stop; expected a model that segnn train, finetune or learn wrote"
        )
    there = {int(z) for atoms in structures for z in atoms.numbers}
    if unknown := sorted(there - set(potentials[0].species)):
        raise ConfigError(
            f"pretraining has {path!r}, which does not know {named(unknown)}: expected one of all elements of the "
            "structures; give one, or a reference"
        )


def pretrain(loop: Loop, learn: Callable[..., Any]) -> None:
    """Learn the cheaper reference by a loop of its own, where that is asked for and not done; its clock is its own."""
    given, state = loop.config.pretraining, loop.state
    if given is None or given.reference is None or DECIDED in state.decided:
        return
    minutes = given.share / (1 - given.share) * loop.config.budget.minutes
    are_molecules = not any(atoms.pbc.any() for atoms in loop.structures)
    loop.report(f"pretraining: {minutes:.1f} minutes by {given.reference.calculator}")
    try:
        with state.paused():
            settings = loop_of_pretraining(loop.config, minutes, are_molecules=are_molecules)
            found = learn(settings, progress=loop.labeller.progress)
    except ConfigError as error:
        raise ConfigError(f"pretraining: {error}") from error
    state.once(TOOK, lambda: round(60 * found.minutes))
    state.once(DECIDED, lambda: round(60 * minutes))
    loop.report(f"pretraining ends: {found.labels} labels, {found.minutes:.1f} minutes; {found.report}")


def minutes_of_pretraining(state: LoopState) -> float:
    """That it took."""
    return state.decided.get(TOOK, 0) / 60


def loop_of_pretraining(config: LearnConfig, minutes: float, *, are_molecules: bool) -> LearnConfig:
    """Of the same structures at the same conditions; molecules are heated, too, to see their conformers."""
    training = config.training.model_dump(exclude_unset=True, exclude=FOR_TUNING)
    values = config.model_dump(include={"structures", "conditions", "start", "model", "refuse_flaws", "seed"})
    hottest = HOTTER * max(config.conditions.temperature)
    if are_molecules and hottest <= HOTTEST:
        values["conditions"]["temperature"] = [*config.conditions.temperature, hottest]
    assert config.pretraining is not None
    return LearnConfig(
        **values,
        out=str(config.pretrained),
        reference=config.pretraining.reference,
        aim={"forces": COARSER * config.aim.forces, "uncertainty": max(config.aim.uncertainty / COARSER, 1.0)},
        budget=BudgetConfig(minutes=minutes),
        training=training,
    )


def dynamics_of_pretrained(loop: Loop, structures: Sequence[Atoms]) -> tuple[list[Ran], SEGNNCalculator]:
    """At every condition, and the potential; they are made once."""
    config, folder = loop.config, loop.config.folder / "round-000"
    folder.mkdir(exist_ok=True)
    calculator = SEGNNCalculator(str(config.pretrained), device=config.training.device, domain="ignore")
    picoseconds, minutes = config.conditions.picoseconds, SHARE * config.budget.minutes
    if not (config.folder / "start.xyz").exists():
        loop.report(f"dynamics of {picoseconds:g} ps with the pretrained potential")
    limit = largest_uncertainty(calculator, config.aim)
    planned = plan_runs(config, structures, 0, (), picoseconds, minutes)
    return [explore(each, calculator, folder, limit) for each in planned], calculator


def train_from(config: LearnConfig, training: TrainConfig, *, progress: bool) -> dict:
    """From scratch, or from the pretrained potential, where there is one; the errors on every set."""
    if config.pretraining is None:
        return train(training, progress=progress)
    return finetune(str(config.pretrained), training, progress=progress)
