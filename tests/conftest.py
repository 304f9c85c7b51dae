"""Fixtures: small random potentials, seeded and calibrated, on the species of `systems`."""

import os
from functools import cache

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from systems import CUTOFF, NAMED, SPECIES

from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import PRESETS, model_config
from segnn_ase.structure.graph import collate, graph_from_atoms

torch.set_num_threads(1)
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("seeded")

STEERABLE = {"hidden_irreps": "8x0e+8x1o+8x2e"}
VARIANTS = {  # name: (preset, replaced settings)
    "segnn": ("segnn", STEERABLE),
    "fast": ("fast", {"hidden_irreps": "8x0e+8x1o"}),
    "tfn": ("tfn", STEERABLE),
    "egnn": ("egnn", {"hidden_irreps": "16x0e"}),
    "schnet": ("schnet", {"hidden_irreps": "16x0e"}),
    "uneven": ("segnn", {"hidden_irreps": "12x0e+6x1o+3x2e"}),
    "parities": ("segnn", {"hidden_irreps": "8x0e+4x0o+4x1e+4x1o", "lmax_attr": 2}),
    "coreless": ("segnn", {**STEERABLE, "core_repulsion": False}),
    "segnn2022": ("segnn2022", STEERABLE),
    "default": ("segnn", {}),
}
assert set(PRESETS) <= set(VARIANTS)


def build_potential(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Potential:
    """A new calibrated potential with random weights, energies of O(1) eV an atom and reference energies."""
    preset, settings = VARIANTS[variant]
    small = {} if variant == "default" else {"radial_hidden": (16,)}
    config = model_config(preset, cutoff=CUTOFF, **settings, **small)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        potential = Potential(config, SPECIES, reference_energies=[-0.5, -1.25, 0.75, 2.0]).to(torch.float64)
    potential.calibrate(collate([graph_from_atoms(build(), CUTOFF) for build in NAMED.values()]))
    return potential.to(dtype).eval()


@pytest.fixture(scope="session")
def small_potential():
    """`small_potential(variant, dtype)`, shared by all tests: do not change what it returns."""
    return cache(build_potential)


@pytest.fixture
def new_potential():
    """`new_potential(variant, dtype, seed)`: one of your own."""
    return build_potential
