"""The examples run from start to end with few steps (SEGNN_STEPS)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "md_examples").glob("[0-9]*.py"))
OUTSIDE = {"13_lammps", "14_path_integrals"}  # run in LAMMPS and in i-PI
OUTSIDE |= {"16_salt_and_melt", "18_adsorbate"}  # learn from a universal potential
EXAMPLES = [pytest.param(x, id=x.stem, marks=[pytest.mark.engines] if x.stem in OUTSIDE else []) for x in SCRIPTS]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_example(script, tmp_path):
    env = {**os.environ, "SEGNN_STEPS": "6", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert list(tmp_path.rglob("*.png")) or "table" in done.stdout
