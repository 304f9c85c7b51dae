"""The benchmarks run, with the smallest settings, and write what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
from ase.build import bulk
from helpers.frames import emt_atoms

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "md_step": ["--calculators", "fast", "fast:torch", "--systems", "acetylacetone", "silicon8", "--rounds", "1"],
    "train_step": ["--presets", "fast", "--steps", "1", "--rounds", "1", "--batches", "acetylacetone"],
    "conservation": ["--runs", "acetylacetone", "silicon-npt", "--scale", "0.003"],
    "trust": ["--systems", "acetylacetone", "silicon8", "--seconds", "0.01"],
    "dispersion": ["--systems", "acetylacetone", "silicon8", "--rounds", "1"],
    "neighbors": ["--systems", "acetylacetone", "water24", "--repeats", "1"],
}

HOUSE = {
    "__init__.py": "__version__ = '0'\n",
    "base/__init__.py": "",
    "base/files.py": "import segnn_ase.cli, os\n\ndef f():\n    'x'\n    return 1\n",
    "model/__init__.py": "",
    "model/net.py": "from segnn_ase import __version__\nfrom segnn_ase.data import frames\nclass A:\n    a = 1\n",
    "data/__init__.py": "",
    "data/frames.py": "from segnn_ase.base.files import f, g\n" + "class A:\n" + "    a = 1\n" * 250,
    "data/table.py": "\n".join(["def f():", *("    x = 1" for _ in range(60)), "def g(): return 1\n"]),
    "cli.py": "def h():\n    from segnn_ase.data.frames import A\n    from segnn_ase.data.table import f\n",
    "base/kernel.c": "int x;\n" * 10,
}
FIGURES = {
    "folders": "3",
    "modules": "9",
    "lines of Python": "327",
    "lines of C": "10",
    "lines against 12413": "-97.3%",
    "imports": "6",
    "imports across rooms": "6",
    "pairs of rooms": "5",
    "floors in use": "1",
    "imports upwards or sideways": "2",
    "modules in circles": "4",
    "functions": "4",
    "function, median": "2",
    "function, 90 of 100 within": "3",
    "function, longest": "61 data.table.f",
    "functions above 60": "1",
    "class, longest": "251 data.frames.A",
    "module, longest": "252 data.frames",
    "modules above 450": "0",
    "names in two modules": "2",
}
FAULTS = [
    "upwards or sideways: segnn_ase.base.files imports segnn_ase.cli",
    "upwards or sideways: segnn_ase.model.net imports segnn_ase.data.frames",
    "in two modules: A in segnn_ase.data.frames, segnn_ase.model.net",
    "in two modules: f in segnn_ase.base.files, segnn_ase.data.table",
    "above 60 lines: segnn_ase.data.table.f, 61",
    "above 200 lines: segnn_ase.data.frames.A, 251",
]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_doctor_on_a_sound_set(tmp_path):
    """The figures are those of the rows, no part has a false error, and the largest constant is found."""
    images = emt_atoms(40, lambda: bulk("Cu", cubic=True).repeat((2, 1, 1)))
    for n, atoms in enumerate(images):
        atoms.info["config_type"] = "ab"[n % 2]
    (tmp_path / "copper").mkdir()
    ase.io.write(tmp_path / "copper" / "train.xyz", images)
    ase.io.write(tmp_path / "isolated_atoms.xyz", images[:1])
    command = [sys.executable, str(FOLDER / "doctor.py"), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:5] == ["set", "frames", "parts", "false", "errors"]
    assert lines[2].split()[:4] == ["copper/train.xyz", "40", "11", "0"]
    assert lines[3] == "false errors: 0 of 11 parts" and "found, 100: 1 of 1 sets" in lines


@pytest.mark.proof
def test_the_domain_of_a_shipped_potential(tmp_path):
    """Everything outside is flagged, nothing inside, with the potential's own reference structures as test set."""
    (tmp_path / "mlearn_Si").mkdir()
    reference = FOLDER.parent / "potentials" / "silicon-pbe" / "reference.xyz"
    (tmp_path / "mlearn_Si" / "test.xyz").write_text(reference.read_text())
    command = [sys.executable, str(FOLDER / "domain.py"), str(tmp_path), "--only", "silicon"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    outside = re.match(r"outside: (\d+) of (\d+) structures flagged", lines[-3])
    assert int(outside[1]) >= 0.95 * int(outside[2]) > 30 and lines[-2] == "test frames: 0 of 2 flagged"


def test_figures_of_the_structure(tmp_path):
    """Of a package of which every figure is known."""
    for name, source in HOUSE.items():
        path = tmp_path / "segnn_ase" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    command = [sys.executable, str(FOLDER / "structure.py"), str(tmp_path), "--faults"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    figures = dict(re.split(r"  +", line, maxsplit=1) for line in lines if "  " in line)
    assert figures == FIGURES
    assert [line for line in lines if "  " not in line] == FAULTS
