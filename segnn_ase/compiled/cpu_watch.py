"""One structure after another of the same atoms against its limits, in one call into C: see `model.watch`."""

import ctypes
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.compiled.build import address
from segnn_ase.compiled.newness import CompiledNewness, PlainNewness
from segnn_ase.compiled.runtime import CLimits
from segnn_ase.model.predict import Prediction
from segnn_ase.model.watch import Judged, Watched
from segnn_ase.structure.graph import Graph

NO_NEWNESS = (None, None, None)


class Pairs(NamedTuple):
    """Of one structure, sorted by receivers and within the cutoff; there may be more room than is used."""

    kind: Tensor  # (N,) species of the atoms
    vectors: Tensor  # (E, 3) Å
    first: Tensor  # (N + 1,) first pairs of the atoms
    senders: Tensor  # (E,)


class CpuWatch:
    """What the limits of certain atoms are is told to C once; no more than addresses is told at every step."""

    def __init__(
        self,
        watched: Watched,
        runtime: ctypes.CDLL,
        like: Tensor,
        newness: "CompiledNewness | PlainNewness | None",
    ):
        """like: features of the structures to come, (N, n)."""
        self.watched, self._runtime, self._newness = watched, runtime, newness
        self._forms = None if watched.forms is None else _packed(watched.forms, runtime, like)
        at, self._like = watched.limits, like[:0].clone()
        self._limits = CLimits(
            *(at.neighbors.shape[1], like.shape[1], at.neighbors.ctypes.data),
            *(None if self._forms is None else self._forms.data_ptr(), *at.energy, at.volume, *at.virial),
            *(at.force, at.leverage, *watched.powers),
        )
        self._address = ctypes.byref(self._limits)
        self._pairs: Pairs | None = None  # those that were met last, and what newness in C is given
        self._look: tuple = NO_NEWNESS
        self._shifts, self._shifted = torch.zeros(0), False  # those that were met last, and whether there are any

    def __call__(self, graph: Graph, p: Prediction, volume: float | None, pairs: Pairs, threads: int) -> Judged:
        if self._pairs is not pairs:
            compiled = isinstance(self._newness, CompiledNewness)
            self._pairs, self._look = pairs, self._newness.prepared(*pairs) if compiled else NO_NEWNESS
        out = None if self._forms is None else self._room_for(p.features)
        stress, positions = self._for_virial(graph, p, volume)
        inside = self._runtime.watch(
            *(self._address, p.neighbors.data_ptr(), p.energy.data_ptr(), address(p.forces)),
            *(address(stress), address(positions), math.nan if volume is None else volume, p.features.data_ptr()),
            *(None if out is None else out.__array_interface__["data"][0], *self._look, threads),
        )
        inside, new = bool(inside) and p.close is False, None
        if self._newness is not None:
            new = self._newness(graph, pairs.kind) if self._look is NO_NEWNESS else self._newness.found()
        if out is None:
            return Judged(inside, new)
        n = self._limits.n
        return Judged(inside, new, out[:n], float(out[n]), out[n + 1 :].reshape(n, 3))

    def _room_for(self, features: Tensor) -> np.ndarray:
        if features.dtype is not self._like.dtype or features.shape[1] != self._like.shape[1]:
            raise ValueError(f"features are {features.dtype} {tuple(features.shape)}, others than before")
        return np.empty(4 * self._limits.n + 1)

    def _for_virial(self, graph: Graph, p: Prediction, volume: float | None) -> tuple[Tensor | None, Tensor | None]:
        """The stress or, without a cell, the positions from which `trust.domain.virial_of` takes it."""
        if volume is not None or p.forces is None:
            return (None if volume is None else p.stress), None
        if self._shifts is not graph.edge_shift:
            self._pairs: Pairs | None = None  # those that were met last, and what newness in C is given
        self._look: tuple = NO_NEWNESS
        self._shifts, self._shifted = graph.edge_shift, bool(graph.edge_shift.any())
        return None, None if self._shifted else graph.positions.double().contiguous()


def _packed(forms: Tensor, runtime: ctypes.CDLL, like: Tensor) -> Tensor:
    """Forms (2, n, n) in the panels of the runtime's matrix product."""
    k = like.shape[1]
    if forms.shape != (2, k, k) or forms.dtype is not like.dtype:
        raise ValueError(f"forms are {forms.dtype} {tuple(forms.shape)} for {k} features of {like.dtype}")
    out, forms = forms.new_empty(2, k * -(-k // runtime.width) * runtime.width), forms.contiguous()
    for form, panels in zip(forms, out, strict=True):
        runtime.pack(k, k, form.data_ptr(), k, 1, 1.0, panels.data_ptr())
    return out
