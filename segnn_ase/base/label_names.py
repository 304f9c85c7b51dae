"""Names of labels: which ones are read, and which only look like labels."""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ase.calculators.calculator import all_properties

WORDS = {  # a name that holds one of these words looks like a label
    "energy": {"energy", "energies", "e", "en", "etot", "toten"},
    "forces": {"force", "forces", "f", "frc", "gradient", "gradients", "grad"},
    "stress": {"stress", "stresses", "virial", "virials", "sigma"},
}
SETTINGS = set("cutoff kinetic fermi smearing field weight weights mask unit units threshold window tol".split())
LENGTHS = set("distance distances length lengths position positions coordinate coordinates coords pos r cell".split())
PREFIXES = (  # of what a calculation gave, in order of preference; never those of other potentials
    "ref reference dft target label labels true gt qm abinitio ab_initio lda pbe pbe0 pbesol revpbe blyp b3lyp scan "
    "rscan r2scan hf mp2 ccsd ccsdt vasp qe espresso cp2k castep aims orca gaussian psi4 pyscf gpaw"
).split()
BASES = {
    "energy": r"(?:total[_-]?|potential[_-]?)?energ(?:y|ies)|e",
    "free_energy": r"free[_-]?energ(?:y|ies)",
    "forces": r"forces?|f",
    "stress": r"stress(?:es)?(?:[_-]?tensor)?",
    "virial": r"virials?(?:[_-]?tensor)?",
}
BASE = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in BASES.items())
PREFIX = "|".join(sorted(PREFIXES, key=len, reverse=True))
USUAL = re.compile(rf"(?:(?P<prefix>{PREFIX})(?:[_.\- ]|(?=[a-z]{{4}})))?(?:{BASE})", re.IGNORECASE)


class UsualName(NamedTuple):
    """What a name says."""

    kind: str  # a key of `BASES`
    prefix: str  # one of `PREFIXES`, or ""


@lru_cache(maxsize=4096)
def usual_name(name: str) -> UsualName | None:
    """Which label has this name, in any case, singular or plural, with a prefix or without; None for other names."""
    found = USUAL.fullmatch(name)
    if found is None:
        return None
    return UsualName(next(kind for kind in BASES if found[kind]), (found["prefix"] or "").lower())


@lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))


def means_virial(name: str) -> bool:
    """Virials are minus stress times volume; a "virial stress" is a stress."""
    words = words_of(name)
    return bool(words & {"virial", "virials"}) and not words & {"stress", "stresses"}


def unit_of_what(name: str) -> str | None:
    """What a name states the unit of, in small letters: energy_unit gives energy, units ""; None for other names."""
    found = re.fullmatch(r"(.*?)[_\-. ]?units?", name.lower())
    return found[1] if found else None


def looks_like(name: str, value, size: int) -> str | None:
    """The kind of label that a name and the shape of its value suggest, for a structure of `size` atoms."""
    words = words_of(str(name))
    if words & SETTINGS or not any(words & known for known in WORDS.values()):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    shape, numeric = array.shape, array.dtype.kind in "fiu"
    fits = {"energy": shape in ((), (1,)), "forces": shape == (size, 3), "stress": shape in ((6,), (9,), (3, 3))}
    return next((kind for kind in WORDS if numeric and fits[kind] and words & WORDS[kind]), None)


def is_result(name: str, value, size: int) -> bool:
    """Is this what some calculation gave for a structure of `size` atoms, whatever the prefix?"""
    lower = str(name).lower()
    what = unit_of_what(lower)
    if what is not None and (what in LENGTHS or not what or usual_name(what)):
        return True  # a unit of labels that are not there any more
    if lower in ("initial_charges", "initial_magmoms"):
        return False
    is_property = any(lower == known or lower.endswith(f"_{known}") for known in all_properties)
    return is_property or usual_name(str(name)) is not None or looks_like(name, value, size) is not None
