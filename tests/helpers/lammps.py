"""LAMMPS with MPI as a command, and what it finds of a structure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

BAR = 1.6021765e6  # of one eV/Å³, as LAMMPS has it


class Found(NamedTuple):
    """eV, eV/Å, eV/Å³ (xx, yy, zz, yz, xz, xy, as ASE has them) and what was printed."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    stresses: np.ndarray  # of atoms, times the volume
    output: str


def command(name: str) -> str:
    """`lmp` or `mpiexec` of the wheels in this environment (make engines)."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, f"{name} is not here: make engines"
    return found


def run(folder: Path, lines: list[str], *, ranks: int = 1, threads: int = 1, fails: bool = False) -> str:
    """What an input prints."""
    (folder / "in.lammps").write_text("\n".join([*lines, ""]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["LD_LIBRARY_PATH"] = str(Path(sys.prefix) / "lib")  # of the wheel mpich
    words = [command("mpiexec"), "-n", str(ranks), command("lmp"), "-in", "in.lammps", "-log", "none"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def as_lammps_has_it(atoms: Atoms) -> Atoms:
    """Turned so that the cell is a lower triangle; a left-handed one is made right-handed, and vacuum gets a box."""
    atoms = atoms.copy()
    extent = np.ptp(atoms.positions, axis=0) + 40.0
    if not atoms.pbc.any() or atoms.cell.rank == 0:
        atoms.positions += 20.0 - atoms.positions.min(axis=0)
        atoms.set_cell(extent)
        return atoms
    if atoms.cell.rank < 3:
        raise ValueError("a cell of LAMMPS has three vectors")
    if atoms.cell.handedness < 0:
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
        atoms.pbc = atoms.pbc[[1, 0, 2]]
    cell, _ = atoms.cell.standard_form()
    atoms.set_cell(cell, scale_atoms=True)
    for axis in np.flatnonzero(~atoms.pbc):  # where there are walls, all atoms are between them
        places = atoms.get_scaled_positions(wrap=False)[:, axis]
        atoms.positions += (0.5 - (places.min() + places.max()) / 2) * atoms.cell[axis]
    return atoms


def setup(folder: Path, atoms: Atoms, elements: list[str], *, style: str = "atomic", pair: str = "") -> list[str]:
    """Lines that read a structure and load the plugin; the model lies in the folder `model`."""
    ase.io.write(
        folder / "data.lammps", atoms, format="lammps-data", specorder=elements, atom_style=style, masses=False
    )
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    masses = [f"mass {k + 1} {atomic_masses[atomic_numbers[x]]}" for k, x in enumerate(elements)]
    return [
        "units metal",
        f"atom_style {style}",
        "atom_modify map yes",
        f"boundary {boundary}",
        "read_data data.lammps",
        *masses,
        "plugin load model/pair_segnn.so",
        f"pair_style segnn {pair}",
        f"pair_coeff * * model/model.segnn {' '.join(elements)}",
    ]


MEASURED = [
    "compute e all pe/atom",
    "compute s all stress/atom NULL virial",
    "thermo_style custom step pe pxx pyy pzz pyz pxz pxy",
    "thermo_modify format float %.17g",
    "dump d all custom 1 found.txt id fx fy fz c_e c_s[1] c_s[2] c_s[3] c_s[6] c_s[5] c_s[4]",
    "dump_modify d sort id format float %.17g",
]


def evaluate(folder: Path, atoms: Atoms, elements: list[str], *, ranks: int = 1, threads: int = 1, **setting) -> Found:
    """Of a structure that stands as LAMMPS has it."""
    lines = [*setup(folder, atoms, elements, **setting), *MEASURED, "run 0"]
    output = run(folder, lines, ranks=ranks, threads=threads)
    rows = output.splitlines()
    begin = next(k for k, row in enumerate(rows) if row.split()[:2] == ["Step", "PotEng"])
    numbers = [float(x) for x in rows[begin + 1].split()]
    table = np.loadtxt(folder / "found.txt", skiprows=9, ndmin=2)
    return Found(numbers[1], table[:, 4], table[:, 1:4], -np.array(numbers[2:]) / BAR, table[:, 5:] / BAR, output)
