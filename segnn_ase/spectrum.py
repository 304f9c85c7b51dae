"""Infrared and Raman spectra of a trajectory, by a model of dipoles and polarizabilities, as files."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, DataError, expect
from segnn_ase.base.figures import plot_spectra
from segnn_ase.base.files import home_expanded, write_atomically
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.frames import structure_alone
from segnn_ase.data.images import read_images
from segnn_ase.md.outputs import KELVIN
from segnn_ase.md.spectra import FEWEST, Spectrum, check_numbers, highest_wavenumber, infrared, raman, unfolded
from segnn_ase.md.velocities import kinetic_temperature
from segnn_ase.properties.files import holds_properties, load_properties
from segnn_ase.properties.labels import label_of
from segnn_ase.structure.cue_settings import FIELD
from segnn_ase.structure.told import same_told, told_in, with_told

SHAPES = {"dipole": (3,), "polarizability": (3, 3)}
AXES = {"infrared": "absorption / km cm mol⁻¹", "raman": "Raman intensity"}
COLUMNS = {"infrared": "absorption_km_cm_per_mol", "raman": "intensity"}
HIGHEST, HIGHEST_WITHOUT_H = 4200.0, 2400.0  # cm^-1, above all stretches


class Series(NamedTuple):
    """Numbers along a trajectory, and where they are from."""

    values: dict[str, np.ndarray]
    origins: dict[str, str]


def spectrum(
    trajectory: str,
    out: str,
    *,
    timestep: float | None = None,
    model: str | None = None,
    temperature: float | None = None,
    resolution: float = 10.0,
    laser: float = 532.0,
    device: str = "auto",
    overwrite: bool = False,
) -> list[str]:
    """Write out.infrared.csv and out.raman.csv, as far as there are dipoles, e Å, and polarizabilities, and out.png.

    model: a file of `segnn train --target dipole --target polarizability`, or one of them, or a potential that knows
    fields; None: what the frames carry. timestep: fs between frames, None: as the frames of `segnn md` say;
    temperature: K, None: that of the velocities. Returns what was done. Raises FileNotFoundError, DataError,
    ConfigError and ModelFileError for what gives no spectrum, and ConfigError for files that are there, unless
    `overwrite`.
    """
    files = output_names(out, overwrite)
    images = read_images(trajectory)
    frames = [atoms for _, atoms in images]
    refuse_other_systems(images)
    refuse_changes(frames, (FIELD,))
    step, kelvin = _time_between(frames, timestep), _temperature(frames, trajectory, temperature)
    check_numbers(len(frames), step, kelvin, resolution, laser)
    series = _predicted(frames, model, device) if model else _carried(images)
    found: dict[str, Spectrum] = {}
    if "dipole" in series.values:
        dipoles = series.values["dipole"]
        if model is None and frames[0].pbc.any():
            dipoles = unfolded(dipoles, [_complete_cell(atoms) for atoms in frames], frames[0].pbc)
        found["infrared"] = infrared(dipoles, step, kelvin, resolution=resolution)
    if "polarizability" in series.values:
        found["raman"] = raman(series.values["polarizability"], step, kelvin, resolution=resolution, laser=laser)
    told = [f"{len(frames)} frames, {step:g} fs apart, {1e-3 * step * len(frames):.3g} ps, {kelvin:.1f} K"]
    told += _notes(frames, step, series)
    for name, one in found.items():
        write_atomically(files[name], _table(name, one))
        told.append(f"{name}: resolution {one.resolution:.1f} cm^-1; wrote {files[name]}")
    plot_spectra(files["figure"], {AXES[name]: one[:2] for name, one in found.items()})
    return [*told, f"wrote {files['figure']}"]


def output_names(out: str, overwrite: bool) -> dict[str, str]:
    """The files that are written. Raises ConfigError where there are some already."""
    expect(isinstance(out, str) and bool(out) and not out.endswith("/"), "out", out, "a prefix of names of files")
    path = home_expanded(out, "out")
    names = {kind: f"{path}.{kind}.csv" for kind in AXES} | {"figure": f"{path}.png"}
    there = [name for name in names.values() if home_expanded(name, "out").exists()]
    if there and not overwrite:
        raise ConfigError(f"out is {out!r}, but {there[0]} exists: rename or remove it, or overwrite it (--overwrite)")
    return names


def refuse_other_systems(images: Sequence[tuple[str, Atoms]]) -> None:
    """Raise DataError for frames that are not of one system, or too few."""
    first = images[0][1].numbers
    for source, atoms in images:
        if atoms.numbers.shape != first.shape or (atoms.numbers != first).any():
            raise DataError(f"{source} has other atoms than the first frame; expected the frames of one run")
    if len(images) < FEWEST:
        raise DataError(f"there are {len(images)} frames; expected at least {FEWEST} for a spectrum")


def refuse_changes(frames: Sequence[Atoms], names: Sequence[str]) -> None:
    """Raise DataError where one of these is not the same in all frames."""
    for name in names:
        first, *others = (told_in(atoms, [name]) for atoms in frames)
        if not all(same_told(first, other, 1e-9) for other in others):
            raise DataError(f"{name} is not the same in all frames: what changes with it would be in the spectrum")


def _time_between(frames: Sequence[Atoms], timestep: float | None) -> float:
    """fs, as it is given and as frames say."""
    times = [atoms.info.get("time_fs") for atoms in frames]
    if any(not isinstance(time, int | float | np.number) for time in times):
        if timestep is None:
            raise ConfigError("timestep is not given, and the frames do not say when they are (time_fs); give it in fs")
        return timestep
    steps = np.diff(np.array(times, dtype=float))
    if not np.allclose(steps, steps[0], rtol=1e-6) or not steps[0] > 0:
        raise DataError(f"frames are {steps.min():g} to {steps.max():g} fs apart (time_fs); expected all the same")
    if timestep is not None and not np.isclose(timestep, steps[0], rtol=1e-3):
        raise ConfigError(f"timestep is {timestep:g}, but frames are {steps[0]:g} fs apart (time_fs); leave it out")
    return float(steps[0])


def _temperature(frames: Sequence[Atoms], trajectory: str, given: float | None) -> float:
    if given is not None:
        return given
    if not any(atoms.get_momenta().any() for atoms in frames):
        raise ConfigError(f"temperature is not given, and the frames of {trajectory!r} have no velocities; give it")
    said = [atoms.info.get(KELVIN) for atoms in frames]  # which knows of constraints that files do not hold
    known = all(isinstance(one, int | float | np.number) for one in said)
    return float(np.mean(said if known else [kinetic_temperature(atoms) for atoms in frames]))


def _complete_cell(atoms: Atoms) -> np.ndarray:
    if atoms.cell[atoms.pbc].any(axis=1).all():
        return atoms.cell.complete().array
    raise DataError(f"pbc of the frames is {atoms.pbc.tolist()}, but their cell is {atoms.cell.array.tolist()}")


def _predicted(frames: Sequence[Atoms], model: str, device: str) -> Series:
    if not holds_properties(model):
        return _of_potential(frames, model, device)
    loaded = load_properties(model, device=resolve_device(device))
    names = [target.name for target in loaded.targets if SHAPES.get(target.name) == target.shape]
    if not names:
        known = ", ".join(target.name for target in loaded.targets)
        raise ConfigError(f"model is {model!r}, which knows {known}; expected dipole or polarizability")
    said = loaded.predict_all(frames)
    return Series({name: np.array([one[name] for one in said]) for name in names}, dict.fromkeys(names, model))


def _of_potential(frames: Sequence[Atoms], model: str, device: str) -> Series:
    """What a potential says that knows fields, in that of the frames, where they have one."""
    calculator = SEGNNCalculator(model, device=device, domain="ignore", allow_nonsmooth=True)
    names = [name for name in SHAPES if name in calculator.implemented_properties]
    if not names:
        raise ConfigError(
            f"model is {model!r}, a potential that knows no dipoles; expected one that was trained with the cue "
            "external_field, or a model of dipole or polarizability"
        )
    refuse_changes(frames, calculator.told_names)
    told = [told_in(atoms, calculator.told_names) for atoms in frames]
    bare = [with_told(structure_alone(atoms, model), one) for atoms, one in zip(frames, told, strict=True)]
    said = calculator.evaluate(bare, names)
    names = [name for name in names if name in said[0]]  # periodic ions have no dipole
    return Series({name: np.array([one[name] for one in said]) for name in names}, dict.fromkeys(names, model))


def _carried(images: Sequence[tuple[str, Atoms]]) -> Series:
    """What all frames have. Raises DataError where it comes from several places, or is nowhere."""
    found = Series({}, {})
    for name, shape in SHAPES.items():
        labels = [label_of(atoms, name, source) for source, atoms in images]
        known = [label for label in labels if label is not None and label.value.shape == (1, *shape)]
        if len(known) < len(images):
            continue
        if len(places := sorted({label.origin for label in known})) > 1:
            raise DataError(f"{name} is in {' and '.join(places)}, in some frames here, in others there; give a model")
        found.values[name], found.origins[name] = np.array([label.value[0] for label in known]), places[0]
    if not found.values:
        raise DataError("not all frames have a dipole or a polarizability; give a model that knows them")
    return found


def _notes(frames: Sequence[Atoms], step: float, series: Series) -> list[str]:
    units = {"dipole": ", taken to be in e Å", "polarizability": ""}
    notes = [f"{name}: {origin}{units[name]}" for name, origin in series.origins.items()]
    highest = highest_wavenumber(step)
    if highest < (HIGHEST if 1 in frames[0].numbers else HIGHEST_WITHOUT_H):
        notes.append(
            f"frames are far apart: nothing is seen above {highest:.0f} cm^-1, and bands from there would come below"
        )
    return notes


def _table(name: str, one: Spectrum) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["wavenumber_per_cm", COLUMNS[name]])
    writer.writerows(zip(*(values.tolist() for values in one[:2]), strict=True))
    return buffer.getvalue().encode()
