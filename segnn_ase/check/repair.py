"""The training frames written anew, without the flaws that can be repaired safely."""

from pathlib import Path

from ase.units import GPa

from segnn_ase.base.errors import DataError
from segnn_ase.check.findings import where_of
from segnn_ase.check.report import Report
from segnn_ase.data.convert import refuse_as_output, relabelled, write_labelled
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.data.labels import LabelKeys


def repair(report: Report, out: "str | Path", keys: LabelKeys | None = None, *, overwrite: bool = False) -> list[str]:
    """Write the training frames with what can be repaired safely; returns what was done, line by line.

    Frames that cannot be read and repeated ones are left out, a stress of known unit and sign is converted, labels
    get the names that ASE reads, a constant pressure too much is taken off. Raises ConfigError if `out` is
    one of the files that were read, or there already, unless `overwrite`.
    """
    refuse_as_output(out, {source.rpartition(", frame ")[0] for source in report.images}, overwrite=overwrite)
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
    left = write_labelled(out, kept)
    done += [f"left out, as extended XYZ cannot hold it: {', '.join(left)}"] if left else []
    return [*done, f"wrote {len(kept)} frames to {out}"]
