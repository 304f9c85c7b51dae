"""The restart file: arrays and JSON, nothing that could be executed.

What was tampered with or belongs to another run is refused before anything is touched.
"""

import io
import json
import math
import operator
import zipfile
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.md.md import MolecularDynamics

from segnn_ase.base.errors import ConfigError, MDError, in_short
from segnn_ase.base.files import write_atomically
from segnn_ase.md.ensembles import state_names
from segnn_ase.md.outputs import COLUMNS, OUTPUTS, Mark
from segnn_ase.md.settings import SUFFIXES, MDConfig
from segnn_ase.md.subject import differences

FORMAT = "segnn_ase md restart 3"
LARGEST = 2 * 1024**3  # bytes of a file; ten million atoms
LARGEST_HEADER = 64 * 1024**2
LIMITS = (
    *("max_minutes", "max_temperature", "max_energy_drift", "max_forces_std"),
    *("stop_outside_domain", "outside_steps"),
)
LATER = {"field", "field_frequency", "outside_steps"}  # settings that files of before do not have


def write_restart(path: str, header: dict, arrays: dict[str, np.ndarray]) -> None:
    content: dict[str, Any] = {"header": np.array(json.dumps({"format": FORMAT, **header})), **arrays}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    write_atomically(path, buffer.getvalue())


def read_restart(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays. Raises MDError for what is damaged, foreign or makes no sense."""
    try:
        arrays = read_arrays(Path(path))
        if arrays["header"].nbytes > LARGEST_HEADER:
            raise ValueError(f"its header has {arrays['header'].nbytes} bytes; expected up to {LARGEST_HEADER}")
        header = json.loads(str(arrays.pop("header")))
    except Exception as error:  # zip and array readers raise anything on foreign or torn files
        raise unreadable(path, str(error) or type(error).__name__) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise MDError(
            f"restart is {path!r}, of format {found!r}; expected {FORMAT!r}. Finish that run with the version "
            "that wrote it, or remove the file to start anew."
        )
    try:
        wrong = check_state(header, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None
    if wrong:
        raise unreadable(path, f"{', '.join(wrong)} of an unexpected type, shape or value")
    return header, arrays


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises ValueError, before it takes the memory, for those larger than the file."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size} bytes; expected up to {LARGEST}")
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size or any(member.compress_type for member in members):
            raise ValueError("its arrays are compressed or larger than the file")
        for member in members:
            check_claim(archive, member)
    data.seek(0)
    with np.load(data, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def check_claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError for an array that says of itself to be larger than it is: room is made for what it says."""
    with archive.open(member) as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} says that it is {shape} numbers, and is shorter")


def unreadable(path: str | None, reason: str) -> MDError:
    return MDError(f"restart is {path!r}, which cannot be read: {' '.join(reason.split())}. Remove it to start anew.")


def check_state(header: dict, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of what cannot be the state of a run; raises for what is missing."""
    n, columns = len(arrays["numbers"]), len(COLUMNS) if header["step"] else 0
    shapes: dict[str, tuple] = {name: (n, 3) for name in ("positions", "momenta", "forces")}
    shapes |= {"masses": (n,), "cell": (3, 3), "first_row": (columns,)}
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape or arrays[name].dtype.kind != "f"]
    state = [name for name in arrays if name != "first_row"]
    wrong += [name for name in state if not np.isfinite(arrays[name]).all()]
    wrong += [name for name, least in (("step", 0), ("dof", 1)) if not _is_count(header[name], least)]
    wrong += [name for name in ("config", "rng", "marks") if not isinstance(header[name], dict)]
    wrong += ["pbc"] * (len(header["pbc"]) != 3)
    wrong += ["config"] * bool(MDConfig.model_fields.keys() - LATER - header["config"].keys())
    wrong += ["excursion"] * (not _is_count(header.get("excursion", 0)))
    wrong += ["identity"] * (not all(isinstance(text, str) for text in header["identity"].values()))
    for name in OUTPUTS:
        if not all(value is None or _is_count(value) for value in Mark(*header["marks"][name])):
            wrong.append(f"mark of {name}")
    wrong += ["work"] * (
        header["config"].get("field") is not None and (arrays["work"].shape, arrays["work"].dtype.kind) != ((), "f")
    )
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


def get_state(dynamics: MolecularDynamics, config: MDConfig) -> dict[str, np.ndarray]:
    """What an integrator remembers besides the atoms, by the names of its attributes."""
    return {name: operator.attrgetter(name)(dynamics) for name in state_names(config)}


def set_state(dynamics: MolecularDynamics, config: MDConfig, arrays: dict[str, np.ndarray]) -> None:
    """Give an integrator what it remembered. Raises MDError for arrays that are not of its shapes."""
    for name, value in get_state(dynamics, config).items():
        if np.shape(value) != arrays[name].shape:
            raise unreadable(config.restart, f"{name} has shape {arrays[name].shape}")
        *owner, attribute = name.split(".")
        setattr(operator.attrgetter(*owner)(dynamics) if owner else dynamics, attribute, arrays[name][()])


def check_same_run(header: dict, arrays: dict, atoms: Atoms, config: MDConfig, identity: dict[str, str]) -> None:
    """Raise ConfigError saying what is not as in the run that wrote the restart file."""
    old, new = MDConfig(**header["config"]).model_dump(), config.model_dump()
    free = {*LIMITS, *(name for name in SUFFIXES if _may_have_moved(old.get(name), new[name]))}
    if new["steps"] > old.get("steps", 0):
        free.add("steps")
    names = [name for name in new if name not in free and old.get(name) != new[name]]
    differing = [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in names]
    here = {"numbers": atoms.numbers, "masses": atoms.get_masses(), "pbc": atoms.pbc}
    there = {**arrays, "pbc": np.array(header["pbc"])}
    differing += [f"the {name} of the atoms are others" for name in here if not np.array_equal(here[name], there[name])]
    for name, before, now in differences(header["identity"], identity):
        differing.append(f"{name} was {in_short(before)} and is {in_short(now)}")
    if differing:
        raise ConfigError(
            f"restart is {config.restart!r}, written by another run: {'; '.join(differing)}. Only steps may be "
            "raised, and limits changed: go back to the old settings, or start anew with other file names."
        )


def _may_have_moved(old: str | None, new: str | None) -> bool:
    """A file of another name but of the same kind: what it holds is compared with its mark."""
    return old is not None and new is not None and Path(old).suffix == Path(new).suffix


def read_rows(config: MDConfig, step: int, end: Mark, first_row: np.ndarray) -> array:
    """Return the log so far; without a file only its first row, the reference of the energy guard."""
    if config.log is None or step == 0:
        return array("d", first_row)
    with open(config.log, "rb") as file:
        text = io.BytesIO(file.read(end.size))
    try:
        rows = np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise _damaged_log(config, str(error)) from None
    expected = np.arange(0, step + 1, config.log_every)
    if rows.shape != (len(expected), len(COLUMNS)) or not np.array_equal(rows[:, 0], expected):
        raise _damaged_log(
            config, f"expected {len(COLUMNS)} columns and a row for every {config.log_every} of {step} steps"
        )
    return array("d", rows.ravel())


def _damaged_log(config: MDConfig, reason: str) -> MDError:
    return MDError(f"log is {config.log!r}, which is damaged: {reason}. Restore it, or start anew.")
