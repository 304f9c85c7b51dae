"""What is said of every structure besides its energy: how far it may be off, what the training data do not cover."""

import math

import numpy as np
import torch

from segnn_ase.model.newness import Newness, newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, Prediction
from segnn_ase.model.watch import Judgement, Watched
from segnn_ase.structure.graph import Graph
from segnn_ase.trust.domain import DomainCheck, Limits
from segnn_ase.trust.novelty import Outside

THREE = np.ones(3)  # components


class Monitor:
    """The uncertainty (`uncertainty.py`) and the domain (`domain.py`) of a potential, for one structure after another.

    Where the evaluator has code for it, one call looks at everything, and only what is not inside is looked at again,
    to say why: `DomainCheck` in plain PyTorch would cost a part of a small molecule's step.
    """

    def __init__(self, potential: Potential):
        u = potential.uncertainty
        self.check = None if potential.domain is None else DomainCheck(potential)
        self._index, self._cutoff = potential.species_index, potential.cutoff
        self.uncertainty = u if u is None else u.to(potential.readout.last.last.weight)
        self._forms = u and torch.stack([self.uncertainty.atoms, self.uncertainty.frames])
        self._calibrated = (u is not None and math.isfinite(u.alpha), u is not None and math.isfinite(u.beta))
        self._last: tuple = (None, None)  # atomic numbers of the structure met last, and what of it is watched

    def __call__(self, graph: Graph, p: Prediction, volume: float | None, evaluator: Evaluator | None = None) -> dict:
        """What there is of energy_std (eV), forces_std (N, 3) eV/Å and outside_domain of one structure.

        volume: Å^3 where it is periodic in three directions.
        """
        results = {}
        judged = self._at_a_glance(graph, p, volume, evaluator) or self._plain(p)
        if self._calibrated[0]:
            results["energy_std"] = judged.energy_std
        if self._calibrated[1] and p.forces is not None:
            results["forces_std"] = judged.forces_std
        if self.check is not None:
            results["outside_domain"] = self._ways_outside(graph, p, volume, evaluator, judged)
        return results

    def _ways_outside(
        self, graph: Graph, p: Prediction, volume: float | None, evaluator: Evaluator | None, judged: Judgement
    ) -> list[Outside]:
        if judged.inside:
            return self.check.cues(graph)
        new = judged.new or self._new(graph, evaluator)
        return self.check(graph, p, new, volume=volume, leverage=judged.leverage)

    def _new(self, graph: Graph, evaluator: Evaluator | None) -> Newness | None:
        if self.check.novelty is None:
            return None
        known, kind = self.check.novelty.known, self._index[graph.numbers]
        fast = None if evaluator is None else evaluator.newness(graph, kind, known)
        return fast or newness(known, graph, kind, self._cutoff)

    def _at_a_glance(
        self, graph: Graph, p: Prediction, volume: float | None, evaluator: Evaluator | None
    ) -> Judgement | None:
        if self.check is None or evaluator is None:
            return None
        known = self._last
        if known[0] is not graph.numbers:
            known = self._last = graph.numbers, self._watch(self.check.limits(graph.numbers))
        return evaluator.judge(graph, p, volume, known[1])

    def _watch(self, limits: Limits) -> Watched:
        u, novelty = self.uncertainty, self.check.novelty
        around = (None, -math.inf) if novelty is None else (novelty.known, novelty.least_crowding)
        powers = (0.0, 0.0, 0.0) if u is None else (u.alpha, u.beta, u.gamma)
        return Watched(*limits, *around, self._forms, powers)

    def _plain(self, p: Prediction) -> Judgement:
        if self.uncertainty is None:
            return Judgement(False)
        leverage, energy_std = self.uncertainty.of_structure(p.features)
        return Judgement(False, None, leverage, energy_std, self.uncertainty.force_std(leverage)[:, None] * THREE)
