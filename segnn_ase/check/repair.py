"""The training frames written anew, without the flaws that can be repaired safely."""

import io
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.base.files import write_atomically
from segnn_ase.base.label_names import usual_name
from segnn_ase.check.consistency import VOIGT
from segnn_ase.check.findings import where_of
from segnn_ase.check.report import Report
from segnn_ase.data.frames import Frame, frame_from_atoms
from segnn_ase.data.images import split_index
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.units import unit_names


def repair(report: Report, out: "str | Path", keys: LabelKeys | None = None) -> list[str]:
    """Write the training frames with what can be repaired safely; returns what was done, line by line.

    Frames that cannot be read and repeated ones are left out, a stress of known unit and sign is converted, labels
    get the names that ASE reads, a constant pressure too much is taken off. Raises ConfigError if `out` is
    one of the files that were read.
    """
    inputs = {Path(split_index(source.rpartition(", frame ")[0])[0]).resolve() for source in report.images}
    if Path(out).expanduser().resolve() in inputs:
        raise ConfigError(f"fixed frames would overwrite {str(out)!r}; give another name")
    keys, done = keys or LabelKeys(), []
    drop = {source for f in report.findings if f.repair[:1] == ("drop",) for source in f.frames}
    renamed = {f.repair[1]: f.repair[2] for f in report.findings if f.repair[:1] == ("key",)}
    factor = next((f.repair[1] for f in report.findings if f.repair[:1] == ("scale stress",)), 1.0)
    shift = next((f.repair[1] for f in report.findings if f.repair[:1] == ("shift stress",)), 0.0)
    for f in report.findings:
        if f.repair[:1] == ("drop",):
            done.append(f"left out: {f.message}" + (f" [{where_of(f.frames)}]" if f.frames else ""))
    done += [f"read {kind} from {name!r}" for kind, name in renamed.items()]
    done += [f"multiplied the stress by {factor:.6g}"] if factor != 1.0 else []
    done += [f"added {shift / GPa:.3g} GPa to the diagonal of the stress"] if shift else []
    keys = keys.model_copy(update=renamed)
    good = {source: atoms for source, atoms in report.images.items() if source not in drop}
    kept = [relabelled(a, frame_from_atoms(a, keys, source=s), factor, shift) for s, a in good.items()]
    if not kept:
        raise DataError("nothing is left to write: no training frame can be used")
    text = io.StringIO()
    ase.io.write(text, kept, format="extxyz")
    write_atomically(out, text.getvalue().encode())
    return [*done, f"wrote {len(kept)} frames to {out}"]


def relabelled(atoms: Atoms, frame: Frame, factor: float, shift: float) -> Atoms:
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
        results["stress"] = (factor * frame.stress + shift * np.eye(3)).ravel()[VOIGT]
    out.calc = SinglePointCalculator(out, **{name: value for name, value in results.items() if value is not None})
    return out
