"""The setting `dispersion`, a text such as "d3bj:pbe": a damping function of D3 and a functional."""

import re

from segnn_ase.base.errors import expect

DAMPINGS = ("d3bj", "d3zero", "d3bjm", "d3zerom")  # Becke-Johnson (rational), zero, and both as modified by Smith
FORM = re.compile(rf"({'|'.join(DAMPINGS)}):[a-z0-9][a-z0-9+_-]{{0,31}}", re.ASCII)  # dftd3 dies of longer names
EXPECTED = f"a damping ({', '.join(DAMPINGS)}) and a functional, such as 'd3bj:pbe'"


def parse_dispersion(text: object) -> str:
    """The setting in lower case. Raises ConfigError for what is none; whether the functional is known is not asked."""
    name = text.strip().lower() if isinstance(text, str) else ""
    expect(is_dispersion(name), "dispersion", text, EXPECTED)
    return name


def is_dispersion(name: str) -> bool:
    return FORM.fullmatch(name) is not None
