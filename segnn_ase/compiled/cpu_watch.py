"""One structure after another of the same atoms against its limits, in one call into C: see `model.watch`."""

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from segnn_ase.compiled.build import address
from segnn_ase.compiled.newness import CompiledNewness, Look, PlainNewness, SortedPairs
from segnn_ase.compiled.runtime import CLimits
from segnn_ase.model.predict import Prediction
from segnn_ase.model.watch import Judgement, Watched
from segnn_ase.structure.graph import Graph


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
        self._like, known, n_atoms = like[:0].clone(), watched.surroundings, watched.neighbors.shape[1]
        self._limits = CLimits(
            *(n_atoms, like.shape[1], watched.neighbors.ctypes.data, address(self._forms)),
            *(*watched.energy, watched.volume, *watched.virial, watched.force, watched.leverage, *watched.powers),
            *((math.inf,) * 3 if known is None else known.landscape.limits),
            watched.crowding,
        )
        self._address = ctypes.byref(self._limits)
        self._look: Look | None = None  # at pairs that were met last, in C
        self._shifts, self._shifted = torch.zeros(0), False  # likewise, and whether there are any

    def __call__(
        self, graph: Graph, p: Prediction, volume: float | None, pairs: SortedPairs, threads: int
    ) -> Judgement:
        look = self._look
        if isinstance(self._newness, CompiledNewness) and (look is None or look.pairs is not pairs):
            look = self._look = self._newness.look(pairs)
        out = None if self._forms is None else self._room_for(p.features)
        stress, positions = self._for_virial(graph, p, volume)
        inside = self._runtime.watch(
            *(self._address, pairs.first.data_ptr(), p.energy.data_ptr(), address(p.forces)),
            *(address(stress), address(positions), math.nan if volume is None else volume, p.features.data_ptr()),
            None if out is None else ctypes.addressof(ctypes.c_char.from_buffer(out)),
            *((None, None, None, threads, None) if look is None else (*look.given, threads, look.summary)),
        )
        # what newness in plain PyTorch says is not for C to judge
        inside = bool(inside) and p.close is False and not isinstance(self._newness, PlainNewness)
        new = None if inside or look is None else look.found()
        if out is None:
            return Judgement(inside, new)
        n = self._limits.n
        return Judgement(inside, new, out[:n], out.item(n), out[n + 1 :].reshape(n, 3))

    def _room_for(self, features: Tensor) -> np.ndarray:
        if features.dtype is not self._like.dtype or features.shape[1] != self._like.shape[1]:
            raise ValueError(f"features are {features.dtype} {tuple(features.shape)}, others than before")
        return np.empty(4 * self._limits.n + 1)

    def _for_virial(self, graph: Graph, p: Prediction, volume: float | None) -> tuple[Tensor | None, Tensor | None]:
        """The stress or, without a cell, the positions from which `trust.domain.virial_of` takes it."""
        if volume is not None or p.forces is None:
            return (None if volume is None else p.stress), None
        if self._shifts is not graph.edge_shift:
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
