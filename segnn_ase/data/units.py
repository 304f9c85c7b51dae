"""Units that a file states, in eV and Å."""

import re
from typing import NamedTuple

from ase import units

from segnn_ase.base.errors import DataError
from segnn_ase.base.label_names import LENGTHS, unit_of_what, usual_name

POWERS = {"energy": (1, 0), "forces": (1, -1), "stress": (1, -3), "virial": (1, 0), "length": (0, 1)}
ATOMIC = {"energy": "Ha", "forces": "Ha/Bohr", "stress": "Ha/Bohr^3", "virial": "Ha", "length": "Bohr"}


class Unit(NamedTuple):
    value: float  # in eV and Å
    energy: int = 0  # power
    length: int = 0


KNOWN = {
    "ev": Unit(1.0, 1, 0),
    "mev": Unit(1e-3, 1, 0),
    **dict.fromkeys(("ha", "hartree", "hartrees", "eh"), Unit(units.Hartree, 1, 0)),
    **dict.fromkeys(("ry", "rydberg"), Unit(units.Rydberg, 1, 0)),
    **dict.fromkeys(("kcal",), Unit(units.kcal, 1, 0)),
    **dict.fromkeys(("kj",), Unit(units.kJ, 1, 0)),
    "j": Unit(units.J, 1, 0),
    "mol": Unit(units.mol),
    **dict.fromkeys(("å", "a", "ang", "angs", "angstrom", "angstroms", "ångström"), Unit(1.0, 0, 1)),
    **dict.fromkeys(("bohr", "bohrs"), Unit(units.Bohr, 0, 1)),
    "nm": Unit(10.0, 0, 1),
    "pm": Unit(0.01, 0, 1),
    "gpa": Unit(units.GPa, 1, -3),
    "kbar": Unit(0.1 * units.GPa, 1, -3),
    "bar": Unit(1e-4 * units.GPa, 1, -3),
    "pa": Unit(units.Pascal, 1, -3),
}
TOKEN = re.compile(r"\s*([/*·]?)\s*([^\W\d_]+)(?:\^|\*\*)?\{?(-?\d+)?\}?\s*")


def unit_value(text: str, kind: str, where: str) -> float:
    """A unit in eV, eV/Å, eV/Å^3 or Å, by the kind of what it is said of. Raises DataError for what is none."""
    plain = ATOMIC[kind] if text.strip().lower() in ("a.u.", "au", "atomic", "atomic units") else text
    found = parse_unit(plain)
    if found is None or (found.energy, found.length) != POWERS[kind]:
        raise DataError(
            f"{where} says that its {kind} is in {text!r}, which is no known unit of it: convert it to "
            f"{ {'energy': 'eV', 'virial': 'eV', 'forces': 'eV/Å', 'stress': 'eV/Å^3', 'length': 'Å'}[kind] } "
            "and take that statement out of the file"
        )
    return found.value


def parse_unit(text: str) -> Unit | None:
    """Products and quotients such as kcal/mol/Ang, Ha bohr^-1 or kJ/(mol*nm); None where a part is unknown."""
    text = re.sub(
        r"\(([^()]*)\)",
        lambda m: re.sub(r"[\s*·]+", "/", m[1].strip()),
        text.replace(" per ", "/").replace("\u2212", "-"),
    )
    value, energy, length, end = 1.0, 0, 0, 0
    while end < len(text):
        token = TOKEN.match(text, end)
        name = token[2] if token else ""
        part = KNOWN.get(name.lower()) if not name.startswith("Me") else None  # mega is not milli
        if token is None or part is None:
            return None
        power = int(token[3] or "1") * (-1 if token[1] == "/" else 1)
        value, energy, length = value * part.value**power, energy + power * part.energy, length + power * part.length
        end = token.end()
    return Unit(value, energy, length)


def stated_units(info: dict) -> dict[str, str]:
    """Units by what they are said of, in small letters: energy_unit=kcal/mol gives {"energy": "kcal/mol"}."""
    found = {}
    for name, value in info.items():
        what = unit_of_what(str(name))
        if what is not None and isinstance(value, str) and value.strip():
            found[what] = value
        elif what == "" and isinstance(value, dict):
            found |= {str(key).lower(): unit for key, unit in value.items() if isinstance(unit, str)}
    return found


def unit_of(stated: dict[str, str], name: str, kind: str) -> str | None:
    """What is stated for the label of this name, else for its kind; None where nothing is."""
    lower, own = name.lower(), usual_name(name)
    if lower in stated:
        return stated[lower]
    alike = [(usual_name(what), unit) for what, unit in stated.items()]
    prefixes = ("",) if own is None else (own.prefix, "")
    return next((unit for prefix in prefixes for other, unit in alike if other == (kind, prefix)), None)


def unit_names(info: dict) -> list[str]:
    """Entries that state a unit of labels or positions."""
    return [name for name in info if (what := stated_units({name: info[name]})) and any(map(_is_of_labels, what))]


def _is_of_labels(what: str) -> bool:
    return what in LENGTHS or what == "" or usual_name(what) is not None


def length_unit(info: dict, where: str) -> float:
    """What positions and cell are to be multiplied by, Å; 1 where nothing is stated."""
    for what, unit in stated_units(info).items():
        if what in LENGTHS:
            return unit_value(unit, "length", where)
    return 1.0
