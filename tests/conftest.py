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
    parser.addoption("--quick", action="store_true", help="of each file every third test that is not slow, one case")
    parser.addoption("--no-skip", action="store_true", help="a test that is skipped and needs no GPU has failed")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    fast = [item for item in items if not ({"slow", "proof"} & {mark.name for mark in item.iter_markers()})]
    modules = [list(tests) for _, tests in groupby(fast, lambda item: item.path)]
    functions = [[list(f) for _, f in groupby(tests, lambda i: i.nodeid.partition("[")[0])] for tests in modules]
    cases = [group for module in functions for group in module[::3]]
    chosen = [group[zlib.crc32(group[0].nodeid.encode()) % len(group)] for group in cases]  # not always the first
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    unexpected = item.get_closest_marker("gpu") is None and not hasattr(report, "wasxfail")
    if report.skipped and unexpected and item.config.getoption("--no-skip"):
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def small_potential():
    """`small_potential(variant, dtype)`, shared by all tests: do not change what it returns."""
    return cache(build_potential)


@pytest.fixture
def new_potential():
    """`new_potential(variant, dtype, seed)`: one of your own."""
    return build_potential
