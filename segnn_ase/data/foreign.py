"""Data of other programs that ASE does not read: which they are, and the lines that convert them."""

from pathlib import Path

from segnn_ase.base.errors import DataError

BY_DPDATA = """  pip install dpdata
  import dpdata
  dpdata.LabeledSystem({name!r}, fmt={format!r}).to("ase/traj", "frames.traj")"""
MOLECULES = """  data = numpy.load({name!r})
  for R, E, F in zip(data[{R!r}], data[{E!r}].ravel(), data[{F!r}]):
      a = ase.Atoms(data[{z!r}], R); a.calc = SinglePointCalculator(a, energy=E * UNIT, forces=F * UNIT)
      ase.io.write("frames.xyz", a, append=True)   # UNIT = ase.units.kcal / ase.units.mol where that is the unit"""
ARRAYS = """  with h5py.File({name!r}) as data:   # its names and units stand in the description of the set
      for molecule in data.values():
          for R, E, F in zip(molecule["POSITIONS"], molecule["ENERGY"], molecule["FORCES"]):
              a = ase.Atoms(molecule["NUMBERS"][:], R)
              a.calc = SinglePointCalculator(a, energy=E * UNIT, forces=F * UNIT)
              ase.io.write("frames.xyz", a, append=True)"""
NPZ = {"sGDML": ("R", "z", "E", "F"), "rMD17": ("coords", "nuclear_charges", "energies", "forces")}


def refuse_foreign(path: str, argument: str = "data file") -> None:
    """Raise DataError for data that are known, but not read, with the lines that convert them."""
    place = Path(path).expanduser()
    for what, lines in _folder(place) if place.is_dir() else _file(place) if place.is_file() else ():
        raise DataError(f"{argument} is {path!r}, {what}, which is not read. Convert it to eV and Å:\n{lines}")


def _folder(place: Path) -> list[tuple[str, str]]:
    if not any((place / name).is_file() for name in ("type.raw", "real_atom_types.npy")) and not any(
        place.glob("set.*")
    ):
        return []
    form = "deepmd/npy" if any(place.glob("set.*")) else "deepmd/raw"
    return [("a folder of DeePMD", BY_DPDATA.format(name=str(place), format=form))]


def _file(place: Path) -> list[tuple[str, str]]:
    if place.suffix == ".npz":
        import numpy as np

        try:
            with np.load(place) as data:
                names = set(data.files)
        except (OSError, ValueError):
            return []
        form = next((form for form, known in NPZ.items() if set(known) <= names), None)
        R, z, E, F = NPZ[form or "rMD17"]
        what = f"arrays of {form}" if form else f"NumPy arrays ({', '.join(sorted(names))})"
        return [(what, MOLECULES.format(name=str(place), R=R, z=z, E=E, F=F))]
    if place.suffix in (".h5", ".hdf5"):
        return [("an HDF5 file", ARRAYS.format(name=str(place)))]
    with place.open("rb") as file:
        start = file.read(4096).split()
    if start[:1] == [b"begin"] and b"atom" in start:
        lines = "  ase.io.write('frames.xyz', ase.io.read({!r}, ':', format='runnerdata'))"
        return [("input data of n2p2 or RuNNer", lines.format(str(place)))]
    return []
