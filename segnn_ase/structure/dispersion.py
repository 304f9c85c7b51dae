"""D3 dispersion, which a network of short range cannot learn, from simple-dftd3: energy, forces, virial, Hessian.

The setting is a text, "d3bj:pbe": a damping function and a functional that the library has parameters for. There are
only terms of pairs, as in VASP, CP2K and ORCA unless they are told otherwise (Grimme et al., J. Chem. Phys. 132, 154104
(2010); J. Comput. Chem. 32, 1456 (2011)).

Why this library: it is that of the method's authors, kept up to date, has wheels of compiled code in float64 for
every Python from 3.11 on (5 MB, no compiler, cffi alone besides NumPy), periodic in any direction, with analytic
forces, virial, second derivatives and energies of pairs. tad-dftd3 is for molecules only; torch-dftd installs
pymatgen, lists all pairs within 50 Å as tensors in float32, and has no second derivatives.

The C interface takes on trust what it is given, and elements that it does not know, long names and cells without
volume end in zeros, NaN or a dead process: all that is checked here.
"""

from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

from segnn_ase.base.dispersion_name import parse_dispersion
from segnn_ase.base.errors import ConfigError, MissingExtraError, StructureError
from segnn_ase.structure.neighbors import check_density, check_geometry, compact, wrap_into_box

CLASSES = {  # of the library, for each damping
    "d3bj": "RationalDampingParam",
    "d3zero": "ZeroDampingParam",
    "d3bjm": "ModifiedRationalDampingParam",
    "d3zerom": "ModifiedZeroDampingParam",
}
HEAVIEST = 103  # of the elements with parameters
# Bohr: reach of pairs, triples and coordination numbers as the library has it by default, and over which its pairs are
# switched off, which it leaves to its users: cut at 60 they jump by up to 1e-7 eV each, and forces and stress would be
# no derivatives. Energies differ by 0.1 meV/atom in silicon, 0.01 in water and not in a molecule. What is left is that
# neighbours cease to count at 40, with 1e-6 of one.
REACH = {"disp2": 60.0, "disp3": 40.0, "cn": 40.0, "width2": 10.0}


class Dispersion(NamedTuple):
    """What dispersion adds to a structure."""

    energy: float  # eV
    forces: np.ndarray | None  # (N, 3) eV/Å
    virial: np.ndarray | None  # (3, 3) eV, dE/d(strain): stress times volume


def require_dispersion(name: str, species: list[int]) -> None:
    """Raise MissingExtraError without the library, ConfigError for a functional or an element that it has not."""
    _damping(name)
    if unknown := [z for z in species if not 0 < z <= HEAVIEST]:
        raise ConfigError(
            f"dispersion is {name!r}, but D3 has no parameters for {chemical_symbols[unknown[0]]}; expected elements "
            f"up to {chemical_symbols[HEAVIEST]}"
        )


def dispersion_of(name: str, atoms: Atoms, *, derivatives: bool = True) -> Dispersion:
    """Energy, and with `derivatives` forces and virial. Raises like `require_dispersion`, and StructureError."""
    found = _evaluated(name, atoms, "get_dispersion", grad=derivatives)
    energy = float(found["energy"]) * Hartree
    if not derivatives:
        return Dispersion(energy, None, None)
    return Dispersion(energy, -found["gradient"] * (Hartree / Bohr), found["virial"] * Hartree)


def dispersion_energies(name: str, atoms: Atoms) -> np.ndarray:
    """Half of the energy of every pair for either atom, (N,) eV."""
    pairs = _evaluated(name, atoms, "get_pairwise_dispersion")["additive pairwise energy"]
    return Hartree * pairs.sum(axis=1)


def dispersion_hessian(name: str, atoms: Atoms) -> np.ndarray:
    """Second derivatives with respect to the positions, analytic, (3N, 3N) eV/Å^2."""
    return _evaluated(name, atoms, "get_hessian")["hessian"] * (Hartree / Bohr**2)


def _damping(name: str) -> Any:
    """The parameters of the library for a setting; made anew in microseconds, as kept ones outlive it at exit."""
    library = _library(name)
    kind, _, functional = parse_dispersion(name).partition(":")
    try:
        return getattr(library, CLASSES[kind])(method=functional)
    except RuntimeError as error:
        raise ConfigError(
            f"dispersion is {name!r}, but dftd3 has no parameters of {kind} for {functional!r} ({error}); expected a "
            "functional of its list, such as pbe, rpbe, blyp, b3lyp, pbe0, scan"
        ) from error


def _library(name: str) -> Any:
    try:
        from dftd3 import interface
    except ImportError as error:
        raise MissingExtraError(
            f"dispersion {name!r} needs dftd3: pip install 'segnn-ase[dispersion]' (or pip install dftd3)"
        ) from error
    return interface


def _evaluated(name: str, atoms: Atoms, method: str, **how) -> dict:
    """What a method of the library's model says of a structure, in atomic units."""
    require_dispersion(name, np.unique(atoms.numbers).tolist())
    try:
        model = _library(name).DispersionModel(atoms.numbers, *_prepared(atoms))
        model.set_realspace_cutoff(**REACH)
        found = getattr(model, method)(_damping(name), **how)
    except RuntimeError as error:
        raise StructureError(f"dftd3 cannot evaluate the dispersion {name!r} of the structure: {error}") from error
    if not all(np.isfinite(value).all() for value in found.values()):
        raise StructureError(f"dftd3 gives a dispersion {name!r} that is not finite: check positions, cell and pbc")
    return found


def _prepared(atoms: Atoms) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Positions and a box around them in Bohr, and in which directions it repeats.

    The library wraps atoms into the box in all directions, so that it must enclose them in those that do not repeat;
    atoms that are out of each other's reach come nearer, and stay out of it.
    """
    if not atoms.pbc.any():
        check_geometry(atoms.positions, atoms.cell.array, atoms.pbc)
        return atoms.positions / Bohr, None, None
    cell, _ = compact(atoms.cell.array, atoms.pbc)
    positions, box, pbc, _ = wrap_into_box(atoms.positions, cell, atoms.pbc, REACH["disp2"] * Bohr)
    check_density(len(positions), box, pbc, REACH["disp2"] * Bohr)
    return positions / Bohr, box / Bohr, pbc
