"""Landmarks of the training frames' surroundings, and limits of how far from them others may be: see `model.newness`.

Landmarks are fingerprints of training atoms that lie far apart, in the scale of their widths. Limits are those that
held-out training frames keep to.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.model.fingerprints import (
    COMPONENTS,
    LMAX,
    MIXED,
    RADIAL,
    SPECTRUM,
    Fingerprints,
    element_channels,
    groups_by_element,
    measure_fingerprints,
    power_spectra,
)
from segnn_ase.model.newness import Landmarks, Landscape, mean_and_spread, newness_of

LANDMARKS = 256  # of an element
ATOMS = 4000  # of an element that are looked at
FOLDS = 5
PARTITIONS = 5  # into folds
CHUNK = 1000  # atoms at a time
NEAREST = 5  # fingerprints that a width is taken over
NARROWEST = 0.3  # of the wide ones: a crystal without any motion says nothing of how far it may move
SAME = 1e-4  # relative: structures as alike are one, however often they are turned, shifted or repeated
MOST = 0.99  # of the held-out frames are inside
MARGINS = (1.4, 1.1, 1.1)  # times what these reach: any atom, mean of the atoms, means of the structure
ROOM = (1.0, 1.0, 1.8)  # limits are at least so many times the median: frames of one run are like each other
ODD = 4.0  # and they follow the frames up to so many medians: a kind of frames that is one fold's is no measure
FEW = 2.0  # the margin is wider by this over the number of frames
ENOUGH = 1 / (1 - MOST)  # frames that tell this quantile
NOWHERE = 1e6  # where the landmarks lie of an element that was never seen


class Seen(NamedTuple):
    """A training structure: its elements (N,) and coefficients (N, C * RADIAL, HARMONICS)."""

    kind: Tensor
    c: Tensor


class _Element(NamedTuple):
    """What is known of one element."""

    mixing: Tensor
    mean: Tensor
    axes: Tensor
    atoms: tuple[Tensor, Tensor]  # points and widths
    structures: tuple[Tensor, Tensor]
    fewest: int

    def fingerprints(self, c: Tensor) -> Tensor:
        return (power_spectra(c, self.mixing) - self.mean) @ self.axes


def measure_landmarks(seen: list[Seen], n_species: int, before: Landscape | None = None) -> Landscape | None:
    """From training structures; None where they are too few to say anything.

    before: of the potential that was fine-tuned, whose surroundings and limits stay; what would widen these limits, as
    new frames are few and of many kinds, widens the new landmarks alone.
    """
    channels = element_channels(n_species) if before is None else before.fingerprints.channels
    group = groups_of_copies(seen)
    used = _used_by_held_out(channels, seen, group, before)
    if not used:
        return before and _known(channels, _elements(seen, group, n_species, before), before.limits)
    (usual, most), wider = np.quantile(used, [0.5, MOST], axis=0), wider_of_few(len(set(group)))
    most = usual + wider * (np.minimum(most, wider * ODD * usual) - usual)
    limits = most * (np.array(MARGINS) + FEW / len(seen))
    limits = np.maximum(limits, np.array(ROOM) * usual)
    if before is None:
        return _known(channels, _elements(seen, group, n_species, None), tuple(limits.tolist()))
    more = np.maximum(limits / before.limits, 1.0)
    return _known(channels, _elements(seen, group, n_species, before, (max(more[:2]), more[2])), before.limits)


def _used_by_held_out(
    channels: Tensor, seen: list[Seen], group: list[int], before: Landscape | None
) -> list[tuple[float, float, float]]:
    """How new structures are to those of other folds and from before; empty for too few.

    Medians over partitions into folds, as in a single one the few frames of a kind may all be in one fold. Without
    those that have an element which the others lack: to them everything of it is equally new.
    """
    number, rng = np.array(group), np.random.default_rng(0)
    used: list[list[tuple[float, float, float]]] = [[] for _ in seen]
    for _ in range(PARTITIONS if len(set(group)) >= FOLDS else 0):
        fold = rng.permutation(number.max() + 1)[number] % FOLDS
        for k in range(FOLDS):
            rest = np.flatnonzero(fold != k)
            rows = _elements([seen[n] for n in rest], [group[n] for n in rest], len(channels), before)
            known = _known(channels, rows, (1.0, 1.0, 1.0))
            for n in np.flatnonzero(fold == k):
                if bool((known.fewest[seen[n].kind] > 0).all()):
                    used[n].append(_used(known, seen[n]))
    return [tuple(np.median(one, axis=0)) for one in used if one]


def wider_of_few(frames: int) -> float:
    """How much further out than the most that a few frames reach is what all but one in `ENOUGH` keep to; 1 for many.

    In a tail that is exponential, of decay length 1, the largest of n is about log n from the usual, and one in m is
    beyond log m.
    """
    return math.log(ENOUGH) / math.log(min(max(frames, 2), ENOUGH))


def groups_of_copies(seen: list[Seen]) -> list[int]:
    """A number for each structure, 0, 1, ..., the same for copies."""
    squares = torch.stack(
        [torch.cat([s.c[..., l * l : (l + 1) ** 2].square().sum(2).mean(0) for l in range(LMAX + 1)]) for s in seen]
    )
    rows = squares / squares.norm(dim=1, keepdim=True).clamp_min(1e-300)
    first = (torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") < SAME).int().argmax(1)
    return first.unique(return_inverse=True)[1].tolist()


def _used(known: Landscape, seen: Seen) -> tuple[float, float, float]:
    groups = groups_by_element(seen.kind)
    atoms, structure = newness_of(known, known.fingerprints.of(seen.c, groups), groups)
    return float(atoms.max()), float(atoms.mean()), float(structure.max())


def _elements(
    seen: list[Seen],
    group: list[int],
    n_species: int,
    before: Landscape | None,
    more: tuple[float, float] = (1.0, 1.0),
) -> "list[_Element | None]":
    """more: times the widths of landmarks, of atoms and of structures, that were not there before."""
    rows = []
    for k in range(n_species):
        own = [n for n, s in enumerate(seen) if bool((s.kind == k).any())]
        clouds, groups = [seen[n].c[seen[n].kind == k] for n in own], torch.tensor([group[n] for n in own])
        known = None if before is None or not before.fewest[k] else _element_of(before, k)
        rows.append(_measure_element(clouds, groups, known, more) if clouds else known)
    return rows


def _measure_element(
    clouds: list[Tensor], group: Tensor, before: _Element | None, more: tuple[float, float]
) -> _Element:
    """From the coefficients of its atoms in each structure that has it."""
    c = torch.cat(clouds)
    frame = torch.repeat_interleave(torch.tensor([len(cloud) for cloud in clouds]))
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(c))[:ATOMS])
    row = before or _Element(*measure_fingerprints(c[chosen]), (), (), 0)
    summaries = torch.stack([mean_and_spread(row.fingerprints(cloud)) for cloud in clouds])
    atoms = _landmarks(row.fingerprints(c[chosen]), group[frame[chosen]], before and before.atoms, more[0])
    structures = _landmarks(summaries, group, before and before.structures, more[1])
    fewest = min([len(cloud) for cloud in clouds] + ([before.fewest] if before else []))
    return row._replace(atoms=atoms, structures=structures, fewest=fewest)


def _landmarks(y: Tensor, group: Tensor, before: "tuple[Tensor, Tensor] | None", more: float) -> tuple[Tensor, Tensor]:
    """Points far apart, of y (n, COMPONENTS) from so many groups and those known before, and their widths."""
    usual = float(torch.cdist(y, y).mean()) if before is None else float(before[1].median())
    points, widths = y, more * _widths(y, group, max(usual, 1e-3))
    if before is not None:
        points, widths = torch.cat([before[0], points]), torch.cat([before[1], widths])
    chosen, new = [0], torch.cdist(points, points[:1])[:, 0] / widths[0]
    while len(chosen) < LANDMARKS and float(new.max()) > 0.0:
        chosen.append(n := int(new.argmax()))
        new = torch.minimum(new, torch.cdist(points, points[n : n + 1])[:, 0] / widths[n])
    return points[chosen], widths[chosen]


def _widths(y: Tensor, group: Tensor, usual: float) -> Tensor:
    """Of every point (n,): its distance from the nearest of other groups, smoothed over its neighbours."""
    alone, near = [], []
    for part, its in zip(y.split(CHUNK), group.split(CHUNK), strict=True):
        distance = torch.cdist(part, y)
        near.append(distance.topk(min(NEAREST + 1, len(y)), largest=False).indices)
        alone.append(distance.masked_fill(its[:, None] == group, torch.inf).amin(1))
    found = torch.cat(alone)
    if bool(found.isinf().any()):  # a single group: how far its atoms are from each other is all there is
        return torch.full_like(found, usual)
    smooth = found[torch.cat(near)].quantile(0.75, dim=1)
    return smooth.clamp_min(max(NARROWEST * float(smooth.quantile(0.9)), 1e-6))


def _known(channels: Tensor, rows: "list[_Element | None]", limits: tuple[float, float, float]) -> Landscape:
    empty = _Element(
        torch.zeros(LMAX + 1, channels.shape[1] * RADIAL, MIXED),
        torch.zeros(SPECTRUM),
        torch.zeros(SPECTRUM, COMPONENTS),
        *((torch.full((1, width * COMPONENTS), NOWHERE), torch.ones(1)) for width in (1, 2)),
        0,
    )
    full = [row or empty for row in rows]
    tables = [torch.stack([getattr(row, name).float() for row in full]) for name in ("mixing", "mean", "axes")]
    return Landscape(
        Fingerprints(channels.float(), *tables),
        *(_padded([getattr(row, name) for row in full]) for name in ("atoms", "structures")),
        torch.tensor([row.fewest for row in full]),
        limits,
    )


def _padded(rows: "list[tuple[Tensor, Tensor]]") -> Landmarks:
    most = max(len(points) for points, _ in rows)
    index = [torch.arange(most).clamp_max(len(points) - 1) for points, _ in rows]
    return Landmarks(*(torch.stack([row[n][i].float() for row, i in zip(rows, index, strict=True)]) for n in (0, 1)))


def _element_of(known: Landscape, k: int) -> _Element:
    f = known.fingerprints
    landmarks = [(table.points[k].double(), table.widths[k].double()) for table in (known.atoms, known.structures)]
    return _Element(f.mixing[k].double(), f.mean[k].double(), f.axes[k].double(), *landmarks, int(known.fewest[k]))
