"""Fixtures and settings of all tests."""

import os
import zlib
from functools import cache
from itertools import groupby

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.potentials import build_potential

torch.set_num_threads(1)
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("seeded")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="no slow test, and of the cases of each test only one")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    cases = [list(group) for _, group in groupby(fast, lambda item: item.nodeid.partition("[")[0])]
    chosen = [group[zlib.crc32(group[0].nodeid.encode()) % len(group)] for group in cases]  # not always the first
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def small_potential():
    """`small_potential(variant, dtype)`, shared by all tests: do not change what it returns."""
    return cache(build_potential)


@pytest.fixture
def new_potential():
    """`new_potential(variant, dtype, seed)`: one of your own."""
    return build_potential
