"""The examples run from start to end with few steps (SEGNN_STEPS)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import lammps

EXAMPLES = sorted((Path(__file__).parent.parent / "md_examples").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path):
    missing = {"13_lammps": not lammps.commands(), "14_path_integrals": find_spec("ipi") is None}
    if missing.get(script.stem):
        pytest.skip("its engine is not here: make engines")
    env = {**os.environ, "SEGNN_STEPS": "6", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert list(tmp_path.rglob("*.png")) or "table" in done.stdout
