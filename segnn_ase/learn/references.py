"""References by name: which calculator that is, how it is installed, and under which licence its results stand."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segnn_ase.base.errors import ConfigError


class Reference(NamedTuple):
    """A calculator that a process can make, and what is to be told of it."""

    about: str
    factory: str  # module:name, called with the arguments
    arguments: Mapping[str, Any] = {}
    package: str = ""  # what pip installs
    licence: str = "not known here: see its authors"
    remembers: bool = False  # whether a label would depend on the one before: it is made anew for each
    strict: bool = False  # whether its default parameters are all that it has, though it takes others without a word
    periodic: bool = True
    sums_charges: bool = False  # whether initial charges of the atoms tell it the total charge
    told: Mapping[str, str] = {}  # entry of `Atoms.info`, charge or spin (multiplicity): the argument for it


CHARGED = {"charge": "charge", "spin": "multiplicity"}
XTB = Reference(
    *("", "tblite.ase:TBLite", {}, "tblite", "LGPL-3.0 (tblite)"),
    remembers=True,
    strict=True,
    sums_charges=True,
    told=CHARGED,
)
SEVENNET = Reference(
    "", "sevenn.calculator:SevenNetCalculator", {}, "sevenn", "MIT (sevenn 0.13; of older ones see theirs)"
)
REFERENCES = {
    "gfn2-xtb": XTB._replace(
        about="GFN2-xTB (Bannwarth, Ehlert, Grimme 2019)", arguments={"method": "GFN2-xTB", "verbosity": 0}
    ),
    "gfn1-xtb": XTB._replace(
        about="GFN1-xTB (Grimme, Bannwarth, Shushkov 2017)", arguments={"method": "GFN1-xTB", "verbosity": 0}
    ),
    "sevennet-l3i5": SEVENNET._replace(
        about="SevenNet-l3i5, PBE(+U) of MPtrj (Park et al. 2024)", arguments={"model": "7net-l3i5", "device": "auto"}
    ),
    "sevennet-0": SEVENNET._replace(
        about="SevenNet-0, PBE(+U) of MPtrj (Park et al. 2024)", arguments={"model": "7net-0", "device": "auto"}
    ),
    "chgnet": Reference(
        "CHGNet, PBE(+U) of MPtrj (Deng et al. 2023)",
        "chgnet.model.dynamics:CHGNetCalculator",
        {},
        "chgnet",
        "BSD-3-Clause-LBNL (chgnet)",
    ),
    "mace-mp": Reference(
        "MACE-MP-0 medium, PBE(+U) of MPtrj (Batatia et al. 2024); it downloads its weights",
        "mace.calculators:mace_mp",
        {"model": "medium", "default_dtype": "float64"},
        "mace-torch",
        "MIT (mace-torch), weights as their card says",
    ),
    "pyscf": Reference(
        "density functional theory of molecules with PySCF; arguments xc, basis, charge, multiplicity, density_fit",
        "segnn_ase.learn.pyscf_molecules:MoleculeDFT",
        {},
        "pyscf",
        "Apache-2.0 (PySCF)",
        remembers=True,
        told=CHARGED,
        periodic=False,
    ),
    "emt": Reference(
        "effective medium theory of ASE, for trying things out", "ase.calculators.emt:EMT", {}, "ase", "LGPL-2.1 (ASE)"
    ),
}


def resolve_reference(name: str, arguments: Mapping[str, Any] | None = None) -> Reference:
    """The reference of a short name or of "module:Class", with these arguments before its own.

    Arguments that name files in the current folder become absolute paths. Raises ConfigError for what is neither.
    """
    given = {key: _absolute(value) for key, value in (arguments or {}).items()}
    if name in REFERENCES:
        known = REFERENCES[name]
        return known._replace(arguments={**known.arguments, **given})
    module, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        close = difflib.get_close_matches(name, REFERENCES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"short names: {', '.join(REFERENCES)}"
        raise ConfigError(
            f"reference is {name!r}; expected a short name, or an ASE calculator as module:Class, such as "
            f"ase.calculators.emt:EMT; {hint}"
        )
    return Reference(name, name, given)


def _absolute(value: Any) -> Any:
    """Workers have folders of their own."""
    if isinstance(value, str) and Path(value).is_file():
        return str(Path(value).resolve())
    return value
