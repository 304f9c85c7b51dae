"""Molecular dynamics on ASE's integrators: log, trajectory, guards, and a restart that goes on bit for bit.

Every output is appended in whole records. The restart file holds the state of the dynamics together with the
lengths that log and trajectory had; resuming first cuts both back to these lengths. So wherever a run was
killed, the same call ends with the same files as if it never had been.
"""

import io
import json
import math
import operator
import os
import struct
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz
from ase.io.trajectory import TrajectoryWriter
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet
from ase.spacegroup import Spacegroup
from pydantic import Field, field_validator, model_validator

from segnn_ase.config import ConfigError, OutOfTime, OutputError, SEGNNError, Settings, existing_file, expect
from segnn_ase.files import append, clear_leftovers, progress_bar, stop_on_signal, write_atomically, writing
from segnn_ase.neighbors import neighbor_list
from segnn_ase.plot import plot_energy_drift, plot_rdf

FORMAT = "segnn_ase md restart 2"
COLUMNS = (
    *("step", "time_fs", "potential", "kinetic", "total", "temperature", "volume", "pressure"),
    *("forces_std", "outside", "conserved"),
)
SAVED = ("energy", "free_energy", "forces", "stress")  # in the trajectory, where the calculator has them at hand
GUARDED = ("nve", "nhc", "npt")  # ensembles with a conserved energy
SUFFIXES = {"log": (".csv",), "trajectory": (".traj", ".xyz", ".extxyz"), "restart": (".npz",)}
OUTPUTS = ("log", "trajectory")  # files that grow
PROBE = 4096  # bytes at a mark that must be the same when a run goes on
ULM_BLOCK = 42  # the offset table of ASE's .traj grows by this factor: 1, 42, 42², ...


class MDError(SEGNNError, RuntimeError):
    """A simulation was stopped by a guard, or cannot be resumed from its restart file."""


class MDConfig(Settings):
    """Settings of one run of molecular dynamics.

    Ensembles: "nve" is velocity Verlet; "langevin" (NVT) also moves the centre of mass, so all 3N degrees of
    freedom are thermal; "nhc" (NVT) is a Nosé-Hoover chain and "npt" Martyna-Tobias-Klein. Settings of other
    ensembles than the chosen one are not read.
    """

    ensemble: Literal["nve", "langevin", "nhc", "npt"] = "nve"
    timestep: float = Field(0.5, gt=0, le=20, description="fs")
    steps: int = Field(1000, ge=0, description="in total; raise it to go on with a finished run")
    temperature: float = Field(300.0, gt=0, allow_inf_nan=False, description="K; of the first velocities in nve")
    pressure: float = Field(0.0, allow_inf_nan=False, description="GPa, npt")
    friction: float = Field(0.01, gt=0, le=1, description="1/fs, langevin")
    tdamp: float = Field(100.0, gt=0, allow_inf_nan=False, description="fs, time of the thermostat, nhc and npt")
    pdamp: float = Field(1000.0, gt=0, allow_inf_nan=False, description="fs, time of the barostat, npt")
    npt_cell: Literal["isotropic", "full"] = Field("isotropic", description="what the barostat moves: volume or cell")
    velocities: Literal["auto", "maxwell", "keep"] = Field("auto", description="auto: keep those that are not zero")
    seed: int = Field(0, ge=0)
    log: str | None = Field(None, description=".csv; eV, K, Å^3, GPa")
    log_every: int = Field(10, ge=1, description="steps")
    trajectory: str | None = Field(None, description=".traj, .xyz or .extxyz")
    save_every: int = Field(100, ge=1, description="steps between frames")
    restart: str | None = Field(None, description=".npz")
    checkpoint_every: int = Field(1000, ge=1, description="steps between restart files")
    max_temperature: float | None = Field(10_000.0, gt=0, description="K; a hotter step stops the run")
    max_energy_drift: float | None = Field(None, gt=0, description="eV/atom of the conserved energy since step 0")
    max_forces_std: float | None = Field(None, gt=0, description="eV/Å, largest uncertainty of a force component")
    stop_outside_domain: bool = Field(False, description="stop at a structure outside the training data")
    max_minutes: float | None = Field(None, gt=0, description="of wall-clock time; then the run can be gone on with")

    @field_validator("log", "trajectory", "restart", mode="before")
    @classmethod
    def _path(cls, value):
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _consistent(self):
        for name, suffixes in SUFFIXES.items():
            path = getattr(self, name)
            if path is not None and Path(path).suffix not in suffixes:
                raise ValueError(f"{name} is {path!r}; expected a name that ends in {' or '.join(suffixes)}")
        if self.ensemble in ("nhc", "npt") and self.tdamp < 10 * self.timestep:
            raise ValueError(f"tdamp is {self.tdamp} fs; expected at least 10 time steps, 100 are usual")
        if self.ensemble == "npt" and self.pdamp < self.tdamp:
            raise ValueError(
                f"pdamp is {self.pdamp} fs; expected at least tdamp, {self.tdamp} fs; 10 times it is usual"
            )
        if self.ensemble != "npt" and self.pressure != 0:
            raise ValueError(f"pressure is {self.pressure} GPa, but ensemble {self.ensemble!r} has none: use 'npt'")
        if self.ensemble not in GUARDED and self.max_energy_drift is not None:
            raise ValueError(f"max_energy_drift is set, but ensemble {self.ensemble!r} conserves no energy: remove it")
        return self


class MDResult(NamedTuple):
    """What a run gave; the final structure is in the `atoms` that were passed."""

    steps: int  # in total
    ms_per_step: float  # of this call; NaN if there was nothing left to do
    ns_per_day: float
    mean_temperature: float  # K, over the log
    energy_slope: float  # eV/atom/ps of the conserved energy, NaN without one
    log: dict[str, np.ndarray]  # by `COLUMNS`; from this call only if it resumed without a log file
    trajectory: Path | None
    log_path: Path | None
    restart: Path | None


class Run(NamedTuple):
    """A simulation under way."""

    atoms: Atoms
    config: MDConfig
    dynamics: MolecularDynamics
    rng: np.random.Generator
    dof: int  # degrees of freedom that share the thermal energy
    rows: array  # log so far, flat


def run_md(atoms: Atoms, config: MDConfig, *, progress: bool = True, overwrite: bool = False) -> MDResult:
    """Run molecular dynamics of `atoms` with their calculator; positions, momenta and cell are moved in place.

    If config.restart exists, the run goes on from there, whatever the positions of `atoms`; only `steps` may
    have been raised. Otherwise a log or trajectory that exists is refused unless `overwrite`. SIGINT and
    SIGTERM finish the step, write the restart file and raise KeyboardInterrupt.

    Raises ConfigError for what cannot be run, MDError when a guard stops the run: then `atoms`, and a file
    beside the trajectory, hold the last good frame.
    """
    check_run(atoms, config)
    deadline = math.inf if config.max_minutes is None else time.monotonic() + 60 * config.max_minutes
    paths = {name: Path(getattr(config, name)) for name in SUFFIXES if getattr(config, name) is not None}
    resumed = "restart" in paths and paths["restart"].is_file()
    if not resumed and not overwrite:
        refuse_existing(paths)
    for path in paths.values():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(paths.values())
    try:
        run, first = resume(atoms, config) if resumed else (start(atoms, config), 0)
        seconds = advance(run, first, progress, deadline)
    except OutputError as error:
        further = f"the same call goes on from {config.restart}" if config.restart else "there is no restart file"
        raise MDError(f"the run was stopped: {error}. When it can be written, {further}.") from error
    return summarize(run, 1000 * seconds / (config.steps - first) if config.steps > first else math.nan)


def check_run(atoms: Atoms, config: MDConfig) -> None:
    """Raise ConfigError where structure, calculator and settings do not fit together."""
    expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    expect(isinstance(config, MDConfig), "config", config, "an MDConfig")
    if atoms.calc is None or not len(atoms):
        raise ConfigError("atoms has no calculator: set atoms.calc" if len(atoms) else "atoms is empty")
    if not (atoms.get_masses() > 0).all():
        raise ConfigError(f"masses of atoms {np.flatnonzero(atoms.get_masses() <= 0).tolist()} are zero; set_masses")
    if not np.isfinite(atoms.get_momenta()).all():
        atom = int(np.flatnonzero(~np.isfinite(atoms.get_momenta()).all(axis=1))[0])
        raise ConfigError(f"momenta of atom {atom} are {atoms.get_momenta()[atom].tolist()}; expected finite numbers")
    if config.ensemble in ("nhc", "npt") and atoms.constraints:
        raise ConfigError(f"ensemble {config.ensemble!r} cannot hold constraints: remove them, or use 'langevin'")
    if config.ensemble == "npt" and not atoms.pbc.all():
        raise ConfigError(f"ensemble 'npt' needs pbc in three directions, not {atoms.pbc.tolist()}: use 'nhc'")
    if config.ensemble == "npt" and not implements(atoms, "stress"):
        raise ConfigError(f"ensemble 'npt' needs the stress, which {type(atoms.calc).__name__} does not implement")
    if config.max_energy_drift is not None and not implements(atoms, "free_energy"):
        raise ConfigError(f"max_energy_drift needs the free_energy; {type(atoms.calc).__name__} does not implement it")


def implements(atoms: Atoms, name: str) -> bool:
    return name in atoms.calc.implemented_properties


def refuse_existing(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        if path.exists():
            raise ConfigError(
                f"{name} is {str(path)!r}, which exists, and there is no restart file to go on from: "
                "rename or remove it, or pass overwrite=True"
            )


def start(atoms: Atoms, config: MDConfig) -> Run:
    """Prepare step 0. The restart file comes first, so that a run killed while it opens its files goes on too."""
    rng = np.random.default_rng(config.seed)
    if config.velocities == "maxwell" or (config.velocities == "auto" and not atoms.get_momenta().any()):
        set_velocities(atoms, config.temperature, rng)
    dof = degrees_of_freedom(atoms, config.ensemble)
    run = Run(atoms, config, make_dynamics(atoms, config, rng, dof), rng, dof, array("d"))
    refresh(run)
    for name in OUTPUTS:
        if getattr(config, name) is not None:
            Path(getattr(config, name)).unlink(missing_ok=True)
    checkpoint(run, 0)
    observe(run, 0)
    return run


def set_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution, without total momentum, for molecules without rotation.

    What is left after the projection is the canonical distribution of the other degrees of freedom: it needs
    no rescaling. With constraints nothing is projected out.
    """
    masses = atoms.get_masses()[:, None]  # (N, 1) amu
    velocities = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.kB * temperature / masses)
    if not atoms.constraints:
        velocities -= (masses * velocities).sum(axis=0) / masses.sum()
        if not atoms.pbc.any():
            arms, inertia = _inertia(atoms)
            # pinv: the inertia about the axis of a linear molecule is zero
            spin = np.linalg.pinv(inertia, rcond=1e-8, hermitian=True) @ np.cross(arms, masses * velocities).sum(axis=0)
            velocities -= np.cross(spin, arms)
    atoms.set_momenta(masses * velocities)


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Count the degrees of freedom that share the thermal energy.

    All ensembles but "langevin" conserve the total momentum, and of a molecule the angular one: those that
    are zero stay so and hold no heat.
    """
    count = atoms.get_number_of_degrees_of_freedom()
    if ensemble == "langevin" or atoms.constraints:
        return count
    momenta = atoms.get_momenta()
    arms, inertia = _inertia(atoms)
    if np.linalg.norm(momenta.sum(axis=0)) <= 1e-4 * np.linalg.norm(momenta):
        count -= 3
        turning = np.cross(arms, momenta).sum(axis=0)
        scale = np.linalg.norm(arms) * np.linalg.norm(momenta)
        if not atoms.pbc.any() and np.linalg.norm(turning) <= 1e-4 * scale:
            count -= np.linalg.matrix_rank(inertia, tol=1e-8 * np.trace(inertia), hermitian=True)
    return max(int(count), 1)


def _inertia(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Return positions from the centre of mass (N, 3) Å and the tensor of inertia (3, 3) amu Å^2."""
    arms = atoms.positions - atoms.get_center_of_mass()
    second = np.einsum("n,na,nb->ab", atoms.get_masses(), arms, arms)
    return arms, np.trace(second) * np.eye(3) - second


def make_dynamics(atoms: Atoms, config: MDConfig, rng: np.random.Generator, dof: int) -> MolecularDynamics:
    """Return ASE's integrator, its thermostat set to the degrees of freedom that there are."""
    timestep, tdamp = config.timestep * units.fs, config.tdamp * units.fs
    if config.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    if config.ensemble == "langevin":
        friction = config.friction / units.fs
        return Langevin(atoms, timestep, temperature_K=config.temperature, friction=friction, fixcm=False, rng=rng)
    if config.ensemble == "nhc":
        dynamics = NoseHooverChainNVT(atoms, timestep, temperature_K=config.temperature, tdamp=tdamp)
    else:
        dynamics = {"isotropic": IsotropicMTKNPT, "full": MTKNPT}[config.npt_cell](
            atoms,
            timestep,
            temperature_K=config.temperature,
            pressure_au=config.pressure * units.GPa,
            tdamp=tdamp,
            pdamp=config.pdamp * units.fs,
        )
        dynamics._num_atoms_global = dof / 3
    # ASE counts 3N: with the centre of mass at rest, what moves would be hotter by 3N/dof, a sixth for 15 atoms
    dynamics._thermostat._num_atoms_global = dof / 3
    dynamics._thermostat._Q[0] *= dof / (3 * len(atoms))
    if config.ensemble == "npt" and config.npt_cell == "full":
        # ASE counts 9, but the momentum of the cell is symmetric: it would be held at 1.5 times the temperature
        dynamics._barostat._cell_dof = 6
        dynamics._barostat._R[0] *= 6 / 9
    return dynamics


THERMOSTAT = ("_thermostat._eta", "_thermostat._p_eta")
BAROSTAT = ("_barostat._xi", "_barostat._p_xi")
STATE = {  # what an integrator remembers besides the atoms
    "nve": (),
    "langevin": (),
    "nhc": THERMOSTAT,
    "isotropic": (*THERMOSTAT, *BAROSTAT, "_eps", "_p_eps", "_cell0", "_volume0"),
    "full": (*THERMOSTAT, *BAROSTAT, "_p_g"),
}


def state_names(config: MDConfig) -> tuple[str, ...]:
    return STATE[config.npt_cell if config.ensemble == "npt" else config.ensemble]


def advance(run: Run, first: int, progress: bool, deadline: float) -> float:
    """Do the steps after `first`, with output, guards and restart files; returns the seconds they took."""
    config, good = run.config, snapshot(run.atoms)
    bar = progress_bar(shown=progress, total=config.steps, initial=first, unit="step")
    begin = time.perf_counter()
    with bar, stop_on_signal() as stopped:
        for step in range(first + 1, config.steps + 1):
            try:
                run.dynamics.step()
            except (SEGNNError, np.linalg.LinAlgError) as error:
                stop(run, good, step, str(error), error)
            reason = violation(run) or observe(run, step)
            if reason is not None:
                stop(run, good, step, reason)
            good = snapshot(run.atoms)
            bar.update()
            if step % config.log_every == 0:
                speed = nanoseconds_per_day(config.timestep, 1e3 * (time.perf_counter() - begin) / (step - first))
                bar.set_postfix_str(describe(run, speed), refresh=False)
            late = time.monotonic() > deadline
            if stopped or late or step % config.checkpoint_every == 0 or step == config.steps:
                checkpoint(run, step)
            if (stopped or late) and step < config.steps:
                where = f"the same call goes on from {config.restart}" if config.restart else "there is no restart file"
                reason = KeyboardInterrupt if stopped else OutOfTime
                raise reason(f"stopped after step {step} of {config.steps}; {where}")
    return time.perf_counter() - begin


def refresh(run: Run) -> None:
    """Ask the calculator what a step asks last: a resumed run then goes on with a cache that is the same to the bit.

    A calculator may round forces otherwise when it is asked for the stress as well.
    """
    run.atoms.get_forces(md=True)
    if run.config.ensemble == "npt":
        run.atoms.get_stress()
    results = run.atoms.calc.results
    if run.config.max_forces_std is not None and "forces_std" not in results:
        raise ConfigError(
            "max_forces_std is set, but the calculator gives no 'forces_std': it is neither a committee nor a "
            "potential with a calibrated uncertainty"
        )
    if run.config.stop_outside_domain and "outside_domain" not in results:
        raise ConfigError("stop_outside_domain is set, but the calculator's potential has no domain to compare with")


def violation(run: Run) -> str | None:
    """Return why the state is not acceptable, or None."""
    config, temperature = run.config, temperature_of(run)
    if not math.isfinite(temperature):
        return f"the temperature is {temperature}"
    if config.max_temperature is not None and temperature > config.max_temperature:
        return f"the temperature is {temperature:.0f} K, above max_temperature = {config.max_temperature:g} K"
    if config.max_forces_std is not None:
        spread = uncertainty_of(run)
        if not spread <= config.max_forces_std:
            return (
                f"the forces are uncertain by {spread:.3g} eV/Å, above max_forces_std = {config.max_forces_std:g} eV/Å"
            )
    if config.stop_outside_domain and run.atoms.calc.results["outside_domain"]:
        ways = run.atoms.calc.results["outside_domain"]
        return (
            f"it left what the potential was trained on: {'; '.join(way.reason for way in ways)}. What would help: "
            f"labels for the refused frame, and {'; '.join(way.help for way in ways)}"
        )
    return None


def uncertainty_of(run: Run) -> float:
    """Return the largest standard deviation of a force component, eV/Å; NaN where the calculator gives none."""
    return float(np.max(run.atoms.calc.results.get("forces_std", math.nan)))


def observe(run: Run, step: int) -> str | None:
    """Append to log and trajectory what is due; returns why the energy is not acceptable, or None."""
    config, reason = run.config, None
    if step % config.log_every == 0:
        run.rows.extend(log_row(run, step))
        append_row(config.log, run.rows[-len(COLUMNS) :])
        reason = drift(run)
    if reason is None and config.trajectory is not None and step % config.save_every == 0:
        append_frame(config.trajectory, make_frame(run, step))
    return reason


def log_row(run: Run, step: int) -> tuple[float, ...]:
    """Return the values of `COLUMNS`; NaN for what is not defined."""
    atoms = run.atoms
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    volume = float(atoms.get_volume()) if atoms.pbc.all() else math.nan
    pressure = math.nan
    if atoms.pbc.all() and implements(atoms, "stress"):
        pressure = -float(np.mean(atoms.get_stress(include_ideal_gas=True)[:3])) / units.GPa
    conserved = math.nan
    if run.config.ensemble == "nve":
        conserved = potential + kinetic
    elif run.config.ensemble in GUARDED and implements(atoms, "free_energy"):
        conserved = run.dynamics.get_conserved_energy()
    time_fs = step * run.config.timestep
    total = potential + kinetic
    ways = atoms.calc.results.get("outside_domain")
    outside = math.nan if ways is None else len(ways)
    state = (potential, kinetic, total, temperature_of(run), volume, pressure)
    return (step, time_fs, *state, uncertainty_of(run), outside, conserved)


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


def describe(run: Run, speed: float) -> str:
    row = dict(zip(COLUMNS, run.rows[-len(COLUMNS) :], strict=True))
    return f"{speed:.3g} ns/day, {row['temperature']:.0f} K, {row['total'] / len(run.atoms):.5f} eV/atom"


class Snapshot(NamedTuple):
    """A state to go back to."""

    positions: np.ndarray  # (N, 3) Å
    momenta: np.ndarray  # (N, 3)
    cell: np.ndarray  # (3, 3) Å


def snapshot(atoms: Atoms) -> Snapshot:
    return Snapshot(atoms.get_positions(), atoms.get_momenta(), atoms.cell.array.copy())


def restore(atoms: Atoms, state: Snapshot) -> None:
    atoms.set_cell(state.cell, scale_atoms=False, apply_constraint=False)
    atoms.set_positions(state.positions, apply_constraint=False)
    atoms.set_momenta(state.momenta, apply_constraint=False)


def stop(run: Run, good: Snapshot, step: int, reason: str, cause: Exception | None = None) -> NoReturn:
    """Go back to the last good frame, save it and the refused one beside the other files, and raise MDError."""
    config, refused = run.config, make_frame(run, step, results=False)
    restore(run.atoms, good)
    beside = config.trajectory or config.restart or config.log
    where = "is in atoms"
    if beside is not None:
        path, other = (
            Path(beside).with_name(f"{Path(beside).stem}_{name}.extxyz") for name in ("last_good", "refused")
        )
        try:
            write_atomically(path, extxyz(make_frame(run, step - 1, results=False)))
            where = f"is in atoms and in {path}"
            if np.isfinite(refused.positions).all():
                refused.info["reason"] = reason
                write_atomically(other, extxyz(refused))
                where += f", the refused one in {other}"
        except OutputError as error:
            where += f" ({error})"
    raise MDError(
        f"stopped at step {step} ({step * config.timestep:g} fs): {reason}. The frame before {where}. Look at it; a "
        "smaller timestep, a relaxed starting structure or a potential trained on such structures may help."
    ) from cause


def make_frame(run: Run, step: int, *, results: bool = True) -> Atoms:
    """Return a copy of the atoms with step, time and the results that the calculator has at hand."""
    frame = run.atoms.copy()
    for name in all_properties:  # labels of the file that the atoms came from
        frame.info.pop(name, None)
        frame.arrays.pop(name, None)
    frame.info.update(step=step, time_fs=step * run.config.timestep)
    if results:
        run.atoms.get_potential_energy()
        known = run.atoms.calc.results
        frame.calc = SinglePointCalculator(frame, **{name: known[name] for name in SAVED if name in known})
    return frame


def append_row(path: str | None, row: Sequence[float]) -> None:
    if path is None:
        return
    # repr gives the digits that read back to the same bits
    line = ",".join([str(int(row[0])), *(repr(value) for value in row[1:])]) + "\n"
    empty = not Path(path).exists() or not Path(path).stat().st_size
    append(path, ((",".join(COLUMNS) + "\n" + line) if empty else line).encode())


def append_frame(path: str, frame: Atoms) -> None:
    if Path(path).suffix == ".traj":
        with writing(path), TrajectoryWriter(path, "a") as writer:
            writer.write(frame)
        return
    append(path, extxyz(frame))


def extxyz(frame: Atoms) -> bytes:
    """Without what has no form in this format, such as the nested notes that `ase.build` leaves on its slabs."""
    frame.info = {name: value for name, value in frame.info.items() if _fits_a_line(value)}
    buffer = io.StringIO()
    write_extxyz(buffer, frame)
    return buffer.getvalue().encode()


def _fits_a_line(value) -> bool:
    if isinstance(value, np.ndarray | np.generic | Spacegroup):
        return True
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class Mark(NamedTuple):
    """How far a file was written, to cut it back to."""

    size: int  # bytes
    items: int = 0  # of a .traj
    table: int = 0  # position of its table of offsets
    probe: int | None = None  # checksum of a part that stays as it is


def mark(path: str | None) -> Mark:
    """Flush a file to disk and return how far it is written."""
    if path is None or not Path(path).exists():
        return Mark(0)
    with writing(path), open(path, "r+b") as file:
        os.fsync(file.fileno())
        size = file.seek(0, os.SEEK_END)
        probe = probe_of(file, size)
        if Path(path).suffix != ".traj":
            return Mark(size, probe=probe)
        file.seek(32)
        return Mark(size, *struct.unpack("<2q", file.read(16)), probe)


def probe_of(file, size: int) -> int:
    """Checksum of the last kilobytes of a text; of a .traj, where offsets change, of its first bytes."""
    is_traj = Path(file.name).suffix == ".traj"
    file.seek(0 if is_traj else max(size - PROBE, 0))
    return zlib.crc32(file.read(32 if is_traj else min(size, PROBE)))


def check_marked(path: str | None, end: Mark) -> None:
    """Raise MDError for a file that is not the one that was marked."""
    if path is None or end.size == 0:
        return
    size = Path(path).stat().st_size if Path(path).exists() else 0
    if size < end.size:
        raise MDError(f"{path} has {size} bytes, but the restart file was written at {end.size}: it is another file")
    with open(path, "rb") as file:
        if end.probe is not None and probe_of(file, end.size) != end.probe:
            raise MDError(f"{path} is not as it was when the restart file was written: it is damaged or another file")


def cut(path: str | None, end: Mark) -> None:
    """Cut a file back to a mark."""
    if path is None or not Path(path).exists():
        return
    with writing(path), open(path, "r+b") as file:
        file.truncate(end.size)
        if end.items:
            # ASE keeps the number of frames and their offsets at fixed places of what is not cut off
            file.seek(32)
            file.write(struct.pack("<2q", end.items, end.table))
            capacity = 1
            while capacity < end.items:
                capacity *= ULM_BLOCK
            file.seek(end.table + 8 * end.items)
            file.write(bytes(8 * (capacity - end.items)))


def checkpoint(run: Run, step: int) -> None:
    """Write the restart file, if there is one: arrays and JSON, nothing that could be executed."""
    if run.config.restart is None:
        return
    atoms = run.atoms
    header = {
        "format": FORMAT,
        "step": step,
        "config": run.config.model_dump(),
        "dof": run.dof,
        "rng": run.rng.bit_generator.state,
        "marks": {name: mark(getattr(run.config, name)) for name in OUTPUTS},
        "pbc": atoms.pbc.tolist(),
    }
    arrays = {name: operator.attrgetter(name)(run.dynamics) for name in state_names(run.config)}
    arrays |= snapshot(atoms)._asdict() | {"numbers": atoms.numbers, "masses": atoms.get_masses()}
    arrays["first_row"] = np.array(run.rows[: len(COLUMNS)])
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), **arrays)
    write_atomically(run.config.restart, buffer.getvalue())


def resume(atoms: Atoms, config: MDConfig) -> tuple[Run, int]:
    """Put everything back to where the restart file was written; returns the run and its step."""
    header, arrays = read_restart(config.restart)
    check_same_run(header, arrays, atoms, config)
    ends = {name: Mark(*header["marks"][name]) for name in OUTPUTS}
    for name, end in ends.items():
        check_marked(getattr(config, name), end)
    step, rows = header["step"], read_rows(config, header["step"], ends["log"], arrays["first_row"])
    rng = generator(header["rng"], config)
    set_state(make_dynamics(atoms.copy(), config, rng, header["dof"]), config, arrays)  # refuses before it moves atoms
    for name, end in ends.items():
        cut(getattr(config, name), end)
    restore(atoms, Snapshot(*(arrays[name] for name in Snapshot._fields)))
    dynamics = make_dynamics(atoms, config, rng, header["dof"])
    set_state(dynamics, config, arrays)
    run = Run(atoms, config, dynamics, rng, header["dof"], rows)
    refresh(run)
    if step == 0:
        observe(run, 0)
    elif step % config.log_every == 0:
        log_row(run, step)
    return run, step


def read_restart(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays. Raises MDError for what is damaged, foreign or makes no sense."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
    except Exception as error:  # zip and array readers raise anything on foreign or torn files
        raise unreadable(path, str(error) or type(error).__name__) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise MDError(f"restart is {path!r}, of format {found!r}; expected {FORMAT!r}")
    try:
        wrong = check_state(header, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None
    if wrong:
        raise unreadable(path, f"{', '.join(wrong)} of an unexpected type, shape or value")
    return header, arrays


def unreadable(path: str, reason: str) -> MDError:
    return MDError(f"restart is {path!r}, which cannot be read: {' '.join(reason.split())}. Remove it to start anew.")


def check_state(header: dict, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of what cannot be the state of a run; raises for what is missing."""
    n, columns = len(arrays["numbers"]), len(COLUMNS) if header["step"] else 0
    shapes = {"positions": (n, 3), "momenta": (n, 3), "masses": (n,), "cell": (3, 3), "first_row": (columns,)}
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape or arrays[name].dtype.kind != "f"]
    state = [name for name in arrays if name != "first_row"]
    wrong += [name for name in state if not np.isfinite(arrays[name]).all()]
    wrong += [name for name, least in (("step", 0), ("dof", 1)) if not _is_count(header[name], least)]
    wrong += [name for name in ("config", "rng", "marks") if not isinstance(header[name], dict)]
    wrong += ["pbc"] * (len(header["pbc"]) != 3)
    for name in OUTPUTS:
        if not all(value is None or _is_count(value) for value in Mark(*header["marks"][name])):
            wrong.append(f"mark of {name}")
    return wrong + sorted({*state_names(MDConfig(**header["config"]))} - arrays.keys())


def _is_count(value, least: int = 0) -> bool:
    return type(value) is int and value >= least


def generator(state: dict, config: MDConfig) -> np.random.Generator:
    rng = np.random.default_rng()
    try:
        rng.bit_generator.state = state
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise unreadable(config.restart, f"random numbers: {error}") from None
    return rng


def set_state(dynamics: MolecularDynamics, config: MDConfig, arrays: dict[str, np.ndarray]) -> None:
    """Give an integrator what it remembered. Raises MDError for arrays that are not of its shapes."""
    for name in state_names(config):
        *owner, attribute = name.split(".")
        owner = operator.attrgetter(*owner)(dynamics) if owner else dynamics
        if np.shape(getattr(owner, attribute)) != arrays[name].shape:
            raise unreadable(config.restart, f"{name} has shape {arrays[name].shape}")
        setattr(owner, attribute, arrays[name][()])


def check_same_run(header: dict, arrays: dict, atoms: Atoms, config: MDConfig) -> None:
    """Raise ConfigError saying what is not as in the run that wrote the restart file."""
    old, new = dict(header["config"]), config.model_dump()
    old["max_minutes"] = new["max_minutes"]
    for name in SUFFIXES:  # files may have been moved: what they hold is compared with the marks
        if old[name] is not None and new[name] is not None and Path(old[name]).suffix == Path(new[name]).suffix:
            old[name] = new[name]
    if new["steps"] > old["steps"]:
        old["steps"] = new["steps"]
    differing = [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]]
    here = {"numbers": atoms.numbers, "masses": atoms.get_masses(), "pbc": atoms.pbc}
    there = {**arrays, "pbc": np.array(header["pbc"])}
    differing += [f"the {name} of the atoms are others" for name in here if not np.array_equal(here[name], there[name])]
    if differing:
        raise ConfigError(
            f"restart is {config.restart!r}, written by another run: {'; '.join(differing)}. Only steps may be raised: "
            "go back to the old settings, or start anew with other file names."
        )


def read_rows(config: MDConfig, step: int, end: Mark, first_row: np.ndarray) -> array:
    """Return the log so far; without a file only its first row, the reference of the energy guard."""
    if config.log is None or step == 0:
        return array("d", first_row)
    with open(config.log, "rb") as file:
        text = io.BytesIO(file.read(end.size))
    try:
        rows = np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise MDError(f"log is {config.log!r}, which is damaged: {error}. Restore it, or start anew.") from None
    expected = np.arange(0, step + 1, config.log_every)
    if rows.shape != (len(expected), len(COLUMNS)) or not np.array_equal(rows[:, 0], expected):
        raise MDError(
            f"log is {config.log!r}, which is damaged: expected {len(COLUMNS)} columns and a row for every "
            f"{config.log_every} of {step} steps. Restore it, or start anew."
        )
    return array("d", rows.ravel())


def summarize(run: Run, ms_per_step: float) -> MDResult:
    config = run.config
    table = np.array(run.rows).reshape(-1, len(COLUMNS))
    log = dict(zip(COLUMNS, table.T, strict=True))
    paths = [None if path is None else Path(path) for path in (config.trajectory, config.log, config.restart)]
    return MDResult(
        config.steps,
        ms_per_step,
        nanoseconds_per_day(config.timestep, ms_per_step),
        float(log["temperature"].mean()),
        energy_slope(log["time_fs"], log["conserved"] / len(run.atoms)),
        log,
        *paths,
    )


def read_structure(path: "str | Path") -> Atoms:
    """Read the last frame of a file. Raises FileNotFoundError, or ConfigError for what ASE cannot read."""
    existing_file(path, "structure")
    try:
        return ase.io.read(path, -1)
    except Exception as error:  # ASE raises anything on a bad file
        raise ConfigError(
            f"structure is {str(path)!r}, which ASE cannot read: {type(error).__name__}: {error}"
        ) from error


def plot_run(result: MDResult, prefix: "str | Path", *, pairs: Sequence[str] = ()) -> list[Path]:
    """Draw energy and temperature, and the radial distribution of `pairs` over the trajectory; returns the files."""
    n_atoms = len(ase.io.read(result.trajectory, 0)) if result.trajectory else 1
    conserved = result.log["conserved"]
    energy = conserved if np.isfinite(conserved).all() else result.log["total"]
    written = [Path(f"{prefix}_energy.png")]
    plot_energy_drift(
        written[0], result.log["time_fs"], energy / n_atoms, result.log["temperature"], result.energy_slope
    )
    if pairs:
        curves = radial_distribution(ase.io.iread(result.trajectory), pairs, r_max=6.0)
        written.append(Path(f"{prefix}_rdf.png"))
        plot_rdf(written[1], curves)
    return written


def nanoseconds_per_day(timestep: float, ms_per_step: float) -> float:
    """Convert a time step in fs and its cost in ms."""
    return timestep * 86.4 / ms_per_step


def energy_slope(time_fs, energy_per_atom) -> float:
    """Return the slope in eV/atom/ps of a line fitted to energies at times in fs; NaN for fewer than two."""
    time_ps, energy = np.asarray(time_fs, dtype=float) / 1000, np.asarray(energy_per_atom, dtype=float)
    if len(time_ps) < 2:
        return math.nan
    centred = time_ps - time_ps.mean()
    return float(centred @ (energy - energy.mean()) / (centred @ centred))


def check_pairs(pairs: Sequence[str], frame: Atoms | None = None, n: int = 0) -> None:
    """Raise ConfigError for pairs that are none, and where the n-th frame has no radial distribution of them."""
    expect(isinstance(pairs, Sequence) and not isinstance(pairs, str), "pairs", pairs, "a list such as ['O-H']")
    for pair in pairs:
        if not isinstance(pair, str) or len(pair.split("-")) != 2 or not all(pair.split("-")):
            raise ConfigError(f"pair {pair!r} was given; expected two elements such as 'O-H'")
    if frame is None:
        return
    expect(isinstance(frame, Atoms), f"frame {n}", frame, "Atoms")
    if not frame.pbc.all():
        raise ConfigError(f"pbc of frame {n} is {frame.pbc.tolist()}; g(r) needs three periodic directions")
    for pair in pairs:
        if not set(pair.split("-")) <= set(frame.get_chemical_symbols()):
            raise ConfigError(f"pair {pair!r} is not in a frame of {frame.get_chemical_formula()}")


def radial_distribution(
    frames: Iterable[Atoms], pairs: Sequence[str], r_max: float, bins: int = 200
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Average the partial radial distribution functions of pairs such as "O-H" over periodic frames.

    g_AB(r) = <n_B(r)> V / (N_B 4 pi r^2 dr), n_B the B atoms in a shell around an A atom. All periodic images
    are counted, also those of the atom itself, so r_max (Å) may exceed the cell, and the integral of
    N_B/V g 4 pi r^2 dr is the coordination number; for like pairs a fluid levels off at 1 - 1/N within half
    the cell. Returns {pair: (centres of the bins in Å, g)}.
    """
    check_pairs(pairs)
    good = isinstance(r_max, int | float | np.number) and 0 < r_max < math.inf
    expect(good, "r_max", r_max, "a positive number of Å")
    expect(isinstance(bins, int | np.integer) and bins > 0, "bins", bins, "a positive integer")
    frames = [frames] if isinstance(frames, Atoms) else frames
    expect(isinstance(frames, Iterable) and not isinstance(frames, str), "frames", frames, "Atoms, or several of them")
    edges = np.linspace(0.0, r_max, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)  # Å^3
    sums, count = {pair: np.zeros(bins) for pair in pairs}, 0
    for frame in frames:
        check_pairs(pairs, frame, count)
        count += 1
        i, j, S = neighbor_list(frame.positions, frame.cell.array, frame.pbc, r_max)
        distances = np.linalg.norm(frame.positions[j] - frame.positions[i] + S @ frame.cell.array, axis=1)
        symbols = np.array(frame.get_chemical_symbols())
        for pair in pairs:
            a, b = pair.split("-")
            number = (symbols == a).sum() * (symbols == b).sum()
            chosen = distances[(symbols[i] == a) & (symbols[j] == b)]
            sums[pair] += np.histogram(chosen, edges)[0] * frame.get_volume() / (number * shells)
    if not count:
        raise ConfigError("frames is empty: there is nothing to average")
    r = (edges[1:] + edges[:-1]) / 2
    return {pair: (r, total / count) for pair, total in sums.items()}
