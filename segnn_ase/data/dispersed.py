"""Labels without the dispersion that they contain: the network learns the rest, and the calculator adds it again."""

import numpy as np

from segnn_ase.base.errors import DataError, StructureError
from segnn_ase.data.frames import Frame
from segnn_ase.structure.dispersion import dispersion_of


def without_dispersion(frames: list[Frame], name: str | None) -> list[Frame]:
    """Frames whose energies, forces and stress have lost what dispersion adds, "d3bj:pbe" for one; None takes nothing.

    Raises DataError, with the frame, for structures that have none, ConfigError and MissingExtraError as
    `require_dispersion` does.
    """
    return list(frames) if name is None else [_without(frame, name) for frame in frames]


def _without(frame: Frame, name: str) -> Frame:
    try:
        taken = dispersion_of(name, frame.atoms, derivatives=frame.forces is not None or frame.stress is not None)
    except StructureError as error:
        raise DataError(f"{frame.source}: {error}") from error
    return frame._replace(
        energy=None if frame.energy is None else frame.energy - taken.energy,
        forces=None if frame.forces is None else frame.forces - taken.forces,
        stress=None if frame.stress is None else frame.stress - taken.virial / frame.atoms.cell.volume,
    )


def taken_off(before: list[Frame], after: list[Frame], name: str) -> str:
    """What the labels have lost, in a line."""
    pairs = list(zip(before, after, strict=True))
    energies = [(a.energy - b.energy) / len(a.atoms) for a, b in pairs if a.energy is not None]
    forces = [np.nan_to_num(a.forces - b.forces) for a, b in pairs if a.forces is not None]
    parts = [f"{1e3 * min(energies):.1f} to {1e3 * max(energies):.1f} meV/atom"] if energies else []
    parts += [f"forces of up to {1e3 * max(np.abs(f).max() for f in forces):.1f} meV/Å"] if forces else []
    return f"dispersion {name} taken off the labels: {', '.join(parts) or 'there are none'}"
