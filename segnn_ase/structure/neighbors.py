"""Neighbour lists: every pair within the cutoff, periodic images included, nothing truncated.

`neighbor_list` returns i, j, S as ASE and matscipy do: r_ij = positions[j] + S @ cell - positions[i],
with |r_ij| < cutoff, for the positions as given (atoms may lie outside the cell).
"""

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from ase.geometry import minkowski_reduce

from segnn_ase.base.errors import StructureError, expect, in_short


class Neighbors(NamedTuple):
    """Directed pairs j -> i, sorted by i, then j, then S."""

    i: np.ndarray  # (E,) receivers
    j: np.ndarray  # (E,) senders
    S: np.ndarray  # (E, 3) integer cell shifts of j


SKEWED = 2.0  # scalar products of lattice vectors, of the shortest one with itself
MOST_NEIGHBORS = 100_000  # of an atom
FARTHEST = 1e7  # Å; further out float64 has no digits left for distances
NO_PAIRS = Neighbors(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3), int))


def neighbor_list(positions, cell, pbc, cutoff: float, backend: str = "matscipy") -> Neighbors:
    """Find all pairs closer than `cutoff`.

    positions (N, 3) Å, cell (3, 3) Å with lattice vectors as rows, pbc (3,), backend one of `BACKENDS`.
    Raises StructureError for positions or cells that are not finite and for a periodic cell without
    volume, ConfigError for an unknown backend, ImportError when the backend is not installed.
    """
    expect(isinstance(backend, str) and backend in BACKENDS, "backend", backend, f"one of {', '.join(BACKENDS)}")
    check_cutoff(cutoff)
    cell, vectors = compact(cell, pbc)
    inside, box, pbc, wraps = wrap_into_box(positions, cell, pbc, cutoff)
    check_density(len(inside), box, pbc, cutoff)
    i, j, S = BACKENDS[backend](inside, box, pbc, cutoff) if len(inside) else NO_PAIRS
    S = (S + wraps[i] - wraps[j]) @ vectors
    order = np.lexsort((S[:, 2], S[:, 1], S[:, 0], j, i))  # one order, whatever the backend and the skin
    return Neighbors(i[order], j[order], S[order])


def device_neighbor_list(positions, cell, pbc, cutoff: float, device):
    """The same by torch-cluster, as tensors i, j, S that are made on `device` and stay there."""
    import torch

    cell, vectors = compact(cell, pbc)
    wrapped = wrap_into_box(positions, cell, pbc, cutoff)
    check_density(len(wrapped[0]), wrapped[1], wrapped[2], cutoff)
    inside, box, pbc, wraps = (torch.tensor(x, device=device) for x in wrapped)
    i, j, S = radius_pairs(inside, box, pbc, cutoff)
    order = torch.argsort(i, stable=True)
    i, j, S = i[order], j[order], S[order]
    S = S + wraps[i] - wraps[j]
    if (vectors == np.eye(3)).all():
        return i, j, S
    return i, j, (S[:, :, None] * torch.tensor(vectors, device=device)).sum(1)  # integers have no product on a GPU


def compact(cell, pbc) -> tuple[np.ndarray, np.ndarray]:
    """The same lattice by short vectors, (3, 3) Å, and these as integer sums of the given ones, (3, 3).

    Searches look at all cells that a sphere of the cutoff reaches: in a cell that is sheared by a thousand, millions.
    A cell that is not far from compact stays as it is, and so does what is no cell (see `check_geometry`).
    """
    given, unchanged = _as_cell(cell), np.eye(3, dtype=int)
    pbc = _as_pbc(pbc)
    if given.shape != (3, 3) or not np.isfinite(given).all() or not pbc.any():
        return given, unchanged
    products = given[pbc] @ given[pbc].T
    between = np.abs(products - np.diag(np.diag(products))).max()
    if between <= SKEWED * np.diag(products).min() or np.linalg.matrix_rank(given[pbc]) < pbc.sum():
        return given, unchanged
    check_geometry(np.zeros((0, 3)), given, pbc)
    short, vectors = minkowski_reduce(given, pbc=pbc)
    return short, vectors.astype(int)


def check_density(n: int, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> None:
    """Raise StructureError for structures so dense that their pairs would fill the memory; box as the search has it."""
    reach = 2 * cutoff * np.linalg.norm(np.linalg.inv(box), axis=0)  # of a sphere's width, in heights of the box
    neighbors = n * np.prod(np.where(pbc, reach, np.minimum(reach, 1)))
    if neighbors > MOST_NEIGHBORS:
        raise StructureError(
            f"cell is {box.tolist()} with {n} atoms, each of which would have about {neighbors:.0e} neighbours within "
            f"{cutoff:g} Å; expected up to {MOST_NEIGHBORS:.0e}. Check cell, pbc and the unit of lengths."
        )


def wrap_into_box(positions, cell, pbc, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return positions inside a search box, the box, pbc as an array, and the cells (N, 3) crossed.

    The box keeps the periodic vectors; elsewhere it encloses the atoms along directions orthogonal to them,
    with empty space cut short: an atom that flew away costs nothing.
    """
    positions, pbc = _as_positions(positions), _as_pbc(pbc)
    check_geometry(positions, cell, pbc)
    box, free = np.array(cell, dtype=float), ~pbc
    if free.any():
        box[free] = np.linalg.svd(box[pbc], full_matrices=True)[2][pbc.sum() :] if pbc.any() else np.eye(3)
    scaled = positions @ np.linalg.inv(box)  # fractions of periodic vectors, Å along the other directions
    wraps = np.where(pbc, np.floor(scaled), 0).astype(int)
    shift = -wraps @ box
    for axis in np.flatnonzero(free) if len(positions) else ():
        height = _without_gaps(scaled[:, axis], 2 * cutoff)
        shift += (height - scaled[:, axis])[:, None] * box[axis]
        box[axis] *= height.max() + 0.5
    return positions + shift, box, pbc, wraps


def _without_gaps(height: np.ndarray, longest: float) -> np.ndarray:
    """Heights from 0.5 Å on, with gaps between one atom and the next cut to `longest`."""
    order = np.argsort(height)
    gaps = np.diff(height[order])
    if (gaps <= longest).all():
        return height - height.min() + 0.5
    out = np.empty_like(height)
    out[order] = 0.5 + np.concatenate([[0.0], np.cumsum(np.minimum(gaps, longest))])
    return out


def check_cutoff(cutoff) -> None:
    number = isinstance(cutoff, int | float | np.number) and 0 < cutoff < np.inf
    expect(number, "cutoff", cutoff, "a positive number of Å")


def _as_positions(positions) -> np.ndarray:
    try:
        array = np.asarray(positions, dtype=float)
    except (TypeError, ValueError):
        raise StructureError(f"positions are {in_short(positions)}; expected numbers") from None
    if array.size and (array.ndim != 2 or array.shape[1] != 3):
        raise StructureError(f"positions have shape {array.shape}; expected (N, 3)")
    return array.reshape(-1, 3)


def _as_cell(cell) -> np.ndarray:
    try:
        return np.asarray(cell, dtype=float)
    except (TypeError, ValueError):
        raise StructureError(f"cell is {in_short(cell)}; expected numbers, (3, 3)") from None


def _as_pbc(pbc) -> np.ndarray:
    array = np.asarray(pbc, dtype=bool)
    if array.shape not in ((), (1,), (3,)):
        raise StructureError(f"pbc is {in_short(pbc)}; expected one or three truth values")
    return np.array(np.broadcast_to(array, 3))


def check_geometry(positions: np.ndarray, cell, pbc: np.ndarray) -> None:
    """Raise StructureError for non-finite numbers or a periodic cell without volume."""
    cell = np.asarray(cell, dtype=float)
    if cell.shape != (3, 3):
        raise StructureError(f"cell has shape {cell.shape}; expected (3, 3), lattice vectors as rows")
    if not np.isfinite(positions).all():
        bad = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise StructureError(
            f"positions of atom {bad} are {positions[bad].tolist()}; expected finite numbers. "
            "If this is a simulation, it has exploded: use a smaller time step or look at the frames before."
        )
    if (np.abs(positions) > FARTHEST).any():
        far = int(np.flatnonzero((np.abs(positions) > FARTHEST).any(axis=1))[0])
        raise StructureError(
            f"positions of atom {far} are {positions[far].tolist()}; expected less than {FARTHEST:g} Å. "
            "If this is a simulation, the atom flew away: use a smaller time step or look at the frames before."
        )
    if not np.isfinite(cell).all():
        raise StructureError(f"cell is {cell.tolist()}; expected finite numbers")
    vectors = cell[pbc]
    if len(vectors):
        lengths = np.linalg.norm(vectors, axis=1)
        if not lengths.all() or np.linalg.svd(vectors / lengths[:, None], compute_uv=False).min() < 1e-6:
            raise StructureError(
                f"cell is {cell.tolist()} with pbc {pbc.tolist()}: the periodic lattice vectors span no volume. "
                "Set atoms.cell, or atoms.pbc = False for a molecule."
            )


def _matscipy(positions, cell, pbc, cutoff):
    from matscipy.neighbours import neighbour_list

    if np.linalg.det(cell) < 0:  # a point reflection makes the cell right-handed and keeps distances and shifts
        positions, cell = -positions, -cell
    i, j, S = neighbour_list("ijS", positions=positions, cell=cell, pbc=pbc, cutoff=float(cutoff))
    return i.astype(np.int64), j.astype(np.int64), S.astype(np.int64)


def _torch_cluster(positions, cell, pbc, cutoff):
    import torch

    tensors = (torch.tensor(x) for x in (positions, cell, pbc))
    return tuple(x.numpy() for x in radius_pairs(*tensors, cutoff))


def radius_pairs(positions, cell, pbc, cutoff: float):
    """torch-cluster's search on tensors of any device, periodic by ghost images; atoms must lie inside the box.

    positions (N, 3), cell (3, 3), pbc (3,) bool; returns i, j (E,) and S (E, 3). torch-cluster cuts the
    neighbours of an atom at `max_num_neighbors` without a word: the cap is raised until nothing is cut.
    """
    import torch

    try:
        from torch_cluster import radius
    except ImportError as error:
        raise ImportError(
            "backend 'torch_cluster' needs torch-cluster: pip install ninja setuptools wheel, then "
            "pip install --no-build-isolation torch-cluster"
        ) from error
    n = len(positions)
    inverse = torch.linalg.inv(cell)
    heights = 1.0 / inverse.norm(dim=0)  # distance between opposite faces
    reach = torch.where(pbc, torch.ceil(cutoff / heights), torch.zeros_like(heights)).long()
    axes = [torch.arange(-m, m + 1, device=positions.device) for m in reach.tolist()]
    shifts = torch.cartesian_prod(*axes)  # (images, 3)
    images = (positions + (shifts.to(positions) @ cell)[:, None]).reshape(-1, 3)
    fractional = images @ inverse
    margin = cutoff / heights * (1 + 1e-9)
    near = (((fractional >= -margin) & (fractional <= 1 + margin)) | ~pbc).all(dim=1)
    kept = near.nonzero()[:, 0]
    cap = 64
    while True:
        i, k = radius(images[kept], positions, cutoff * (1 + 1e-9), max_num_neighbors=cap)
        if len(i) == 0 or int(torch.bincount(i, minlength=n).max()) < cap:
            break
        cap *= 2
    j, S = kept[k] % n, shifts[kept[k] // n]
    vectors = positions[j] + S.to(positions) @ cell - positions[i]
    keep = (vectors.square().sum(1) < cutoff**2) & ((i != j) | (S != 0).any(dim=1))
    return i[keep], j[keep], S[keep]


BACKENDS = {"matscipy": _matscipy, "torch_cluster": _torch_cluster}


def resolve_backend(name: str, device: str) -> str:
    """The name of one of `BACKENDS`; "auto" is what suits a kind of device. Raises ConfigError for others."""
    if isinstance(name, str) and name == "auto":
        on_gpu = device == "cuda" and find_spec("torch_cluster") is not None
        return "torch_cluster" if on_gpu else "matscipy"
    known = isinstance(name, str) and name in BACKENDS
    expect(known, "neighbor_backend", name, f"'auto' or one of {', '.join(BACKENDS)}")
    return name
