"""Kills at moments spread over a training and a simulation: the same bits as without any.

A process is forked for every life. It counts its steps, and some time after one of them it is killed by SIGKILL:
between steps, within one, or while a file is written. Steps and delays of the kills are spread evenly over what there
is, each pair of them as far as can be from the others (a Kronecker sequence): few kills leave no large gap. Fifty of
them are for the proofs.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers.dynamics import counted_dynamics
from helpers.frames import water_frames
from helpers.trainings import counted_training, history, weights

from segnn_ase import save_potential
from segnn_ase.store.tensors import checksum

FIFTY = pytest.param(50, marks=pytest.mark.proof)
LIVES = """
import os, signal, sys, threading
sys.path[:0] = {tests!r}
import pathlib, torch
from {room} import {job}
torch.set_num_threads(1)

deaths, alive = 0, True
while alive:
    # multiples of powers of the plastic number's inverse, which fill the square evenly
    deadly, delay = 1 + int({most} * (0.7548776662 * deaths % 1)), {delay} * (0.5698402910 * deaths % 1)
    process = os.fork()
    if process == 0:
        steps = 0
        def count():
            global steps
            steps += 1
            if steps == deadly and deaths < {kills}:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        {job}(pathlib.Path({folder!r}), count, **{length!r})
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    alive = status == signal.SIGKILL
    deaths += alive
assert status == 0, status
print(deaths)
"""


def lives(job: partial, folder: Path, *, kills: int, most: int, delay: float) -> int:
    """Do a job of the helpers in as many lives as it takes; returns the number of kills."""
    what, length = job.func, job.keywords
    where = {"tests": sys.path, "room": what.__module__, "job": what.__name__, "folder": str(folder), "length": length}
    code = LIVES.format(**where, most=most, delay=delay, kills=kills)
    # fork wants a single thread
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [12, FIFTY])
def test_dynamics_killed_many_times(kills, tmp_path, new_potential):
    potential = new_potential("segnn", torch.float32)
    potential.scales = [0.05] * 4
    save_potential(tmp_path / "potential.pt", potential)
    job, steps = partial(counted_dynamics, steps=30 * kills), 30 * kills
    job(tmp_path / "whole")
    assert lives(job, tmp_path / "killed", kills=kills, most=44, delay=0.004) == kills
    for name in ("md.csv", "md.xyz"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with np.load(tmp_path / "killed" / "md.npz") as killed, np.load(tmp_path / "whole" / "md.npz") as whole:
        for name in ("positions", "momenta", "cell"):
            np.testing.assert_array_equal(killed[name], whole[name])
    frames = ase.io.read(tmp_path / "killed" / "md.xyz", ":")
    assert [frame.info["step"] for frame in frames] == list(range(steps + 1))
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"md.csv", "md.xyz", "md.npz"}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, FIFTY])  # each life prepares the training anew
def test_a_training_killed_many_times(kills, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        ase.io.write(tmp_path / name / "train.traj", water_frames(16))
    job = partial(counted_training, epochs=3 * kills)
    job(tmp_path / "whole")
    assert lives(job, tmp_path / "killed", kills=kills, most=18, delay=0.05) == kills
    for name in ("model.pt", "model.last.pt"):
        assert checksum(weights(tmp_path / "killed" / name)) == checksum(weights(tmp_path / "whole" / name)), name
    assert history(tmp_path / "killed" / "model.pt") == history(tmp_path / "whole" / "model.pt")
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}  # nothing half-written is left behind
