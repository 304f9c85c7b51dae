"""What a potential knows of its training when further elements are added to it: nothing of these, all of the others."""

import math

import torch
from torch import Tensor

from segnn_ase.model.fingerprints import CHANNELS, RADIAL, Fingerprints, element_channels
from segnn_ase.model.newness import NEVER, Bonds, KnownSurroundings, Landmarks, Landscape
from segnn_ase.trust.domain import Domain
from segnn_ase.trust.landmarks import NOWHERE


def domain_of_more(domain: Domain, n: int) -> Domain:
    """The domain for a potential with n species, of which the last ones were never seen."""
    old = len(domain.neighbors)
    closest = torch.full((n, n), math.inf, dtype=domain.closest.dtype)
    closest[:old, :old] = domain.closest
    neighbors = torch.cat([domain.neighbors, torch.tensor([[1, 0]]).repeat(n - old, 1)])
    around = domain.surroundings
    return domain._replace(
        closest=closest, neighbors=neighbors, surroundings=around and _surroundings_of_more(around, n)
    )


def _surroundings_of_more(known: KnownSurroundings, n: int) -> KnownSurroundings:
    place = known.landscape
    more = n - len(place.fewest)
    landscape = Landscape(
        _fingerprints_of_more(place.fingerprints, n),
        *(_landmarks_of_more(marks, more) for marks in (place.atoms, place.structures)),
        _with_rows(place.fewest, more, 0),
        place.limits,
    )
    gaps = known.bonds.gaps.new_zeros(n, n, 2)
    counts = torch.tensor(NEVER).repeat(n, n, 1)
    gaps[:-more, :-more], counts[:-more, :-more] = known.bonds.gaps, known.bonds.counts
    # an atom of before had no neighbour of the new elements
    counts[:-more, -more:] = 0
    return KnownSurroundings(landscape, Bonds(gaps, counts), known.crowding)


def _landmarks_of_more(marks: Landmarks, more: int) -> Landmarks:
    return Landmarks(_with_rows(marks.points, more, NOWHERE), _with_rows(marks.widths, more, 1.0))


def _fingerprints_of_more(f: Fingerprints, n: int) -> Fingerprints:
    """To an atom of a known element a neighbour of a new one looks like its usual neighbours."""
    old, channels = f.channels.shape
    wide = min(n, CHANNELS)
    rows = element_channels(n).to(f.channels)
    rows[:old] = torch.nn.functional.pad(f.channels, (0, wide - channels))
    mixing = f.mixing.unflatten(2, (channels, RADIAL))
    usual = mixing.mean(2, keepdim=True).expand(-1, -1, wide - channels, -1, -1)
    mixing = torch.cat([mixing, usual], 2).flatten(2, 3)
    return Fingerprints(rows, *(_with_rows(table, n - old, 0) for table in (mixing, f.mean, f.axes)))


def _with_rows(table: Tensor, more: int, value: float) -> Tensor:
    return torch.cat([table, table.new_full((more, *table.shape[1:]), value)])
