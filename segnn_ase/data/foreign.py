"""Data of other programs that ASE does not read: which they are, and the lines that convert them."""

import os
from pathlib import Path

import numpy as np

from segnn_ase.base.errors import DataError
from segnn_ase.base.files import home_expanded, is_file

BY_DPDATA = """\
import dpdata   # pip install dpdata
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
NPZ = {"sGDML": ("R", "z", "E", "F"), "rMD17": ("coords", "nuclear_charges", "energies", "forces")}


def refuse_foreign(path: str) -> None:
    """Raise DataError for data that are known, but not read, with the lines that convert them."""
    place = home_expanded(path, "data file")
    found = _folder(place) if os.path.isdir(place) else _file(place) if is_file(place) else None
    if found is not None:
        what, lines = found
        raise DataError(f"data file is {path!r}, {what}: not read. These lines convert it to eV and Å:\n{lines}")


def _folder(place: Path) -> tuple[str, str] | None:
    arrays = any(place.glob("set.*/coord.npy"))
    if not arrays and not (place / "type.raw").is_file():
        return None
    return "a folder of DeePMD", BY_DPDATA.format(name=str(place), form="deepmd/npy" if arrays else "deepmd/raw")


def _file(place: Path) -> tuple[str, str] | None:
    if place.suffix == ".npz":
        return _arrays(place)
    if place.suffix in (".h5", ".hdf5"):
        return "an HDF5 file", ARRAYS.format(name=str(place))
    with place.open("rb") as file:
        start = file.read(4096)
    if start.split()[:1] == [b"begin"] and b"\natom" in start.replace(b" ", b""):
        return "input data of n2p2 or RuNNer", BY_DPDATA.format(name=str(place), form="n2p2")
    if start.split(b"\n")[1:2] and is_of_cp2k(start.split(b"\n")[1].decode(errors="replace")):
        return "of a CP2K run, in Hartree and Bohr, with the forces in another file", CP2K
    return None


def is_of_cp2k(comment: str) -> bool:
    """The second line of its trajectories: i = 5, time = 2.500, E = -17.164."""
    return [part.split("=")[0].strip() for part in comment.split(",")][:2] == ["i", "time"]


def _arrays(place: Path) -> tuple[str, str] | None:
    try:
        with np.load(place) as data:
            names = set(data.files)
    except (OSError, ValueError):
        return None
    form = next((form for form, known in NPZ.items() if set(known) <= names), None)
    R, z, E, F = NPZ[form or "rMD17"]
    what = f"arrays of {form}" if form else f"arrays of NumPy ({', '.join(sorted(names))})"
    return what, MOLECULES.format(name=str(place), R=R, z=z, E=E, F=F)
