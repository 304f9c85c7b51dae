"""Five thousand atoms: what is written costs as much at the end as in the beginning, in time, disk and memory."""

import resource
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from helpers.dynamics import config, run

from segnn_ase.md import run as dynamics

ATOMS, STEPS, BEGIN = 5000, 36, 12  # every step is logged, saved and a checkpoint; from BEGIN on it is measured
IO, MEMORY = Path("/proc/self/io"), Path("/proc/self/statm")


class Springs(Calculator):
    """Every atom on a spring of its own, at no cost."""

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 - ASE's interface

    def __init__(self, sites: np.ndarray):
        super().__init__()
        self.sites = sites

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        self.atoms = atoms.copy()
        moved = atoms.positions - self.sites
        energy = float(2.5 * (moved**2).sum())
        self.results = {"energy": energy, "free_energy": energy, "forces": -5.0 * moved}


def bytes_moved() -> np.ndarray:
    """Read and written by this process so far, in calls of any size."""
    counts = dict(line.split(": ") for line in IO.read_text().splitlines())
    return np.array([int(counts["rchar"]), int(counts["wchar"])])


def memory_used() -> int:
    return int(MEMORY.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not IO.exists(), reason="needs the counters of Linux")
@pytest.mark.parametrize("frames", ["md.extxyz", "md.traj"])
def test_writing_costs_the_same_all_the_time(tmp_path, monkeypatch, frames):
    atoms = bulk("Cu", cubic=True).repeat((10, 10, 13))[:ATOMS]
    atoms.info["note"] = "first"
    atoms.calc = Springs(atoms.positions.copy())
    settings = config(tmp_path, frames, steps=STEPS, log_every=1, save_every=1, checkpoint_every=1, temperature=300)
    seen, checkpoint = [], dynamics.checkpoint

    def measured(state, step):
        checkpoint(state, step)
        if step:
            seen.append((*bytes_moved(), memory_used(), Path(settings.trajectory).stat().st_size))

    monkeypatch.setattr(dynamics, "checkpoint", measured)
    run(atoms, settings)
    read, written, memory, size = np.diff(np.array(seen[BEGIN:], dtype=float).reshape(-1, 4), axis=0).T
    third, restart = len(size) // 3, Path(settings.restart).stat().st_size
    assert np.ptp(size) < 0.05 * size.mean() and size.mean() < 120 * 1.5 * ATOMS
    assert written.max() < 1.1 * (size.max() + restart) and read.max() < 2 * size.max()
    assert np.abs(written[-third:].mean() - written[:third].mean()) < 0.02 * written.mean()
    assert np.abs(read[-third:].mean() - read[:third].mean()) < 10_000  # the log has reached 4096 bytes meanwhile
    assert memory.sum() < 0.4 * len(memory) * atoms.positions.nbytes
