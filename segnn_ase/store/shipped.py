"""Where a model lies: a path, or the name of a potential that comes with the package."""

import os
from pathlib import Path

from segnn_ase.base.errors import expect
from segnn_ase.base.files import home_expanded, is_file


def find_model(model: "str | Path") -> Path:
    """Return the path of a model given by path, or by the name of a shipped potential."""
    expect(
        isinstance(model, str | os.PathLike), "model", model, "a path, the name of a shipped potential or a Potential"
    )
    path = home_expanded(model, "model")
    if is_file(path):
        return path
    shipped = shipped_potentials()
    if str(model) in shipped:
        return shipped[str(model)]
    raise FileNotFoundError(
        f"model is {str(model)!r}: there is no such file (working folder {Path.cwd()}), "
        f"and no such shipped potential; shipped are {', '.join(shipped) or 'none'}"
    )


def shipped_potentials() -> dict[str, Path]:
    """Names and files of the potentials that come with the package, installed or in a checkout."""
    package = Path(__file__).parents[1]
    checkout = (package.parent / "pyproject.toml").is_file()
    folder = (package.parent if checkout else package) / "potentials"
    return {path.parent.name: path for path in sorted(folder.glob("*/model.pt"))}
