"""Infrared and Raman spectra of a trajectory, by a model of dipoles and polarizabilities, as files."""

import csv
import io
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.base.figures import plot_spectra
from segnn_ase.base.files import write_atomically
from segnn_ase.data.images import read_images
from segnn_ase.md.spectra import Spectrum, infrared, raman, unfolded
from segnn_ase.properties.files import load_properties
from segnn_ase.properties.labels import label_of

SHAPES = {"dipole": (3,), "polarizability": (3, 3)}
AXES = {"infrared": "absorption / km mol⁻¹ cm", "raman": "Raman intensity"}


def spectrum(
    trajectory: str,
    out: str,
    *,
    timestep: float,
    model: str | None = None,
    temperature: float | None = None,
    resolution: float = 10.0,
    laser: float = 532.0,
    device: str = "auto",
) -> list[str]:
    """Write out.infrared.csv and out.raman.csv, as far as there are dipoles, e Å, and polarizabilities, and out.png.

    model: a file of `segnn train --target dipole --target polarizability`, or one of them; None: what the frames
    carry. timestep: fs between frames; temperature: K, None: that of the velocities. Returns what was done. Raises
    FileNotFoundError, DataError, ConfigError and ModelFileError for what gives no spectrum.
    """
    images = read_images(trajectory)
    frames = [atoms for _, atoms in images]
    series = _predicted(frames, model, device) if model else _carried(images)
    kelvin = temperature if temperature is not None else _temperature(frames, trajectory)
    found: dict[str, Spectrum] = {}
    if "dipole" in series:
        dipoles = series["dipole"]
        if model is None and frames[0].pbc.all():
            dipoles = unfolded(dipoles, [atoms.cell.array for atoms in frames])
        found["infrared"] = infrared(dipoles, timestep, kelvin, resolution=resolution)
    if "polarizability" in series:
        how = {"resolution": resolution, "laser": laser}
        found["raman"] = raman(series["polarizability"], timestep, kelvin, **how)
    told = [f"{len(frames)} frames, {1e-3 * timestep * len(frames):.3g} ps, {kelvin:.1f} K"]
    for name, one in found.items():
        write_atomically(f"{out}.{name}.csv", _table(name, one))
        told.append(f"{name}: resolution {one.resolution:.1f} cm^-1; wrote {out}.{name}.csv")
    plot_spectra(f"{out}.png", {AXES[name]: one[:2] for name, one in found.items()})
    return [*told, f"wrote {out}.png"]


def _predicted(frames: Sequence[Atoms], model: str, device: str) -> dict[str, np.ndarray]:
    loaded = load_properties(model, device=resolve_device(device))
    names = [target.name for target in loaded.targets if SHAPES.get(target.name) == target.shape]
    if not names:
        known = ", ".join(target.name for target in loaded.targets)
        raise ConfigError(f"model is {model!r}, which knows {known}; expected dipole or polarizability")
    said = loaded.predict_all(frames)
    return {name: np.array([one[name] for one in said]) for name in names}


def _carried(images: Sequence[tuple[str, Atoms]]) -> dict[str, np.ndarray]:
    found = {}
    for name, shape in SHAPES.items():
        labels = [label_of(atoms, name, source) for source, atoms in images]
        known = [label.value[0] for label in labels if label is not None and label.value.shape == (1, *shape)]
        if len(known) == len(images):
            found[name] = np.array(known)
    if not found:
        raise DataError("not all frames have a dipole or a polarizability; give a model that knows them")
    return found


def _temperature(frames: Sequence[Atoms], trajectory: str) -> float:
    kelvin = float(np.mean([atoms.get_temperature() for atoms in frames]))
    if not kelvin > 0:
        raise ConfigError(f"temperature is not given, and the frames of {trajectory!r} have no velocities; give it")
    return kelvin


def _table(name: str, one: Spectrum) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["wavenumber_per_cm", "absorption_km_per_mol_cm" if name == "infrared" else "intensity"])
    writer.writerows(zip(*(values.tolist() for values in one[:2]), strict=True))
    return buffer.getvalue().encode()
