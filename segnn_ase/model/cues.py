"""Physical cues as steerable attributes: what is known of atoms steers their updates, what is known of pairs messages.

Every attribute is a polynomial of the cues and even under time reversal, so that the energy is smooth at zero cues,
where it is that of a network without them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.base.errors import StructureError
from segnn_ase.model.cue_settings import CONJUGATES, Cue
from segnn_ase.model.irreps import SCALAR, Kind, clebsch_gordan

PLACES = {"node": "arrays", "graph": "info"}


class Term(NamedTuple):
    """An attribute: a cue's numbers, or their product with those of the same, or of the other, atom."""

    first: int  # of the columns of the cue
    degree: int  # l of the cue
    out: Kind
    squared: bool

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + 2 * self.degree + 1)

    @property
    def table(self) -> Tensor:
        """(2l+1, 2l+1, 2l_out+1), of the product."""
        return clebsch_gordan(self.degree, self.degree, self.out.l)


def width_of(cues: Sequence[Cue]) -> int:
    """Numbers that an atom has of all cues."""
    return sum(cue.size for cue in cues)


def node_terms(cues: Sequence[Cue]) -> tuple[Term, ...]:
    """What steers an atom besides its neighbours."""
    return _terms(cues, _of_node)


def pair_terms(cues: Sequence[Cue]) -> tuple[Term, ...]:
    """What steers a message besides its direction."""
    return _terms(cues, _of_pair)


def _terms(cues: Sequence[Cue], outs) -> tuple[Term, ...]:
    found, first = [], 0
    for cue in cues:
        degree = (cue.size - 1) // 2
        found += [Term(first, degree, kind, squared) for kind, squared in outs(cue)]
        first += cue.size
    return tuple(found)


def _of_node(cue: Cue) -> list[tuple[Kind, bool]]:
    if cue.kind == "axial":
        return [(SCALAR, True), *([(Kind(2, 1), True)] if cue.spin_orbit else [])]
    return [(Kind(1, -1) if cue.kind == "polar" else SCALAR, False)]


def _of_pair(cue: Cue) -> list[tuple[Kind, bool]]:
    if cue.kind == "axial":
        return [(Kind(l, 1), True) for l in ((0, 1, 2) if cue.spin_orbit else (0,))]
    return [(SCALAR, True)] if cue.kind == "scalar" and cue.per == "node" else []


def reach_of(terms: Sequence[Term]) -> int:
    """How many of the columns of cues they need."""
    return max((term.columns.stop for term in terms), default=0)


def kinds_of(terms: Sequence[Term]) -> tuple[Kind, ...]:
    return tuple(term.out for term in terms)


def steering(terms: Sequence[Term], own: Tensor, other: Tensor) -> Tensor:
    """Attributes (n, sum of 2l+1) of some terms, from the cues (n, width) of the same or of two atoms."""
    parts = [
        torch.einsum("na,nb,abc->nc", own[:, t.columns], other[:, t.columns], t.table.to(own))
        if t.squared
        else own[:, t.columns]
        for t in terms
    ]
    return torch.cat(parts, dim=1) if parts else own[:, :0]


def cues_of(atoms: Atoms, cues: Sequence[Cue]) -> Tensor:
    """The cues of a structure in their scales, (N, width) in float64, components of vectors times sqrt(3).

    Raises StructureError for what is missing, of another shape, not finite, or no integer where one is needed.
    """
    rows = [np.zeros((len(atoms), 0)), *(_scaled(cue, _value(atoms, cue)) for cue in cues)]
    if any(cue.name == "spin" for cue in cues):
        _check_electrons(atoms)
    return torch.from_numpy(np.concatenate(rows, axis=1))


def gradient_of(atoms: Atoms, cue: Cue, value: np.ndarray) -> np.ndarray:
    """A label of a cue's conjugate (N, size) as dE/d of what `cues_of` gives; along z where moments are along no axis.

    Raises StructureError for another shape.
    """
    name, sign = CONJUGATES[cue.name]
    value = np.asarray(value, dtype=float)
    if cue.size == 3 and value.shape == (len(atoms),):
        value = np.stack([np.full_like(value, np.nan), np.full_like(value, np.nan), value], axis=1)
    if value.size != len(atoms) * cue.size:
        raise StructureError(f"{name} have shape {value.shape}; expected {(len(atoms), cue.size)}")
    return sign * value.reshape(len(atoms), cue.size) * cue.unit


def names_of_responses(cues: Sequence[Cue]) -> tuple[str, ...]:
    """What `responses_of` gives."""
    return tuple(response_of(cue)[0] for cue in cues)


def response_of(cue: Cue) -> tuple[str, float]:
    """The name of a cue's conjugate, and the sign with which dE/dcue is it."""
    return CONJUGATES.get(cue.name, (f"d_energy_d_{cue.name}", 1.0))


def responses_of(atoms: Atoms, gradient: np.ndarray, cues: Sequence[Cue]) -> dict[str, np.ndarray | float]:
    """The cues' conjugates from dE/d of what `cues_of` gives (N, width), in the shape of the cues: magnetic forces
    -dE/dm, eV/μB, electronegativities dE/dq, eV/e, and of others dE/dcue, called "d_energy_d_" and their name."""
    found, first = {}, 0
    for cue in cues:
        name, sign = response_of(cue)
        slope = sign * gradient[:, first : first + cue.size] / cue.unit
        first += cue.size
        if cue.per == "graph":
            found[name] = float(slope.sum())
        elif cue.size == 1 or np.ndim(atoms.arrays.get(cue.name)) == 1:
            found[name] = slope[:, -1]  # along no axis is along z
        else:
            found[name] = slope
    return found


def _scaled(cue: Cue, value: np.ndarray) -> np.ndarray:
    """In units in which one is usual, and zero says nothing."""
    return (value - (cue.name == "spin")) / cue.unit


def _value(atoms: Atoms, cue: Cue) -> np.ndarray:
    """(N, size), in the cue's own unit."""
    place, n = f"atoms.{PLACES[cue.per]}[{cue.name!r}]", len(atoms)
    value = (atoms.arrays if cue.per == "node" else atoms.info).get(cue.name)
    if value is None:
        if cue.default == "error":
            raise StructureError(
                f"{place} is missing: this potential was told it of every structure that it learned, and has no default"
            )
        return np.broadcast_to(np.array(cue.default, dtype=float), (n, cue.size))
    shape = (n, cue.size) if cue.per == "node" else (cue.size,)
    try:
        value = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise StructureError(f"{place} is {value!r}; expected numbers of shape {shape}") from None
    if cue.kind == "axial" and value.shape == (n,):
        if cue.spin_orbit:
            raise StructureError(
                f"{place} has shape {(n,)}, moments along no axis in particular, and this potential couples them to "
                f"the directions of space: expected vectors of shape {shape}"
            )
        value = value[:, None] * np.array([0.0, 0.0, 1.0])  # along any axis: only their angles count
    if value.size != np.prod(shape) or (value.ndim > 1 and value.shape != shape):
        raise StructureError(f"{place} has shape {value.shape}; expected {shape}")
    if not np.isfinite(value).all():
        raise StructureError(f"{place} has NaN or infinite values; expected finite numbers")
    if cue.kind == "integer" and (value != np.round(value)).any():
        raise StructureError(f"{place} is {value.tolist()}; expected an integer")
    if cue.name == "spin" and (value < 1).any():
        raise StructureError(f"{place} is {value.tolist()}; expected a multiplicity 2S + 1, 1 or more")
    return np.broadcast_to(value.reshape(-1, cue.size), (n, cue.size))


def _check_electrons(atoms: Atoms) -> None:
    spin, charge = (
        float(np.asarray(atoms.info.get(name, usual)).item()) for name, usual in (("spin", 1), ("charge", 0))
    )
    electrons = int(atoms.numbers.sum() - charge)
    if (electrons + spin) % 2 == 0:
        raise StructureError(
            f"atoms.info['spin'] is {spin:g} with {electrons} electrons; an even number of electrons has an odd "
            "multiplicity 2S + 1, an odd number an even one"
        )
