"""Labelled frames of any format written as extended XYZ, in eV and Å under the names that ASE reads."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from segnn_ase.base.errors import ConfigError, DataError, StructureError, expect
from segnn_ase.base.extxyz import extxyz, writable
from segnn_ase.base.files import home_expanded, write_atomically
from segnn_ase.base.label_names import usual_name
from segnn_ase.data.frames import (
    Frame,
    as_paths,
    check_geometries,
    check_labels,
    frames_from_images,
    label_table,
)
from segnn_ase.data.images import read_images, split_index
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.labels_of_cues import refuse_unknown_units
from segnn_ase.data.units import unit_names
from segnn_ase.structure.cue_settings import CONJUGATES, FIELD, LABELS_OF_CUES, Cue

SUFFIXES = (".xyz", ".extxyz")
ALL_CUES = tuple(map(Cue.model_validate, (FIELD, *CONJUGATES)))  # with labels of their own


def convert(
    paths: "str | Path | list", out: "str | Path", *, keys: LabelKeys | None = None, overwrite: bool = False
) -> list[str]:
    """Read frames as a training does, with its checks, and write them to a new file; returns what was found and done.

    Raises what `read_frames` and `check_labels` raise, and ConfigError for a file that is none of extended XYZ, one of
    those that are read, or there already, unless `overwrite`. Nothing is written then.
    """
    out, images = images_for(out, paths, overwrite=overwrite)
    frames = frames_from_images(images, LabelKeys() if keys is None else keys)
    check_geometries(frames)
    check_labels(frames)
    for frame in frames:
        refuse_units_that_would_be_lost(frame)
    left = write_labelled(out, (relabelled(a, frame) for (_, a), frame in zip(images, frames, strict=True)))
    lost = [f"left out, as extended XYZ cannot hold it: {', '.join(left)}"] if left else []
    return [label_table(frames), *lost, f"wrote {len(frames)} frames to {out}"]


def refuse_units_that_would_be_lost(frame: Frame) -> None:
    """Raise DataError for labels of cues whose unit is not stated, where energies are converted: they would seem to be
    in ASE's."""
    try:
        refuse_unknown_units(frame.told or {}, frame.reading, ALL_CUES)
    except StructureError as error:
        raise DataError(f"{frame.source}: {error}") from error


def images_for(
    out: "str | Path", paths: "str | Path | list", *, overwrite: bool = False
) -> tuple[Path, list[tuple[str, Atoms]]]:
    """The structures of files, each after its source, and where others made of them are to be written.

    Raises ConfigError for a name that is no extended XYZ, and for what `refuse_as_output` refuses.
    """
    out, paths = home_expanded(out, "out"), as_paths(paths)
    expect(bool(paths), "paths", paths, "at least one")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out is {str(out)!r}; expected a name that ends in .xyz or .extxyz")
    refuse_as_output(out, paths, overwrite=overwrite)
    return out, [image for path in paths for image in read_images(path)]


def refuse_as_output(out: "str | Path", paths: Iterable[str], *, overwrite: bool = False) -> None:
    """Raise ConfigError for a file that is also read, and for one that is there, unless `overwrite`."""
    if Path(out).expanduser().resolve() in {Path(split_index(path)[0]).resolve() for path in paths}:
        raise ConfigError(f"frames would overwrite {str(out)!r}, from which they are read; give another name")
    if Path(out).expanduser().exists() and not overwrite:
        raise ConfigError(f"out is {str(out)!r}, which exists: rename or remove it, or overwrite it (--overwrite)")


def write_labelled(out: "str | Path", images: Iterable[Atoms]) -> list[str]:
    """Write structures that can be read back, all or none; returns the names of what the format cannot hold."""
    left: dict[str, None] = {}
    text = bytearray()
    for atoms in images:
        text += extxyz(atoms)
        left |= dict.fromkeys(writable(atoms)[1])
    write_atomically(out, bytes(text))
    return list(left)


def relabelled(atoms: Atoms, frame: Frame, factor: float = 1.0, shift: float = 0.0) -> Atoms:
    """The structure with all it had, its labels under the names that ASE reads; the stress times factor plus shift."""
    out = atoms.copy()
    usual = [name for name in (*out.info, *out.arrays) if usual_name(str(name))]
    for name in (*frame.origins, *usual, *unit_names(out.info)):
        out.info.pop(name, None)
        out.arrays.pop(name, None)
    results = {"energy": frame.energy, "forces": frame.forces}
    if frame.forces is not None and frame.reading.cut:
        known = np.isfinite(frame.forces)
        results["forces"], out.arrays["forces_mask"] = np.where(known, frame.forces, 0.0), known
    if frame.stress is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(factor * frame.stress + shift * np.eye(3))
    out.calc = SinglePointCalculator(out, **{name: value for name, value in results.items() if value is not None})
    if atoms.calc is not None:  # labels of what belongs to charges, moments and fields
        out.calc.results |= {name: value for name, value in atoms.calc.results.items() if name in LABELS_OF_CUES}
    return out
