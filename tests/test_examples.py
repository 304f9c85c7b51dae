"""The examples run from start to end with few steps (SEGNN_STEPS)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import lammps

EXAMPLES = sorted((Path(__file__).parent.parent / "md_examples").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path):
    if "lammps" in script.stem and not lammps.commands():
        pytest.skip("no LAMMPS with MPI here: make engines")
    env = {**os.environ, "SEGNN_STEPS": "6", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert list(tmp_path.rglob("*.png")) or "table" in done.stdout
