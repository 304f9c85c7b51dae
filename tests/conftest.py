"""Fixtures and settings of all tests."""

import os
from functools import cache

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.potentials import build_potential

torch.set_num_threads(1)
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(scope="session")
def small_potential():
    """`small_potential(variant, dtype)`, shared by all tests: do not change what it returns."""
    return cache(build_potential)


@pytest.fixture
def new_potential():
    """`new_potential(variant, dtype, seed)`: one of your own."""
    return build_potential
