"""`learn`: rounds of training, dynamics and labels, until dynamics run at every condition and are right.

Everything that is decided is a file before it is acted upon, and all else follows from these files, the settings and
the reference: wherever a loop was killed, the same call goes on, asks for no label that it has, and ends with the same
frames (where the clock has not ended a run of dynamics, learned a cheaper reference, or told how many cheap labels fill
the last training).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.base.files import existing_file
from segnn_ase.base.locks import only_writer
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.frames import check_atoms
from segnn_ase.learn.choice import chosen, drawn
from segnn_ase.learn.explore import (
    SHARE,
    Ran,
    explore,
    largest_uncertainty,
    minutes_of_all,
    patience,
    plan_runs,
    what_became_of,
)
from segnn_ase.learn.finish import Learned, finish_loop
from segnn_ase.learn.labelled import CONDITION, KEY, LabelledFrames, decided, read_whole
from segnn_ase.learn.labeller import Labeller
from segnn_ase.learn.pool import LabelPool
from segnn_ase.learn.pretraining import DECIDED, dynamics_of_pretrained, in_effect, model_to_begin_with, pretrain
from segnn_ase.learn.references import REFERENCES
from segnn_ase.learn.report import passed_of
from segnn_ase.learn.rounds import (
    OFTEN,
    SHORT,
    Rounds,
    calculator_of_round,
    epochs_within,
    errors_on,
    is_good,
    round_folder,
    seems_good,
    told_of_runs,
    too_sure,
    usable,
)
from segnn_ase.learn.settings import LearnConfig, ReferenceConfig
from segnn_ase.learn.starts import displaced_frames, first_frames, first_labels
from segnn_ase.learn.state import Loop, LoopState, what_ends
from segnn_ase.model.settings import model_config
from segnn_ase.train.report import printer

PRETRAINED = 2  # rounds that pretraining is worth
FIRST_PS = 0.5  # of dynamics in the first round; twice as long in each that follows
FOR_ROUNDS = 0.55  # of the minutes; the rest is for the last training and what it is worth
LABELS, GROWTH, DOUBLED = 24, 0.4, 1.0  # of a round, at least, and of the frames before, where epochs are many or not
FOR_LABELS, FEWEST = 0.15, 8  # of the minutes, for the labels of a round, and how many these are at least
FEWER = "fewer picoseconds, starts or conditions, or more minutes"
LEAST = 3  # labels that a round needs
SHARE_DRAWN = 1 / 3  # of the labels of a round, for the error
DRAWN = "drawn", "drawn_more"  # files of their frames


def learn(config: LearnConfig, *, progress: bool = True) -> Learned:
    """Learn a potential from structures and a reference, and write it to config.out; the same call goes on.

    The folder beside it has every labelled frame (`frames.xyz`), what each round did, and the state. Raises ConfigError
    and FileNotFoundError for settings and structures that cannot be used, LabelError where the reference does not work
    or answers otherwise than in the beginning, DataError where the doctor refuses its labels.
    """
    expect(isinstance(config, LearnConfig), "config", config, "a LearnConfig, as by LearnConfig.parse(a dict)")
    structures, folder, report = read_structures(config), config.folder, printer(progress)
    with only_writer([folder / "state.json"]):
        if Path(config.out).exists() and not (folder / "state.json").exists():
            told = "which exists and is of no loop to go on with: rename or remove it"
            raise ConfigError(f"out is {config.out!r}, {told}")
        state = LoopState(config, structures)
        begin = model_to_begin_with(config, structures)
        labelled = LabelledFrames(folder)
        labelled.give(config.frames)  # before anything is settled
        state.save()
        config = in_effect(config, state, begin)
        there = Path(config.out).exists()
        if there and state.finished and state.finished["settings"] == what_ends(config):
            report("this loop is finished: raise its budget or lower its aim to go on")
            return Learned(**state.finished["learned"])
        for path, height in small_cells(config, structures):
            report(
                f"warning: {path} has a cell of {height:.1f} Å, less than twice the cutoff: an atom feels its own "
                "images; a larger supercell is better"
            )
        with LabelPool(config.reference, folder / "workers") as pool:
            labeller = Labeller(pool, labelled, progress=progress)
            loop = Loop(config, structures, labeller, state, report)
            return finish_loop(loop, run_rounds(loop))


def read_structures(config: LearnConfig) -> list[Atoms]:
    """The last frame of each file, with its constraints, charges and moments."""
    found = []
    for path in config.structures:
        existing_file(path, "structures")
        try:
            atoms = only_last(path)
        except Exception as error:  # ASE raises anything on a bad file
            told = f"which ASE cannot read: {type(error).__name__}: {error}"
            raise ConfigError(f"structures has {path!r}, {told}") from error
        check_atoms(atoms, path)
        if len(atoms) < 2:
            told = "expected two or more, as one alone does not move: repeat the cell"
            raise ConfigError(f"structures has {path!r} of one atom; {told}")
        for reference in references_of(config):
            refuse_unheard(reference.calculator, atoms, path)
        atoms.calc = None
        atoms.set_momenta(np.zeros((len(atoms), 3)), apply_constraint=False)
        found.append(atoms)
    held = [path for path, atoms in zip(config.structures, found, strict=True) if atoms.constraints and atoms.pbc.all()]
    if config.conditions.pressure and held:
        raise ConfigError(
            f"conditions.pressure is given, but {held[0]!r} has constraints, which hold the cell: omit one"
        )
    if config.conditions.pressure and not any(atoms.pbc.all() for atoms in found):
        raise ConfigError("conditions.pressure is given, but no structure is periodic in three directions: omit it")
    return found


def references_of(config: LearnConfig) -> list[ReferenceConfig]:
    """The one that is learned, and the cheaper one that is learned before, where there is one."""
    first = config.pretraining.reference if config.pretraining else None
    return [config.reference] if first is None else [config.reference, first]


def small_cells(config: LearnConfig, structures: Sequence[Atoms]) -> list[tuple[str, float]]:
    """Files of periodic structures that are thinner than the cutoff's reach on both sides, and how thin, Å."""
    found = []
    for path, atoms in zip(config.structures, structures, strict=True):
        heights = [1 / float(np.linalg.norm(row)) for row in atoms.cell.reciprocal()[atoms.pbc]]
        if heights and min(heights) < 2 * model_config(**config.model).cutoff:
            found.append((path, min(heights)))
    return found


def refuse_unheard(reference: str, atoms: Atoms, path: str) -> None:
    """Raise ConfigError for a charge, multiplicity, moments or periodicity that a reference we know by name ignores."""
    if reference not in REFERENCES:
        return
    known = REFERENCES[reference]
    if atoms.pbc.any() and not known.periodic:
        raise ConfigError(
            f"structures has {path!r} with pbc = {atoms.pbc.tolist()}, but {reference!r} is for molecules: set pbc to "
            "false there, or take another reference"
        )
    if "spin" in known.told and "spin" not in atoms.info and np.any(atoms.get_initial_magnetic_moments()):
        raise ConfigError(
            f"structures has {path!r} with magnetic moments, of which {reference!r} is told the multiplicity alone: "
            "give that as spin in atoms.info, such as 3 for a triplet"
        )
    total = float(atoms.get_initial_charges().sum())
    if abs(total) > 0.5 and "charge" not in atoms.info and not known.sums_charges:
        what = "give charge in atoms.info instead" if "charge" in known.told else "take another reference"
        raise ConfigError(
            f"structures has {path!r} with initial charges that add up to {total:g}, which {reference!r} does not "
            f"read: {what}"
        )
    if "spin" in known.told and atoms.info.get("spin", 1) < 1:
        raise ConfigError(
            f"structures has {path!r} with spin = {atoms.info['spin']}; expected the multiplicity, 1 for a singlet"
        )
    for name, nothing in (("charge", 0), ("spin", 1)):
        value = atoms.info.get(name, nothing)
        if value not in (nothing, 0) and name not in known.told:
            raise ConfigError(
                f"structures has {path!r} with {name} = {value}, which {reference!r} knows nothing of: remove it from "
                "the file, or take another reference"
            )


def only_last(path: str) -> Atoms:
    found = ase.io.read(path, -1)
    return found[-1] if isinstance(found, list) else found


def run_rounds(loop: Loop) -> Rounds:
    """Rounds until it is good enough or the budget is spent."""
    config = loop.config
    loop.report(f"first labels by {config.reference.calculator}")
    structures, keys = first_labels(loop)
    ran, frames = dynamics_before(loop, structures, keys)
    keys += [frame.info[KEY] for frame in frames]
    held: list[str] = []
    for number in range(1, config.budget.rounds + 1):
        begun = (round_folder(config, number) / "train.xyz").exists()
        if not begun and (why := spent(loop)):
            return Rounds(why, structures, keys, held, ran)
        ran, new, good = one_round(loop, number, structures, [*keys, *held], ran)
        keys += held
        held = [key for key in new if "/drawn/" in key]
        keys += [key for key in new if key not in held]
        keys += tried_after(config, number)
        if good and number >= len(loop.state.rounds) and not ended_after(loop, number):
            return Rounds("", structures, keys, held, ran)
    return Rounds(f"{config.budget.rounds} rounds are over (budget.rounds)", structures, keys, held, ran)


def dynamics_before(loop: Loop, structures: list[Atoms], keys: list[str]) -> tuple[list[Ran], list[Atoms]]:
    """Those of a pretrained potential, and frames that are labelled first, as a round chooses them, or displaced
    structures where there are not as many. keys: of frames that are learned anyway."""
    config = loop.config
    if config.pretraining is None:
        return [], first_frames(loop, lambda count: displaced_frames(structures, count, config))
    pretrain(loop, learn)
    begins = not (config.folder / "start.xyz").exists()
    ran, calculator = dynamics_of_pretrained(loop, structures)
    known = [frame for frame in loop.labeller.labelled.of(keys) if frame.info[KEY] not in loop.labeller.labelled.given]

    def make(count: int) -> list[Atoms]:
        found = chosen(ran, known, count, 0, calculator, few=is_limited(loop))
        return found + displaced_frames(structures, count - len(found), config)

    frames = first_frames(loop, make)
    of_dynamics = [frame for frame in frames if CONDITION in frame.info]
    if begins and of_dynamics:
        off = errors_on(of_dynamics, calculator)["forces"]
        loop.report(f"forces of the pretrained potential are off by {off:.0f} meV/Å on {len(of_dynamics)} frames")
    return ran, frames


def tried_after(config: LearnConfig, number: int) -> list[str]:
    """Keys of frames that a last training after this round learned besides, and of those that measured its potential,
    when the loop goes on from there."""
    places = [p for name in ("more", "drawn") for p in sorted(config.folder.glob(f"final-{number:03d}-*/{name}.xyz"))]
    return [frame.info[KEY] for path in places for frame in read_whole(path)]


def ended_after(loop: Loop, number: int) -> bool:
    """Whether the loop has ended after this round, with other settings: the same potential again would tell nothing."""
    finished = loop.state.finished
    if finished is None:
        return False
    return finished.get("rounds") == number and finished["settings"] != what_ends(loop.config)


def spent(loop: Loop) -> str:
    """Which budget is spent, in words."""
    budget = loop.config.budget
    if loop.labels_for_rounds <= max(len(loop.conditions), LEAST):  # and a control
        told = f"the last {loop.labels_left} are kept for the final measurement"
        return f"{loop.labeller.labelled.count} of {budget.labels} labels are made, {told} (budget.labels)"
    minutes = loop.state.minutes - loop.state.last_minutes
    if minutes <= FOR_ROUNDS * budget.minutes:
        return ""
    late = bool(loop.state.rounds) and loop.state.rounds[-1]["late"]
    told = f"; dynamics were too slow for their share of it: {FEWER}" if late else ""
    before = " after pretraining" if DECIDED in loop.state.decided else ""
    return f"{minutes:.0f} of {budget.minutes:g} minutes{before} are over, the rest is for the last training{told}"


def one_round(
    loop: Loop, number: int, structures: list[Atoms], keys: Sequence[str], before: list[Ran]
) -> tuple[list[Ran], list[str], bool]:
    """Train, run, measure, label; returns the runs, the keys of new frames, and whether it is good enough."""
    config, labeller, state = loop.config, loop.labeller, loop.state
    folder = round_folder(config, number)
    folder.mkdir(exist_ok=True)
    few = is_limited(loop)
    before_this = number if config.pretraining is None else number + PRETRAINED
    picoseconds = picoseconds_of(config.conditions.picoseconds, before_this, few)
    minutes = SHARE * config.budget.minutes
    outside = patience(config.aim, state.rounds[: number - 1])
    planned = plan_runs(config, structures, number, before, picoseconds, minutes, outside)
    known = number <= len(state.rounds)
    if known:
        ran, row = [what_became_of(each, folder) for each in planned], state.rounds[number - 1]
        found = [frame.info[KEY] for name in (*DRAWN, "chosen") for frame in read_whole(folder / f"{name}.xyz")]
        return ran, found, is_good(config, ran, row)
    frames = usable(labeller.labelled.of(keys))
    loop.report(f"round {number}: training on {len(frames)} frames, then {len(planned)} runs of {picoseconds:g} ps")
    calculator = calculator_of_round(loop, frames, folder)
    limit = largest_uncertainty(calculator, config.aim, too_sure(state.rounds))
    ran = [explore(each, calculator, folder, limit) for each in planned]
    needed = minutes_of_all(ran, config.conditions.picoseconds)
    if needed > minutes:
        asked = f"{len(ran)} runs of {config.conditions.picoseconds:g} ps take {needed:.0f} minutes with this potential"
        loop.report(f"warning: {asked}, a round has {minutes:.1f} for them: {FEWER}")
    budget = state.once(f"labels of round {number}", lambda: labels_of_round(loop, frames))
    row = {"round": number, "frames": len(frames), "picoseconds": picoseconds, **told_of_runs(ran)}
    measured, row, good = measured_on_dynamics(loop, ran, calculator, row, budget)
    found = list(measured)
    if not good:
        most = budget - len(measured)
        more = decided(folder / "chosen.xyz", lambda: chosen(ran, measured, most, number, calculator, few=few))
        labeller.label(more)
        found += more
    found = [frame.info[KEY] for frame in found]
    labeller.control(number, found)
    state.rounds.append({**row, "labels": labeller.labelled.count, "minutes": round(state.minutes, 2)})
    state.save()
    loop.report(told_of_round(state.rounds[-1]))
    return ran, found, good


def measured_on_dynamics(
    loop: Loop, ran: list[Ran], calculator: SEGNNCalculator, row: dict[str, Any], budget: int
) -> tuple[list[Atoms], dict[str, Any], bool]:
    """Frames that are drawn at random, the row of a round with the errors on them, and whether it is good; where it
    seems to be by a share of the labels of the round, it is measured on as many as these are, `LABELS` at most, but
    one of each condition."""
    config, labeller, number = loop.config, loop.labeller, row["round"]

    first, second = (round_folder(config, number) / f"{name}.xyz" for name in DRAWN)

    def asked_for(path: Path, count: int, known: list[Atoms]) -> list[Atoms]:
        but = [frame.info[KEY] for frame in known]
        new = decided(path, lambda: drawn(ran, count - len(known), number, config.seed, but=but))
        labeller.label(new)
        return [*known, *new]

    def told(frames: list[Atoms]) -> dict[str, Any]:
        return row | errors_on(labeller.labelled.of([frame.info[KEY] for frame in frames]), calculator)

    conditions = len(loop.conditions)
    share = max(min(round(SHARE_DRAWN * budget), LABELS), min(max(conditions, 2), max(budget // 2, 2)))
    measured = asked_for(first, share, [])
    row = told(measured)
    if second.exists() or seems_good(config, ran, row):
        measured = asked_for(second, max(share, min(budget, max(LABELS, conditions))), measured)
        row = told(measured)
    return measured, row, is_good(config, ran, row)


def is_limited(loop: Loop) -> bool:
    """Whether labels were in the beginning."""
    return bool(loop.state.once("few labels", lambda: int(loop.config.budget.labels is not None)))


def labels_of_round(loop: Loop, frames: Sequence[Atoms]) -> int:
    """As the settings say, or as many as a training of these frames and the budget make worth while."""
    config, most, limit = loop.config, loop.config.budget.round_labels, loop.config.budget.labels
    if most is None and limit is not None:
        most = max(limit // 6, LEAST + 1)
    if most is None:
        epochs = epochs_within(SHORT * config.budget.minutes, frames, config.model, config.training)
        most = max(LABELS, round((DOUBLED if epochs >= OFTEN else GROWTH) * len(frames)))
    most = max(most, 2 * len(loop.conditions))
    return min(most, loop.labels_for_rounds - 1, max(loop.labels_within(FOR_LABELS), FEWEST))  # one is a control


def picoseconds_of(asked: float, number: int, few: bool) -> float:
    """Of the dynamics of a round; where labels are few there are few rounds, and they begin with longer ones."""
    first = max(FIRST_PS, asked / 4) if few else FIRST_PS
    return min(first * 2 ** (number - 1), asked)


def told_of_round(row: dict[str, Any]) -> str:
    """In two lines or more."""
    error = "no frames to measure its error"
    if row["forces"] is not None:
        scatter = "" if row["scatter"] is None else f" ± {row['scatter']:.1f}"
        off = f"{row['forces']:.1f}{scatter} meV/Å, {row['energy']:.2f} meV/atom"
        error = f"errors on {row['drawn']} of their frames: {off}"
    lines = [
        f"round {row['round']}: {passed_of(row)} runs passed; {error}; "
        f"{row['labels']} labels, {row['minutes']:.1f} minutes"
    ]
    ends = [("stopped", stop) for stop in row["stops"]] + [("out of time", late) for late in row["late"]]
    return "\n".join([*lines, *(f"  {told}: {end}" for told, end in ends)])
