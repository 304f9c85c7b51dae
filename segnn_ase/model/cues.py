"""Physical cues as steerable attributes: what is known of atoms steers their updates, what is known of pairs messages.

Every attribute is a polynomial of the cues and even under time reversal, so that the energy is smooth at zero cues,
where it is that of a network without them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segnn_ase.model.irreps import SCALAR, Kind, clebsch_gordan
from segnn_ase.structure.cue_settings import Cue


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


def update_terms(cues: Sequence[Cue]) -> tuple[Term, ...]:
    """What steers an atom besides its neighbours."""
    return _terms(cues, _of_node)


def message_terms(cues: Sequence[Cue]) -> tuple[Term, ...]:
    """What steers a message besides its direction."""
    return _terms(cues, _of_pair)


def _terms(cues: Sequence[Cue], outs) -> tuple[Term, ...]:
    found, first = [], 0
    for cue in (cue for cue in cues if cue.size):
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


def scalars_alone(terms: Sequence[Term]) -> int:
    """How many of the terms of messages multiply scalars alone, which gate all else: all, where all are scalars.

    A step is a fifth cheaper so; but what moments do to directions (spin-orbit coupling) is learned less well then.
    """
    return len(terms) if set(kinds_of(terms)) <= {SCALAR} else 0


def steering(terms: Sequence[Term], own: Tensor, other: Tensor) -> Tensor:
    """Attributes (n, sum of 2l+1) of some terms, from the cues (n, width) of the same or of two atoms."""
    parts = [
        torch.einsum("na,nb,abc->nc", own[:, t.columns], other[:, t.columns], t.table.to(own))
        if t.squared
        else own[:, t.columns]
        for t in terms
    ]
    return torch.cat(parts, dim=1) if parts else own[:, :0]
