"""Whom a run asks for forces, whatever calculator that is: who it is, and how far it trusts itself.

ASE's sums of calculators (`ase.calculators.mixing`) drop what their parts say besides energy, forces and stress, so
that the parts are asked.
"""

import math

import numpy as np
from ase import Atoms
from ase.calculators.mixing import Mixer
from ase.io.jsonio import encode

SAME_FORCES = 5e-3  # eV/Å, and of the largest force: more than rounding, less than another potential


def summands(calc, weight: float = 1.0) -> list[tuple]:
    """The calculators that a calculator adds up, each with its weight; itself where it is none of ASE's sums."""
    mixer = getattr(calc, "mixer", None)
    if not isinstance(mixer, Mixer):
        return [(calc, weight)]
    return [part for c, w in zip(mixer.calcs, mixer.weights, strict=True) for part in summands(c, weight * w)]


def forget(calc) -> None:
    """Let ASE's sums, which do not look at `info`, compute again; the calculators in them look by themselves."""
    mixer = getattr(calc, "mixer", None)
    if isinstance(mixer, Mixer):
        calc.atoms = None
        for part in mixer.calcs:
            forget(part)


def forces_std(calc) -> np.ndarray | None:
    """Standard deviations of the forces (N, 3) eV/Å; None where no part gives them. Those of parts add up."""
    found = [abs(weight) * part.results["forces_std"] for part, weight in summands(calc) if _says(part, "forces_std")]
    return sum(found[1:], found[0]) if found else None


def outside_domain(calc) -> list | None:
    """In which ways the structure is outside the training data of a part; None where no part has a domain."""
    found = [part.results["outside_domain"] for part, _ in summands(calc) if _says(part, "outside_domain")]
    return [way for ways in found for way in ways] if found else None


def _says(calc, name: str) -> bool:
    return name in getattr(calc, "results", {})


def largest_forces_std(calc) -> float:
    """NaN where no part gives them, eV/Å."""
    found = forces_std(calc)
    return math.nan if found is None else float(np.max(found))


def identity(atoms: Atoms, without: tuple[str, ...] = ()) -> dict[str, str]:
    """What the forces depend on besides the positions, by name and in words: the same in every process.

    without: names of what they are told that does not count."""
    parts = summands(atoms.calc)
    found: dict[str, str] = {}
    for n, (calc, weight) in enumerate(parts, 1):
        name = "calculator" if len(parts) == 1 else f"calculator {n}"
        found[name] = type(calc).__name__ if weight == 1 else f"{weight:g} {type(calc).__name__}"
        settings = calc.todict() if hasattr(calc, "todict") else {}
        found |= {f"{name}.{key}": text for key, value in settings.items() if (text := _as_json(value))}
    found["constraints"] = ", ".join(_as_json(c) or type(c).__name__ for c in atoms.constraints) or "none"
    for name, values in (
        ("charges", atoms.get_initial_charges()),
        ("magnetic moments", atoms.get_initial_magnetic_moments()),
    ):
        found[name] = _as_json(values.tolist()) if values.any() else "none"
    for calc, _ in parts:  # what it is told besides
        for name in (name for name in getattr(calc, "told_names", ()) if name not in without):
            value = atoms.arrays.get(name, atoms.info.get(name))
            found |= {} if value is None else {name: _as_json(np.asarray(value).tolist())}
    return found


def _as_json(value) -> str:
    """As JSON; empty for what has no such form, as a function."""
    try:
        return encode(value)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return ""


def differences(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str | None, str | None]]:
    """Names of what is not the same, with both values; of another calculator not its settings."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [(n, old.get(n), new.get(n)) for n in names if "." not in n or n.partition(".")[0] not in names]


def far_apart(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether forces (N, 3) eV/Å on the same positions are of two potentials."""
    return not np.abs(new - old).max() <= SAME_FORCES * (1 + np.abs(old).max())
