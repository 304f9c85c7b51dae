"""What `segnn export` does and says."""

from pathlib import Path

from segnn_ase.base.devices import resolve_dtype
from segnn_ase.export.lammps import find_headers, input_lines
from segnn_ase.export.library import NUMBERS, export
from segnn_ase.store.model_file import load_potential


def export_and_describe(
    model: "str | Path", out: Path, *, dtype: str | None, portable: bool, lammps: bool, headers: Path | None
) -> list[str]:
    """Export a model as `export` does, and tell what was written and how it is used."""
    potential = load_potential(model)
    found = find_headers(headers) if lammps or headers is not None else None
    written = export(potential.to(resolve_dtype(dtype) or potential.dtype), out, portable=portable, lammps=found)
    lines = [f"wrote {written.library} and {written.numbers}; {written.folder / 'segnn.h'} tells how to call it"]
    if found is not None:
        told = input_lines(written.folder, NUMBERS, potential.species)
        lines += ["in an input of LAMMPS, with units metal and newton on, an element for each type:", *told]
    if potential.dispersion is not None:
        lines.append(f"its labels had D3 ({potential.dispersion}), which the library leaves out: add it where you call")
    return lines
