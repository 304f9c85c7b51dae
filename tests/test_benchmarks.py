"""The benchmarks run, with the smallest settings, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "md_step": ["--calculators", "fast", "fast:torch", "--systems", "acetylacetone", "silicon8", "--rounds", "1"],
    "train_step": ["--presets", "fast", "--steps", "1", "--rounds", "1", "--batches", "acetylacetone"],
    "conservation": ["--runs", "acetylacetone", "silicon-npt", "--scale", "0.003"],
    "trust": ["--systems", "acetylacetone", "silicon8", "--seconds", "0.01"],
    "neighbors": ["--systems", "acetylacetone", "water24", "--repeats", "1"],
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmark(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name], "--out", str(tmp_path / "result")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["machine"]["torch"] and len(content["rows"]) > 0
    assert all(value > 0 for row in content["rows"] for key, value in row.items() if key.endswith("_ms"))
    assert (tmp_path / "result.png").stat().st_size > 1000
    assert len(done.stdout.splitlines()) >= 2 + len(content["rows"])
