"""What a property is: of structures or of atoms, how it turns, and its labels as components of irreps."""

from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.base.errors import ConfigError
from segnn_ase.model.irreps import SCALAR, Irreps, Kind, kinds, matrices_of, parse_irreps, spherical_kinds
from segnn_ase.model.settings import ModelConfig

POOLINGS = {"structure": ("sum", "mean"), "atom": ("free", "zero")}
AXIAL = {  # vectors that mirrors keep
    *("magmom", "magmoms", "magnetic_moment", "magnetic_moments", "magnetic_dipole", "magnetization"),
    *("angular_momentum", "torque", "torques", "spin", "spins"),
}
UNKNOWN = {"model": "model", "then": "Train one on frames of all these elements"}  # for messages about elements
SYMMETRIC, GENERAL = "1x0e+1x2e", "1x0e+1x1e+1x2e"


class Target(NamedTuple):
    """A property to be learned."""

    name: str
    per: str  # "structure" or "atom"
    shape: tuple[int, ...]  # of a label: () a number, (3,) a vector, (3, 3) a matrix, (n,) components of irreps
    irreps: str  # in e3nn's notation and order
    pooling: str  # of structures "sum" or "mean" over atoms; of atoms "free", or "zero" where they add up to nothing

    @property
    def dim(self) -> int:
        return Irreps(self.irreps).dim

    @property
    def scalars(self) -> list[int]:
        """Components of irreps that are 0e."""
        return [start for (_, ir), start in self._components() if ir == SCALAR]

    @property
    def kind_of_component(self) -> list[int]:
        """(dim,) the number of its irrep, in the order in which they first come."""
        order = list(dict.fromkeys(ir for (_, ir), _ in self._components()))
        return [order.index(ir) for (_, ir), _ in self._components() for _ in range(ir.dim)]

    def _components(self) -> list[tuple[tuple[int, Kind], int]]:
        """Every single irrep and its first component."""
        found, start = [], 0
        for mul, ir in Irreps(self.irreps):
            for _ in range(mul):
                found.append(((1, ir), start))
                start += ir.dim
        return found

    def components(self, labels: Tensor) -> Tensor:
        """Labels (n, *shape) as components of irreps (n, dim)."""
        return labels.flatten(1) @ self._basis(labels) if self.shape == (3, 3) else labels.reshape(len(labels), -1)

    def labels(self, components: Tensor) -> Tensor:
        """The inverse of `components`; of a matrix the part that these irreps have."""
        values = components @ self._basis(components).T if self.shape == (3, 3) else components
        return values.reshape(len(values), *self.shape)

    def _basis(self, like: Tensor) -> Tensor:
        return torch.cat([matrices_of(ir.l) for _, ir in Irreps(self.irreps)], dim=1).to(like)


def is_of_matrix(irreps: str) -> bool:
    """Whether these irreps are of a 3 x 3 matrix, or of a part of one: degrees 0, 1 and 2, each once or not at all."""
    degrees = [ir.l for mul, ir in Irreps(irreps) for _ in range(mul)]
    return bool(degrees) and max(degrees) <= 2 and len(set(degrees)) == len(degrees)


def irreps_of(name: str, per: str, shape: tuple[int, ...], symmetric: bool, given: str | None) -> str:
    """How a property turns: as given, else by its shape. Raises ConfigError where neither is enough."""
    if given is not None:
        return checked_irreps(name, shape, given)
    if shape == (3, 3):
        return SYMMETRIC if symmetric else GENERAL
    if shape == (3,):
        return "1x1e" if name.lower() in AXIAL else "1x1o"
    if shape == ():
        return "1x0e"
    raise ConfigError(
        f"target {name!r} has {shape[0]} numbers {'an atom' if per == 'atom' else 'a structure'}, which can turn in "
        f"more than one way; give irreps.{name}, as {shape[0]}x0e for invariants"
    )


def checked_irreps(name: str, shape: tuple[int, ...], given: str) -> str:
    """The irreps as they are written. Raises ConfigError where they do not fit the shape of the labels."""
    written = given_irreps(name, given)
    if shape == (3, 3):
        return written  # of a matrix, or it would not have been taken for one
    size = shape[0] if shape else 1
    if Irreps(written).dim != size:
        raise ConfigError(
            f"setting 'data.irreps.{name}' is {given!r}, of {Irreps(written).dim} components; labels have {size}"
        )
    return written


def given_irreps(name: str, given: str) -> str:
    """The irreps as they are written, without those of which there are none. Raises ConfigError for what is none."""
    try:
        parse_irreps(given)
    except ValueError as error:
        raise ConfigError(f"setting 'data.irreps.{name}': {error}") from None
    written = Irreps((mul, ir) for mul, ir in Irreps(given) if mul)
    if not written:
        raise ConfigError(f"setting 'data.irreps.{name}' is {given!r}; expected some, such as 1x1o")
    return str(written)


def refuse_unreachable(targets: list[Target], config: ModelConfig) -> None:
    """Raise ConfigError for a property that the last product of a network, features by harmonics, cannot give."""
    hidden, attributes = kinds(parse_irreps(config.hidden_irreps)), spherical_kinds(config.lmax_attr)
    for target in targets:
        for _, ir in Irreps(target.irreps):
            if any(abs(a.l - b.l) <= ir.l <= a.l + b.l and a.p * b.p == ir.p for a in hidden for b in attributes):
                continue
            raise ConfigError(
                f"target {target.name!r} turns as {target.irreps}, of which {ir} is out of reach of hidden_irreps "
                f"{config.hidden_irreps!r} with lmax_attr {config.lmax_attr}; add 8x{ir} to hidden_irreps, or leave "
                "out what cannot be"
            )
