"""Labels without what a field does to a net charge as a whole, which the calculator adds again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from segnn_ase.base.errors import DataError, StructureError
from segnn_ase.data.frames import Frame
from segnn_ase.structure.cue_settings import FIELD, Cue
from segnn_ase.structure.cues import field_of
from segnn_ase.structure.ions import OF_ORIGIN, is_charged, pull_on_charge
from segnn_ase.structure.told import with_told


def without_pull(frames: list[Frame], cues: Sequence[Cue], *, strict: bool = True) -> list[Frame]:
    """Frames of a potential that is told fields, without the pull on net charges; the same for any other.

    Dipoles and Born charges of periodic ions depend on the choice of the cell: they are left out. Raises DataError,
    with the frame, for a periodic ion in a field, and for what is no field or charge, which else stay as they are.
    """
    if all(cue.name != FIELD for cue in cues):
        return frames
    return [_without_its_pull(frame, cues, strict) for frame in frames]


def _without_its_pull(frame: Frame, cues: Sequence[Cue], strict: bool) -> Frame:
    told = frame.told or {}
    atoms = with_told(frame.atoms, told)
    try:
        charged, field = is_charged(atoms, cues), field_of(atoms, cues)
    except StructureError as error:
        if strict:
            raise DataError(f"{frame.source}: {error}") from error
        return frame
    if charged and atoms.pbc.any():
        return frame._replace(told={key: value for key, value in told.items() if key[1] not in OF_ORIGIN} or None)
    added = pull_on_charge(atoms, cues, field)
    return frame if not added else _less(frame, added)


def _less(frame: Frame, added: dict) -> Frame:
    told = {key: _label_less(value, key[1], frame, added) for key, value in (frame.told or {}).items()}
    return frame._replace(
        energy=None if frame.energy is None else frame.energy - added.get("energy", 0.0),
        forces=None if frame.forces is None else frame.forces - added.get("forces", 0.0),
        told=told or None,
    )


def _label_less(value: Any, name: str, frame: Frame, added: dict) -> Any:
    """A label beside a structure; what has another shape, or is no number, is refused where it is learned."""
    more = np.asarray(added.get(name, 0.0))
    if name == "electronegativities":
        more = np.full(len(frame.atoms), more)
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return value
    return numbers - more.reshape(numbers.shape) if more.any() and numbers.size == more.size else value
