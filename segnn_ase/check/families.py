"""Frames that a split must not part: copies, near copies, neighbours in a trajectory."""

from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from segnn_ase.check.findings import energies_per_atom
from segnn_ase.check.matching import Described, copies_among, trajectories
from segnn_ase.check.surroundings import survey
from segnn_ase.data.frames import Frame, told_inputs

BLOCKS = 5  # of trajectories, that a validation set is made of if it is large
SHORTEST = 10  # frames of a block, if the validation set is no smaller


def families(frames: list[Frame], count: int) -> list[int]:
    """A number for each frame, (n,), the same for those that belong on one side of a split; count: frames split off.

    Copies by symmetry are never parted. Trajectories and chains of near copies that are longer than `count` are cut
    into blocks.
    """
    structures = [f.atoms for f in frames]
    prints = [around.fingerprint for around in survey(structures).around]
    told = [told_inputs(f) for f in frames]
    found = copies_among(Described(structures, prints, energies_per_atom(frames), told))
    copies = connected_parts([(n, m) for n, m, kind in found if kind != "near"], len(frames))
    chains = [pair for members in trajectories(structures) for pair in pairwise(members)]
    numbers = connected_parts([(n, m) for n, m, _ in found] + chains, len(frames))
    length = max(1, min(count, max(SHORTEST, count // BLOCKS)))
    for number in np.flatnonzero(np.bincount(numbers, minlength=1) > max(count, 1)):
        kinds = dict.fromkeys(copies[numbers == number].tolist())  # in the order of their first frames
        for block in np.array_split(list(kinds), -(-len(kinds) // length))[1:]:
            numbers[np.isin(copies, block)] = numbers.max() + 1
    return numbers.tolist()


def connected_parts(pairs: list[tuple[int, int]], n: int) -> np.ndarray:
    """The number of the part of a graph of n nodes that each is in, (n,)."""
    i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
    return connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)[1]
