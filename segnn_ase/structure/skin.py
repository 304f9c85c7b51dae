"""The Verlet skin: pairs of one structure after another, from a list that is reused while it is exact.

A step that reuses its list is small compared with the evaluation of the smallest molecule only if it is lean: what
rarely changes is compared as bytes, and nothing is made again that is the same.
"""

import numpy as np
import torch

from segnn_ase.base.errors import expect
from segnn_ase.structure.graph import Graph, edge_vectors, graph_from_arrays
from segnn_ase.structure.neighbors import Neighbors, check_cutoff, device_neighbor_list, neighbor_list

FEW_STEPS, MANY_STEPS = 10, 40  # between two searches, with a skin that tunes itself
SKINS = (0.2, 1.5)  # Å


class SkinNeighbors:
    """Neighbours within `cutoff`, found from a list with a skin that is reused while it is exact.

    A pair that is not in the list was further apart than cutoff + skin. When the cell is deformed by F and atoms leave
    the places to which F takes them by at most u, it is now further apart than smin (cutoff + skin) - 2 u, with smin
    the smallest singular value of F. Where that is less than the cutoff (so also when an atom was wrapped), and on any
    change of pbc or number of atoms, the list is made again. What is returned is filtered to `cutoff`: the same pairs,
    in the same order, as without a skin. skin "auto" follows the speed of the atoms, so that a list serves some ten
    steps.
    """

    def __init__(self, cutoff: float, skin: "float | str" = "auto", backend: str = "matscipy"):
        check_cutoff(cutoff)
        number = isinstance(skin, int | float | np.number) and 0 <= skin < np.inf
        expect(number or (isinstance(skin, str) and skin == "auto"), "skin", skin, "'auto', or zero or more Å")
        self.cutoff, self.backend = cutoff, backend
        self.tuned = skin == "auto"
        self.skin = 0.5 if self.tuned else skin
        self.rebuilds = self._served = 0
        self._found: Neighbors | None = None  # for these:
        self._positions = self._cell = self._pbc = None

    def __call__(self, positions, cell, pbc) -> Neighbors:
        i, j, S = self.candidates(positions, cell, pbc)
        positions, cell = np.asarray(positions, dtype=float), np.asarray(cell, dtype=float)
        vectors = positions[j] - positions[i] + S @ cell
        keep = np.einsum("ea,ea->e", vectors, vectors) < self.cutoff**2
        return Neighbors(i[keep], j[keep], S[keep])

    def candidates(self, positions, cell, pbc) -> Neighbors:
        """All pairs within the cutoff and some of those within cutoff + skin; the same object while it holds."""
        positions, cell = np.asarray(positions, dtype=float), np.asarray(cell, dtype=float)
        pbc = np.asarray(pbc, dtype=bool)
        if not self._holds(positions, cell, pbc):
            self._renew(positions, cell, pbc)
        self._served += 1
        return self._found

    def _holds(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
        if self._found is None or pbc.tobytes() != self._pbc or positions.shape != self._positions.shape:
            return False
        places, spare = self._positions, self.skin
        if cell.tobytes() != self._cell.tobytes():
            places, spare = self._deformed(cell, pbc)
        moved, limit = positions - places, (0.5 * spare) ** 2
        if spare > 0 and np.vdot(moved, moved) <= limit:  # all together, which is the least to find out
            return True
        # written so that NaN is not valid either: the search then says which atom
        return bool(spare > 0 and np.einsum("na,na->n", moved, moved).max(initial=0.0) <= limit)

    def _deformed(self, cell: np.ndarray, pbc: np.ndarray) -> tuple[np.ndarray, float]:
        """Where atoms come to with the cell, (N, 3) Å, and what is left of the skin for how far they are from there."""
        if np.array_equal(cell, self._cell):  # by the sign of a zero
            return self._positions, self.skin
        if not pbc.all():
            return self._positions, 0.0
        deformation = np.linalg.solve(self._cell, cell)  # rows: r' = r F
        smallest = np.linalg.svd(deformation, compute_uv=False)[-1] * (1.0 - 1e-9)
        return self._positions @ deformation, smallest * (self.cutoff + self.skin) - self.cutoff

    def _renew(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> None:
        if self._found is not None and pbc.tobytes() == self._pbc and positions.shape == self._positions.shape:
            self._tune()
        self._served, self._found = 0, None  # a search that fails must not leave a list with another skin
        self._found = self.search(positions, cell, pbc, self.cutoff + self.skin)
        self._positions, self._cell, self._pbc = positions.copy(), cell.copy(), pbc.tobytes()
        self.rebuilds += 1

    def search(self, positions, cell, pbc, cutoff: float) -> Neighbors:
        return neighbor_list(positions, cell, pbc, cutoff, self.backend)

    def _tune(self) -> None:
        if self.tuned:
            if self._served < FEW_STEPS:
                self.skin = min(1.25 * self.skin, SKINS[1])
            elif self._served > MANY_STEPS:
                self.skin = max(0.8 * self.skin, SKINS[0])


class SkinGraphs:
    """Graphs of one structure after another, with all pairs within `cutoff` and some that are a skin further apart.

    The pairs' tensors are made, on `device`, when `SkinNeighbors` finds new ones; only positions and cell change from
    one structure to the next. With backend "torch_cluster" on a GPU the pairs never leave it.
    """

    def __init__(self, cutoff: float, skin: "float | str", backend: str, device: torch.device):
        self.device, self.backend = device, backend
        on_device = device.type != "cpu" and backend == "torch_cluster"
        self.neighbors = DeviceNeighbors(cutoff, skin, device) if on_device else SkinNeighbors(cutoff, skin, backend)
        self._found: Neighbors | None = None

    def __call__(self, numbers, positions, cell, pbc) -> Graph:
        found = self.neighbors.candidates(positions, cell, pbc)
        if found is not self._found:
            self._start(numbers, positions, cell, pbc, found)
        if numbers.tobytes() != self._numbers:
            self._graph = self._graph._replace(numbers=torch.tensor(numbers, dtype=torch.long, device=self.device))
            self._numbers = numbers.tobytes()
        if cell.tobytes() != self._cell:
            tensor = torch.tensor(cell, dtype=torch.float64, device=self.device)
            self._graph = self._graph._replace(cell=tensor.view(1, 3, 3))
            self._cell = cell.tobytes()
        return self._graph._replace(positions=torch.from_numpy(np.asarray(positions, dtype=float)).to(self.device))

    def _start(self, numbers, positions, cell, pbc, found: Neighbors) -> None:
        """With new pairs. Copies are kept: what is changed in place by the caller must be noticed."""
        self._graph = graph_from_arrays(numbers.copy(), positions, cell.copy(), pbc, found).to(self.device)
        self._found, self._numbers, self._cell = found, numbers.tobytes(), cell.tobytes()
        squares = edge_vectors(self._graph).square().sum(1)
        found_within = self.neighbors.cutoff + self.neighbors.skin
        self._closest, self._cell_then = float(squares.min()) ** 0.5 if len(squares) else found_within, self._cell

    def apart(self, distance: float, cell) -> bool:
        """Whether no two atoms of the last structure can be nearer than `distance`, without looking at it."""
        # since the pairs were found each atom has moved by at most half the skin
        return self._closest - self.neighbors.skin > distance and cell.tobytes() == self._cell_then


class DeviceNeighbors(SkinNeighbors):
    """The same with pairs found by torch-cluster, as tensors on a device."""

    def __init__(self, cutoff: float, skin: "float | str", device: torch.device):
        super().__init__(cutoff, skin, "torch_cluster")
        self.device = device

    def search(self, positions, cell, pbc, cutoff: float) -> Neighbors:
        return Neighbors(*device_neighbor_list(positions, cell, pbc, cutoff, self.device))
