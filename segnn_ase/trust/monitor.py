"""What is said of every structure besides its energy: how far it may be off, what the training data do not cover."""

import ctypes
import math

import numpy as np
import torch

from segnn_ase.model.newness import Newness, newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction
from segnn_ase.structure.graph import Graph
from segnn_ase.trust.domain import DomainCheck, virial_of

THREE = np.ones(3)  # components


class Monitor:
    """The uncertainty (`uncertainty.py`) and the domain (`domain.py`) of a potential, for one structure after another.

    Where the evaluator has code for it, one call looks at all atoms, and only what is not well inside is looked at
    again: several passes would cost a few percent of a small molecule's step.
    """

    def __init__(self, potential: Potential):
        u = potential.uncertainty
        self.check = None if potential.domain is None else DomainCheck(potential)
        self._index, self._cutoff = potential.species_index, potential.cutoff
        self.uncertainty = u if u is None else u.to(potential.readout.last.last.weight)
        self._forms = u and torch.stack([self.uncertainty.atoms, self.uncertainty.frames])
        self._calibrated = (u is not None and math.isfinite(u.alpha), u is not None and math.isfinite(u.beta))
        self._last: tuple = (None, None, None)

    def __getstate__(self) -> dict:
        # an address is of one process and of one array, and neither is that of a copy
        return {**self.__dict__, "_last": (None, None, None)}

    def __call__(self, graph: Graph, p: Prediction, volume: float | None, evaluator: Evaluator | None = None) -> dict:
        """What there is of energy_std (eV), forces_std (N, 3) eV/Å and outside_domain of one structure.

        volume: Å^3 where it is periodic in three directions.
        """
        results = {}
        inside, leverage, energy_std, forces_std = self._in_one_pass(graph, p, volume, evaluator) or self._plain(p)
        if self._calibrated[0]:
            results["energy_std"] = energy_std
        if self._calibrated[1] and p.forces is not None:
            results["forces_std"] = forces_std
        if self.check is not None:
            new = self._new(graph, evaluator)
            inside = inside and self._as_before(graph, p, volume, new)
            results["outside_domain"] = [] if inside else self.check(graph, p, new, volume=volume, leverage=leverage)
        return results

    def _as_before(self, graph: Graph, p: Prediction, volume: float | None, new: Newness | None) -> bool:
        """Whether virial and surroundings are well inside."""
        low, high = self.check.limits(graph.numbers).virial
        virial = virial_of(graph, p, volume)
        return (virial is None or low <= virial <= high) and (new is None or self.check.novelty.knows(new))

    def _new(self, graph: Graph, evaluator: Evaluator | None) -> Newness | None:
        known = self.check.domain.surroundings
        if known is None:
            return None
        kind = self._index[graph.numbers]
        fast = None if evaluator is None else evaluator.newness(graph, kind, known)
        return fast or newness(known, graph, kind, self._cutoff)

    def _in_one_pass(
        self, graph: Graph, p: Prediction, volume: float | None, evaluator: Evaluator | None
    ) -> tuple | None:
        if p.neighbors is None or self.check is None or evaluator is None:
            return None
        limits, last = self.check.limits(graph.numbers), self._last
        if last[0] is not limits:
            u = self.uncertainty
            powers = (0.0,) * 3 if u is None else (u.alpha, u.beta, u.gamma)
            numbers = (ctypes.c_double * 7)(*powers, *limits.energy, limits.force, limits.leverage)
            last = self._last = (limits, limits.neighbors.ctypes.data, numbers)
        given = [p.neighbors, p.energy, p.forces, p.features]
        found = evaluator.inside_and_deviations(given, self._forms, *last[1:])
        if found is None:
            return None
        inside, out = found
        inside = inside and p.close is False and (volume is None or volume >= limits.volume)
        n = len(p.neighbors)
        return (inside, out[:n], float(out[n]), out[n + 1 :].reshape(n, 3)) if len(out) else (inside, None, None, None)

    def _plain(self, p: Prediction) -> tuple:
        if self.uncertainty is None:
            return False, None, None, None
        leverage, energy_std = self.uncertainty.of_structure(p.features)
        return False, leverage, energy_std, self.uncertainty.force_std(leverage)[:, None] * THREE
