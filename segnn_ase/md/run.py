"""Molecular dynamics on ASE's integrators: guards, and a restart that goes on bit for bit.

Every output is appended in whole records. The restart file holds the state of the dynamics together with the
lengths that log and trajectory had; resuming first cuts both back to these lengths. So wherever a run was
killed, the same call ends with the same files as if it never had been.
"""

import math
import time
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics

from segnn_ase.base.constraints import without_idle_constraints
from segnn_ase.base.errors import ConfigError, MDError, OutOfTime, OutputError, SEGNNError, expect
from segnn_ase.base.extxyz import extxyz
from segnn_ase.base.files import clear_leftovers, progress_bar, stop_on_signal, write_atomically
from segnn_ase.base.locks import only_writer
from segnn_ase.md.able import check_run, has_barostat, implements, is_turned
from segnn_ase.md.analysis import energy_slope, nanoseconds_per_day
from segnn_ase.md.drive import Drive, dipole_of, driven
from segnn_ase.md.ensembles import ENSEMBLES, make_dynamics
from segnn_ase.md.growing import Growing
from segnn_ase.md.outputs import (
    COLUMNS,
    OUTPUTS,
    Mark,
    MDResult,
    append_frame,
    append_row,
    check_marked,
    cut,
    make_frame,
    mark,
    tell_left_out,
)
from segnn_ase.md.restart import (
    check_same_run,
    generator,
    get_state,
    read_restart,
    read_rows,
    set_state,
    write_restart,
)
from segnn_ase.md.settings import SUFFIXES, MDConfig
from segnn_ase.md.subject import far_apart, identity, largest_forces_std, outside_domain
from segnn_ase.md.velocities import degrees_of_freedom, set_velocities
from segnn_ase.structure.cue_settings import FIELD


class Run(NamedTuple):
    """A simulation under way."""

    atoms: Atoms
    config: MDConfig
    dynamics: MolecularDynamics
    rng: np.random.Generator
    dof: int  # degrees of freedom that share the thermal energy
    rows: array  # log so far, flat
    identity: dict[str, str]  # of what gives the forces
    files: dict[str, Growing]  # `OUTPUTS`
    drive: Drive | None
    excursion: array  # steps in a row outside the training data, one number


class Snapshot(NamedTuple):
    """A state to go back to."""

    positions: np.ndarray  # (N, 3) Å
    momenta: np.ndarray  # (N, 3)
    cell: np.ndarray  # (3, 3) Å


def run_md(atoms: Atoms, config: MDConfig, *, progress: bool = True, overwrite: bool = False) -> MDResult:
    """Run molecular dynamics of `atoms` with their calculator; positions, momenta and cell are moved in place.

    If config.restart exists, the run goes on from there, whatever the positions of `atoms`; only `steps` may
    have been raised, and limits (`restart.LIMITS`) changed. Otherwise a log or trajectory that exists is refused
    unless `overwrite`. SIGINT and SIGTERM finish the step, write the restart file and raise KeyboardInterrupt, the
    end of `max_minutes` OutOfTime.

    A field of the settings is that of the run alone: in the end `atoms` have what they had before.

    Raises ConfigError for what cannot be run, MDError when a guard stops the run: then `atoms`, and a file
    beside the trajectory, hold the last good frame, and another file the one that was refused.
    """
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    with without_idle_constraints(atoms), ExitStack() as until_the_end:
        check_run(atoms, config)
        deadline = math.inf if config.max_minutes is None else time.monotonic() + 60 * config.max_minutes
        paths = {name: Path(getattr(config, name)) for name in SUFFIXES if getattr(config, name) is not None}
        with only_writer(paths.values()):
            resumed = prepare_files(paths, overwrite)
            if progress:
                tell_left_out(atoms, config)
            try:
                drive = until_the_end.enter_context(driven(atoms, config))
                run, first = resume(atoms, config, drive) if resumed else (start(atoms, config, drive), 0)
                seconds = advance(run, first, progress, deadline)
            except OutputError as error:
                then = f"the same call goes on from {config.restart}" if config.restart else "there is no restart file"
                raise MDError(f"the run was stopped: {error}. When it can be written, {then}.") from error
        return summarize(run, 1000 * seconds / (config.steps - first) if config.steps > first else math.nan)


def prepare_files(paths: dict[str, Path], overwrite: bool) -> bool:
    """Clear up; returns whether there is a run to go on with, refuses to overwrite another."""
    resumed = "restart" in paths and paths["restart"].is_file()
    if not resumed and not overwrite:
        refuse_existing(paths)
    clear_leftovers(paths.values())
    return resumed


def refuse_existing(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        if path.exists():
            raise ConfigError(
                f"{name} is {str(path)!r}, which exists, and there is no restart file to go on from: "
                "rename or remove it, or overwrite it (--overwrite, overwrite=True)"
            )


def start(atoms: Atoms, config: MDConfig, drive: Drive | None) -> Run:
    """Prepare step 0. The restart file comes first, so that a run killed while it opens its files goes on too."""
    rng, subject = np.random.default_rng(config.seed), identity(atoms, without=(FIELD,) if drive else ())
    turned = is_turned(atoms, config)
    if config.velocities == "maxwell" or (config.velocities == "auto" and not atoms.get_momenta().any()):
        set_velocities(atoms, config.temperature, rng, turned=turned)
    dof = degrees_of_freedom(atoms, centre_moves=ENSEMBLES[config.ensemble].centre_moves, turned=turned)
    dynamics = make_dynamics(atoms, config, rng, dof)
    run = Run(atoms, config, dynamics, rng, dof, array("d"), subject, {}, drive, array("q", [0]))
    refresh(run)
    if reason := distrust(run):
        raise MDError(f"the run does not start: {reason}")
    for name in OUTPUTS:
        if getattr(config, name) is not None:
            Path(getattr(config, name)).unlink(missing_ok=True)
    run.files.update(begun(config))
    checkpoint(run, 0)
    observe(run, 0)
    return run


def begun(config: MDConfig) -> dict[str, Growing]:
    return {name: Growing(getattr(config, name)) for name in OUTPUTS}


def advance(run: Run, first: int, progress: bool, deadline: float) -> float:
    """Do the steps after `first`, with output, guards and restart files; returns the seconds they took."""
    config, good = run.config, snapshot(run.atoms)
    bar = progress_bar(shown=progress, total=config.steps, initial=first, unit="step")
    begin = time.perf_counter()
    with bar, stop_on_signal() as stopped:
        for step in range(first + 1, config.steps + 1):
            good = guarded_step(run, good, step)
            bar.update()
            if step % config.log_every == 0:
                speed = nanoseconds_per_day(config.timestep, 1e3 * (time.perf_counter() - begin) / (step - first))
                bar.set_postfix_str(progress_text(run, speed), refresh=False)
            late = time.monotonic() > deadline
            if stopped or late or step % config.checkpoint_every == 0 or step == config.steps:
                checkpoint(run, step)
            if (stopped or late) and step < config.steps:
                where = f"the same call goes on from {config.restart}" if config.restart else "there is no restart file"
                reason = KeyboardInterrupt if stopped else OutOfTime
                raise reason(f"stopped after step {step} of {config.steps}; {where}")
    return time.perf_counter() - begin


def guarded_step(run: Run, good: Snapshot, step: int) -> Snapshot:
    """Do a step and return the state after it; raises MDError, the atoms back at `good`, where it is not acceptable."""
    try:
        if run.drive is None:
            run.dynamics.step()  # type: ignore[attr-defined] # of every integrator
        else:
            run.drive.step(run.dynamics, step)
    except (SEGNNError, np.linalg.LinAlgError) as error:
        stop(run, good, step, str(error), error)
    reason = violation(run) or distrust(run) or observe(run, step)
    if reason is not None:
        stop(run, good, step, reason)
    return snapshot(run.atoms)


def refresh(run: Run) -> None:
    """Ask the calculator what a step asks last: a resumed run then goes on with a cache that is the same to the bit.

    A calculator may round forces otherwise when it is asked for the stress as well.
    """
    run.atoms.get_forces(md=True)
    if has_barostat(run.config):
        run.atoms.get_stress()
    calc = run.atoms.calc
    if run.config.field_frequency:
        dipole_of(calc)  # refuses those that give none
    if run.config.max_forces_std is not None and math.isnan(largest_forces_std(calc)):
        raise ConfigError(
            f"max_forces_std is set, but {type(calc).__name__} gives no 'forces_std': it is neither a committee nor a "
            "potential with a calibrated uncertainty, nor one of ASE's sums of calculators with such a part"
        )
    if run.config.stop_outside_domain and outside_domain(calc) is None:
        raise ConfigError(
            f"stop_outside_domain is set, but {type(calc).__name__} gives no 'outside_domain': the calculator's "
            "potential has no domain to compare with, or a calculator around it hides it"
        )


def violation(run: Run) -> str | None:
    """Return why the state is not acceptable, or None."""
    config, temperature = run.config, temperature_of(run)
    if not math.isfinite(temperature):
        return f"the temperature is {temperature}"
    if config.max_temperature is not None and temperature > config.max_temperature:
        return (
            f"the temperature is {temperature:.0f} K, above max_temperature = {config.max_temperature:g} K. A smaller "
            "timestep, a relaxed starting structure or a potential trained on such structures may help"
        )
    return None


def distrust(run: Run) -> str | None:
    """Return why the potential is not to be trusted here, or None."""
    reason = beyond(run)
    run.excursion[0] = run.excursion[0] + 1 if reason else 0
    return reason if run.excursion[0] > run.config.outside_steps else None


def beyond(run: Run) -> str | None:
    """How this step is beyond what the potential knows, or None."""
    config = run.config
    if config.max_forces_std is not None:
        spread = largest_forces_std(run.atoms.calc)
        if not spread <= config.max_forces_std:
            return (
                f"the forces are uncertain by {spread:.3g} eV/Å, above max_forces_std = {config.max_forces_std:g} eV/Å"
            )
    ways = outside_domain(run.atoms.calc) if config.stop_outside_domain else None
    if not ways:
        return None
    return (
        f"this is outside what the potential was trained on: {'; '.join(way.reason for way in ways)}. What would "
        f"help: labels for the refused frame, and frames {'; '.join(way.help for way in ways)}"
    )


def observe(run: Run, step: int) -> str | None:
    """Append to log and trajectory what is due; returns why the energy is not acceptable, or None."""
    config, reason = run.config, None
    if step % config.log_every == 0:
        run.rows.extend(log_row(run, step))
        with run.files["log"].writing():
            append_row(config.log, run.rows[-len(COLUMNS) :])
        reason = drift(run)
    if reason is None and config.trajectory is not None and step % config.save_every == 0:
        frame = make_frame(run.atoms, step, config.timestep, temperature=temperature_of(run))
        with run.files["trajectory"].writing():
            append_frame(config.trajectory, frame)
    return reason


def log_row(run: Run, step: int) -> tuple[float, ...]:
    """Return the values of `COLUMNS`; NaN for what is not defined."""
    atoms = run.atoms
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    volume = float(atoms.get_volume()) if atoms.pbc.all() else math.nan
    pressure = math.nan
    if atoms.pbc.all() and implements(atoms, "stress"):
        pressure = -float(np.mean(atoms.get_stress(include_ideal_gas=True)[:3])) / units.GPa
    energy = ENSEMBLES[run.config.ensemble].conserved
    conserved = math.nan if energy is None else energy(run.dynamics) - (run.drive.work if run.drive else 0.0)
    time_fs = step * run.config.timestep
    total = potential + kinetic
    ways = outside_domain(atoms.calc)
    outside = math.nan if ways is None else len(ways)
    state = (potential, kinetic, total, temperature_of(run), volume, pressure)
    return (step, time_fs, *state, largest_forces_std(atoms.calc), outside, conserved)


def drift(run: Run) -> str | None:
    limit, n = run.config.max_energy_drift, len(run.atoms)
    if limit is None:
        return None
    moved = abs(run.rows[-1] - run.rows[len(COLUMNS) - 1]) / n
    if moved <= limit:
        return None
    return f"the conserved energy has moved by {moved:.3g} eV/atom, above max_energy_drift = {limit:g} eV/atom"


def temperature_of(run: Run) -> float:
    """Return the temperature in K of the degrees of freedom that share the heat."""
    return 2 * float(run.atoms.get_kinetic_energy()) / (run.dof * units.kB)


def progress_text(run: Run, speed: float) -> str:
    row = dict(zip(COLUMNS, run.rows[-len(COLUMNS) :], strict=True))
    return f"{speed:.3g} ns/day, {row['temperature']:.0f} K, {row['total'] / len(run.atoms):.5f} eV/atom"


def snapshot(atoms: Atoms) -> Snapshot:
    return Snapshot(atoms.get_positions(), atoms.get_momenta(), atoms.cell.array.copy())


def restore(atoms: Atoms, state: Snapshot) -> None:
    atoms.set_cell(state.cell, scale_atoms=False, apply_constraint=False)
    atoms.set_positions(state.positions, apply_constraint=False)
    atoms.set_momenta(state.momenta, apply_constraint=False)


def stop(run: Run, good: Snapshot, step: int, reason: str, cause: Exception | None = None) -> NoReturn:
    """Go back to the last good frame, save it and the refused one beside the other files, and raise MDError."""
    refused = make_frame(run.atoms, step, run.config.timestep, results=False)
    refused.info["reason"] = reason
    restore(run.atoms, good)
    if run.drive is not None:
        run.drive.place(step - 1)
    where = save_last_frames(run.config, make_frame(run.atoms, step - 1, run.config.timestep, results=False), refused)
    raise MDError(
        f"stopped at step {step} ({step * run.config.timestep:g} fs): {reason}. The frame before {where}."
    ) from cause


def save_last_frames(config: MDConfig, good: Atoms, refused: Atoms) -> str:
    """Write both beside the files that there are; returns where they are, to be told."""
    beside = config.trajectory or config.restart or config.log
    where = "is in atoms"
    if beside is None:
        return where
    path, other = (Path(beside).with_name(f"{Path(beside).stem}_{name}.extxyz") for name in ("last_good", "refused"))
    try:
        write_atomically(path, extxyz(good))
        where = f"is in atoms and in {path}"
        if np.isfinite(refused.positions).all():
            write_atomically(other, extxyz(refused))
            where += f", the refused one in {other}"
    except OutputError as error:
        where += f" ({error})"
    return where


def checkpoint(run: Run, step: int) -> None:
    """See that log and trajectory are there, and write the restart file, if there is one."""
    for file in run.files.values():
        file.check()
    if run.config.restart is None:
        return
    atoms = run.atoms
    header = {
        "step": step,
        "config": run.config.model_dump(),
        "dof": run.dof,
        "rng": run.rng.bit_generator.state,
        "marks": {name: mark(getattr(run.config, name)) for name in OUTPUTS},
        "pbc": atoms.pbc.tolist(),
        "identity": run.identity,
        "excursion": run.excursion[0],
    }
    arrays = get_state(run.dynamics, run.config) | snapshot(atoms)._asdict()
    arrays |= {"numbers": atoms.numbers, "masses": atoms.get_masses()}
    arrays |= {} if run.drive is None else {"work": np.array(run.drive.work)}
    arrays["forces"] = atoms.get_forces(apply_constraint=False)
    write_restart(run.config.restart, header, {**arrays, "first_row": np.array(run.rows[: len(COLUMNS)])})


def resume(atoms: Atoms, config: MDConfig, drive: Drive | None) -> tuple[Run, int]:
    """Put everything back to where the restart file was written; returns the run and its step."""
    subject = identity(atoms, without=(FIELD,) if drive else ())
    header, arrays = read_restart(str(config.restart))
    check_same_run(header, arrays, atoms, config, subject)
    if drive is not None:
        drive.work = float(arrays["work"])
        drive.place(header["step"])
    ends = {name: Mark(*header["marks"][name]) for name in OUTPUTS}
    for name, end in ends.items():
        check_marked(getattr(config, name), end)
    rows = read_rows(config, header["step"], ends["log"], arrays["first_row"])
    rng = generator(header["rng"], config)
    # what is refused is refused before atoms are moved
    saved_dynamics(atoms.copy(), config, rng, header["dof"], arrays)
    refuse_other_forces(atoms, config, arrays)
    for name, end in ends.items():
        cut(getattr(config, name), end)
    dynamics = saved_dynamics(atoms, config, rng, header["dof"], arrays)
    excursion = array("q", [header.get("excursion", 0)])
    run = Run(atoms, config, dynamics, rng, header["dof"], rows, subject, begun(config), drive, excursion)
    refresh(run)
    repeat_output(run, header["step"])
    return run, header["step"]


def refuse_other_forces(atoms: Atoms, config: MDConfig, arrays: dict) -> None:
    """Raise ConfigError where the calculator gives other forces than those of the restart file."""
    there = atoms.copy()
    there.calc = atoms.calc
    restore(there, Snapshot(*(arrays[name] for name in Snapshot._fields)))
    found = there.get_forces(apply_constraint=False, md=True)
    if far_apart(arrays["forces"], found):
        raise ConfigError(
            f"restart is {config.restart!r}, written by another run: there the forces were others, by up to "
            f"{np.abs(found - arrays['forces']).max():.3g} eV/Å. Go back to the old calculator, or start anew with "
            "other file names."
        )


def saved_dynamics(atoms: Atoms, config: MDConfig, rng, dof: int, arrays: dict) -> MolecularDynamics:
    """Put atoms and integrator into the state of the restart file's arrays."""
    restore(atoms, Snapshot(*(arrays[name] for name in Snapshot._fields)))
    dynamics = make_dynamics(atoms, config, rng, dof)
    set_state(dynamics, config, arrays)
    return dynamics


def repeat_output(run: Run, step: int) -> None:
    """Ask the calculator for what the log asked of it when the restart file was written; step 0 was not logged yet."""
    if step == 0:
        observe(run, 0)
    elif step % run.config.log_every == 0:
        log_row(run, step)


def summarize(run: Run, ms_per_step: float) -> MDResult:
    config = run.config
    table = np.array(run.rows).reshape(-1, len(COLUMNS))
    log = dict(zip(COLUMNS, table.T, strict=True))
    paths = (None if path is None else Path(path) for path in (config.trajectory, config.log, config.restart))
    return MDResult(
        config.steps,
        len(run.atoms),
        ms_per_step,
        nanoseconds_per_day(config.timestep, ms_per_step),
        float(log["temperature"].mean()),
        energy_slope(log["time_fs"], log["conserved"] / len(run.atoms)),
        log,
        *paths,
    )
