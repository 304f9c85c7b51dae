"""Dynamics of a round with the potential so far: where they go, and where they are stopped as it knows no further."""

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.errors import AccelerationWarning, MDError, OutOfTime, OutputError
from segnn_ase.base.files import write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.learn.labelled import read_whole
from segnn_ase.learn.settings import AimConfig, ConditionsConfig, LearnConfig
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.train.rollouts import usual_timestep

LOOKS, APART = 40, 20.0  # frames kept of a run, at least, and fs between them, at most
TRUSTED = 1 / 3, 3.0  # how far a few measured errors correct what a potential expects
SHARE = 0.1  # of the minutes of a loop, for the dynamics of a round, and for those with the last potential
FRICTION = 0.01  # 1/fs
OUTSIDE, LONGEST = 50.0, 200.0  # fs in a row beyond what is known, before it is stopped: half a slow vibration, or two


class Condition(NamedTuple):
    """Where one of the structures is to be simulated."""

    structure: int
    temperature: float  # K
    pressure: float | None  # GPa; None: the cell stays

    @property
    def name(self) -> str:
        pressed = "" if self.pressure is None else f", {self.pressure:g} GPa"
        return f"structure {self.structure + 1}, {self.temperature:g} K{pressed}"


class Planned(NamedTuple):
    """A run to be made."""

    condition: Condition
    number: int  # among those at this condition
    start: Atoms
    steps: int
    timestep: float  # fs
    seed: int
    minutes: float  # that it may take
    outside: float  # fs in a row beyond what is known, before it is stopped
    npt_cell: str = "isotropic"  # what moves at a pressure

    @property
    def key(self) -> str:
        c = self.condition
        pressed = "" if c.pressure is None else f"-{c.pressure:g}GPa"
        return f"s{c.structure + 1}-{c.temperature:g}K{pressed}-{self.number + 1}"


class Ran(NamedTuple):
    """What became of it."""

    planned: Planned
    steps: int  # that were made
    reason: str | None  # why it was stopped
    frames: list[Atoms]  # on the way, evenly
    ends: list[Atoms]  # the last good one and the refused one, where it was stopped
    seconds: float = 0.0  # that it took

    @property
    def is_late(self) -> bool:
        """Whether its share of the time was over before its steps were made."""
        return self.reason is None and self.steps < self.planned.steps


def minutes_of_all(ran: Sequence[Ran], picoseconds: float) -> float:
    """That as many runs of this length take, by the steps of these."""
    made = sum(run.steps * run.planned.timestep for run in ran)  # fs
    return sum(run.seconds for run in ran) / 60 * len(ran) * 1000 * picoseconds / made if made else 0.0


def conditions_of(config: ConditionsConfig, structures: Sequence[Atoms]) -> list[Condition]:
    """Every temperature, coldest first, at every pressure, for every structure."""
    return [
        Condition(n, temperature, pressure)
        for n, atoms in enumerate(structures)
        for pressure in (config.pressure if config.pressure and atoms.pbc.all() else (None,))
        for temperature in sorted(config.temperature)
    ]


def largest_uncertainty(calculator: SEGNNCalculator, aim: AimConfig, too_sure: float = 1.0) -> float | None:
    """Of a force component, eV/Å, at which dynamics stop; None where the potential does not say.

    too_sure: measured over expected errors, of the potential before.
    """
    uncertainty = calculator._potentials[0].uncertainty
    if uncertainty is None or not np.isfinite(uncertainty.beta):
        return None
    return aim.uncertainty * max(1e-3 * aim.forces / float(np.clip(too_sure, *TRUSTED)), uncertainty.beta)


def patience(aim: AimConfig, rounds: Sequence[dict]) -> float:
    """fs in a row beyond what is known, before dynamics are stopped: longer where the errors measured in the last of
    these rounds were below the aim, as there was more to learn than to lose."""
    measured = rounds[-1]["forces"] if rounds else None
    return min(OUTSIDE * max(aim.forces / measured, 1.0), LONGEST) if measured else OUTSIDE


def explore(planned: Planned, calculator: SEGNNCalculator, folder: Path, limit: float | None) -> Ran:
    """Run it, or go on with it, or read what became of it. limit: see `largest_uncertainty`."""
    prefix = folder / planned.key
    result = prefix.with_name(f"{prefix.name}.json")
    if not result.exists():
        begin = time.perf_counter()
        steps, reason = _simulated(planned, calculator, prefix, limit)
        found = {"steps": steps, "reason": reason, "seconds": time.perf_counter() - begin}
        write_atomically(result, json.dumps(found).encode())
    return what_became_of(planned, folder)


def what_became_of(planned: Planned, folder: Path) -> Ran:
    """Of a run that was made."""
    prefix = folder / planned.key
    found = json.loads(prefix.with_name(f"{prefix.name}.json").read_text())
    frames = read_whole(Path(f"{prefix}.xyz"))[1:]  # without the start, which may have been learned
    names = ("last_good", "refused")
    ends = [frame for name in names for frame in read_whole(prefix.with_name(f"{prefix.name}_{name}.extxyz"))]
    return Ran(planned, found["steps"], found["reason"], frames, ends if found["reason"] else [], found["seconds"])


def _simulated(
    planned: Planned, calculator: SEGNNCalculator, prefix: Path, limit: float | None
) -> tuple[int, str | None]:
    """Steps made, and why it was stopped."""
    atoms = planned.start.copy()
    atoms.calc = calculator
    config = settings_of_run(planned, prefix, limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccelerationWarning)  # said when the training began
            return run_md(atoms, config, progress=False).steps, None
    except OutOfTime:  # it goes on in the next round
        return int(read_whole(Path(f"{prefix}.xyz"))[-1].info["step"]), None
    except MDError as error:
        if isinstance(error.__cause__, OutputError):
            raise
        frames = read_whole(Path(f"{prefix}_last_good.extxyz"))
        return (int(frames[0].info["step"]) if frames else 0), str(error)


def settings_of_run(planned: Planned, prefix: Path, limit: float | None) -> MDConfig:
    condition, every = planned.condition, max(min(planned.steps // LOOKS, round(APART / planned.timestep)), 1)
    heat: dict[str, Any] = {"ensemble": "langevin", "friction": FRICTION}
    if condition.pressure is not None:
        heat = {"ensemble": "npt", "pressure": condition.pressure, "npt_cell": planned.npt_cell}
    return MDConfig(
        **heat,
        timestep=planned.timestep,
        steps=planned.steps,
        temperature=condition.temperature,
        velocities="maxwell",
        seed=planned.seed,
        log=f"{prefix}.csv",
        log_every=every,
        trajectory=f"{prefix}.xyz",
        save_every=every,
        restart=f"{prefix}.npz",
        max_temperature=None if condition.temperature > 3000 else 10_000.0,
        stop_outside_domain=True,
        outside_steps=round(planned.outside / planned.timestep),
        max_forces_std=limit,
        max_minutes=planned.minutes,
    )


def plan_runs(
    config: LearnConfig,
    structures: Sequence[Atoms],
    round_: int,
    before: Sequence[Ran],
    picoseconds: float,
    minutes: float,
    outside: float = OUTSIDE,
) -> list[Planned]:
    """The runs of a round, each with its share of the minutes.

    Of each condition the first goes on where that of the round before ended well, the second from where the second at
    the hottest one did or, where that was stopped, from where it was last at home: labels that were made since let it
    go further. Others, and all that have nowhere to go on from, begin with the structure.
    """
    conditions, found = conditions_of(config.conditions, structures), []
    minutes /= len(conditions) * config.conditions.starts
    ended = {
        (run.planned.condition, run.planned.number): last_known(run)
        for run in before
        if run.reason is None or run.planned.number == 1
    }
    for n, condition in enumerate(conditions):
        origin = structures[condition.structure]
        timestep = config.conditions.timestep or usual_timestep(origin)
        hottest = max((c for c in conditions if c[::2] == condition[::2]), key=lambda c: c.temperature)
        for number in range(config.conditions.starts):
            source = None if number > 1 else (hottest if number else condition, number)
            found.append(
                Planned(
                    condition,
                    number,
                    placed_as(origin, ended.get(source)),  # type: ignore[arg-type]
                    config.steps_of(timestep, picoseconds),
                    timestep,
                    int(np.random.default_rng([config.seed, round_, n, number]).integers(2**31)),
                    minutes,
                    outside,
                    config.conditions.npt_cell,
                )
            )
    return found


def last_known(run: Ran) -> Atoms | None:
    """The last frame before it left what is known; None where there is none."""
    left = 0 if run.reason is None else round(run.planned.outside / run.planned.timestep)
    known = [frame for frame in run.frames if frame.info["step"] <= run.steps - left]
    return known[-1] if known else None


def placed_as(origin: Atoms, frame: Atoms | None) -> Atoms:
    """The structure, with what belongs to it, at the positions of a frame of its dynamics."""
    atoms = origin.copy()
    if frame is not None:
        atoms.set_cell(frame.cell)
        atoms.set_positions(frame.positions, apply_constraint=False)
    return atoms
