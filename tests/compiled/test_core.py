"""Pairs in the core: every evaluator against plain PyTorch."""

import numpy as np
import pytest
import torch
from helpers.potentials import LAYERS_ONLY, VARIANTS
from helpers.systems import CUTOFF, squeezed

from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.compiled.layers import FUSED
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.structure.graph import collate, graph_from_atoms

KNOWN = [v for v in VARIANTS if v not in LAYERS_ONLY]


def assert_close(found, expected, tolerance: float) -> None:
    for name in ("energies", "forces", "stress", "edge_gradients", "features"):
        a, b = getattr(found, name), getattr(expected, name)
        size = float(b.nan_to_num().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size, equal_nan=True, msg=name)


@pytest.mark.parametrize("variant", KNOWN)
@pytest.mark.parametrize("shuffled", [False, True])
def test_evaluators_agree_in_the_core(variant, shuffled, small_potential):
    potential, graph = small_potential(variant), collate([graph_from_atoms(a, CUTOFF) for a in squeezed()])
    if shuffled:
        order = torch.as_tensor(np.random.default_rng(0).permutation(len(graph.edge_src)))
        graph = graph._replace(**{k: getattr(graph, k)[order] for k in ("edge_src", "edge_dst", "edge_shift")})
    expected = PlainEvaluator(potential)(graph, stress=True)
    assert_close(PlainEvaluator(potential, FUSED)(graph, stress=True), expected, 1e-10)
    assert_close(CpuEvaluator(potential)(graph, stress=True), expected, 1e-7)
    alone = CpuEvaluator(potential)(graph, forces=False)
    torch.testing.assert_close(alone.energies, expected.energies, rtol=1e-7, atol=1e-7)
