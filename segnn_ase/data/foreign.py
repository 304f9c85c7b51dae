"""Data of other programs that ASE does not read: they are read, or refused with the lines that convert them."""

import os
from pathlib import Path

from ase import Atoms

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import home_expanded, is_file
from segnn_ase.data.deepmd import read_deepmd, systems_in
from segnn_ase.data.molecules import NAMES, arrays_in, form_of, molecules_of

BY_DPDATA = """\
import dpdata   # pip install dpdata; it lists its formats in https://docs.deepmodeling.com/projects/dpdata
dpdata.LabeledSystem({name!r}, fmt={form!r}).to("ase/traj", "frames.traj")"""
MOLECULES = """\
import ase, ase.io, ase.units, numpy; from ase.calculators.singlepoint import SinglePointCalculator
UNIT = ase.units.kcal / ase.units.mol   # of rMD17 and sGDML; put that of your set
data = numpy.load({name!r})
for R, E, F in zip(data[{R!r}], data[{E!r}].ravel(), data[{F!r}]):
    a = ase.Atoms(data[{z!r}], R)
    a.calc = SinglePointCalculator(a, energy=E * UNIT, forces=F * UNIT)
    ase.io.write("frames.xyz", a, append=True)"""
ARRAYS = """\
import ase, ase.io, ase.units, h5py; from ase.calculators.singlepoint import SinglePointCalculator
UNIT = ase.units.Hartree   # names and units of all arrays stand in the description of the set: put yours
for group in h5py.File({name!r}).values():
    for R, E, F in zip(group["coordinates"], group["energies"], group["forces"]):
        a = ase.Atoms(group["species"][:], R)
        a.calc = SinglePointCalculator(a, energy=E * UNIT, forces=F * UNIT)
        ase.io.write("frames.xyz", a, append=True)"""
CP2K = """\
import ase, ase.io; from ase.units import Bohr, Hartree; from ase.calculators.singlepoint import SinglePointCalculator
for a, f in zip(ase.io.read("RUN-pos-1.xyz", ":"), ase.io.read("RUN-frc-1.xyz", ":")):
    new = ase.Atoms(a.symbols, a.positions, cell=CELL, pbc=True)   # CELL, Å: from the input of the run
    new.calc = SinglePointCalculator(new, energy=a.info["E"] * Hartree, forces=f.positions * Hartree / Bohr)
    ase.io.write("frames.xyz", new, append=True)"""
N2P2 = """\
import ase, ase.io, numpy, pathlib; from ase.calculators.singlepoint import SinglePointCalculator
LENGTH, ENERGY = ase.units.Bohr, ase.units.Hartree   # in most sets; 1, 1 where they are Å and eV
for block in pathlib.Path({name!r}).read_text().split("begin")[1:]:
    rows = [row.split() for row in block.splitlines() if row.strip()]
    cell, atoms = ([row[1:] for row in rows if row[0] == word] for word in ("lattice", "atom"))
    R, F = (LENGTH ** k * numpy.array([x[n:n + 3] for x in atoms], float) for n, k in ((0, 1), (6, -1)))
    a = ase.Atoms([x[3] for x in atoms], R, pbc=bool(cell), cell=LENGTH * numpy.array(cell, float) if cell else None)
    energy = ENERGY * next(float(row[1]) for row in rows if row[0] == "energy")
    a.calc = SinglePointCalculator(a, energy=energy, forces=ENERGY * F)
    ase.io.write("frames.xyz", a, append=True)"""


def is_foreign_folder(place: Path) -> bool:
    return bool(systems_in(place))


def read_foreign(name: str) -> list[Atoms] | None:
    """The frames of data that ASE does not read; None for all others.

    Raises DataError for data that are known, but not read, with the lines that convert them.
    """
    place = home_expanded(name, "data file")
    if os.path.isdir(place):
        return read_deepmd(place) or None
    if not is_file(place):
        return None
    arrays = arrays_in(place) if place.suffix == ".npz" else None
    images = None if arrays is None else molecules_of(place, arrays)
    found = None if images else _refused(place, set(arrays or ()))
    if found is not None:
        what, lines = found
        raise DataError(f"data file is {name!r}, {what}: not read. These lines convert it to eV and Å:\n{lines}")
    return images


def _refused(place: Path, arrays: set[str]) -> tuple[str, str] | None:
    """What a file is and the lines that convert it; None for what may be ASE's."""
    if arrays:
        return _arrays(place, arrays)
    if place.suffix in (".h5", ".hdf5"):
        return "an HDF5 file", ARRAYS.format(name=str(place))
    with place.open("rb") as file:
        start = file.read(4096)
    if start.split()[:1] == [b"begin"] and b"\natom" in start.replace(b" ", b""):
        return "input data of n2p2 or RuNNer, which says no units", N2P2.format(name=str(place))
    if start.split(b"\n")[1:2] and is_of_cp2k(start.split(b"\n")[1].decode(errors="replace")):
        return "of a CP2K run, in Hartree and Bohr, with the forces in another file", CP2K
    return None


def is_of_cp2k(comment: str) -> bool:
    """The second line of its trajectories: i = 5, time = 2.500, E = -17.164."""
    return [part.split("=")[0].strip() for part in comment.split(",")][:2] == ["i", "time"]


def _arrays(place: Path, names: set[str]) -> tuple[str, str]:
    form = form_of(names)
    R, z, E, F = NAMES[form or "rMD17"]
    what = f"arrays of {form} without units" if form else f"arrays of NumPy ({', '.join(sorted(names))})"
    return what, MOLECULES.format(name=str(place), R=R, z=z, E=E, F=F)
