"""The benchmarks run, with the smallest settings, and write what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list
from helpers.frames import emt_atoms

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "md_step": [
        "--calculators",
        "fast",
        "fast:torch",
        "--systems",
        "acetylacetone",
        "silicon8",
        "--rounds",
        "2",
        "--seconds",
        "0.05",
    ],
    "train_step": ["--presets", "fast", "--steps", "1", "--rounds", "1", "--batches", "acetylacetone"],
    "conservation": ["--runs", "acetylacetone", "silicon-npt", "--scale", "0.003"],
    "trust": ["--systems", "acetylacetone", "silicon64", "--seconds", "0.01"],
    "dispersion": ["--systems", "acetylacetone", "silicon8", "--rounds", "1"],
    "nbody": ["--models", "segnn", "egnn", "--epochs", "5", "--seeds", "1", "--small", "20"],
    "molecules": [
        "--presets",
        "fast",
        "--targets",
        "dipole",
        "charges",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--frames",
        "60",
    ],
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
def test_chosen_labels_beside_random_ones(tmp_path):
    """Water by GFN2-xTB, so small that its numbers mean nothing; what is there is not done again."""
    small = "--molecule H2O --labels 24 --seeds 1 --pool 30 --test 5 --structures 120 --minutes 0.5".split()
    command = [sys.executable, "-W", "ignore", str(FOLDER / "learn.py"), *small, "--work", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert [row["how"] for row in rows] == ["chosen", "random"] and rows[1]["learned"] == 24
        assert all(0 < row["F"] < 1e5 and 0 < row["E"] < 1e5 for row in rows) and 8 <= rows[0]["learned"] <= 24


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


def test_calculators_take_turns(monkeypatch):
    """A block each in every round; who fails is left out; a ratio is that of times of the same round."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import md_step

    asked = []

    def ask(worker, system, seconds=None):
        asked.append(worker.name)
        if seconds is None:
            return {"atoms": 10, "first_ms": 1.0, "peak_MB": 1.0}
        if worker.name == "broken":
            return {"error": "no", "peak_MB": 1.0}
        load = 1.0 + asked.count("a")  # the machine is slower in every round
        return {"times": [[load * {"a": 1.0, "b": 4.0}[worker.name], 1.0]] * 3, "peak_MB": 1.0}

    monkeypatch.setattr(md_step, "ask", ask)
    hello = {"start_s": 1.0, "device": "cpu", "dtype": "float32"}
    workers = [md_step.Worker(name, None, None, hello) for name in ("a", "broken", "b")]
    rows = md_step.measure("water24", workers, 3, 1.0)
    assert asked == ["a", "broken", "b"] * 2 + ["a", "b"] * 2
    assert [row["calculator"] for row in rows] == ["a", "b"]
    assert rows[0]["rounds"] == [3.0, 4.0, 5.0] and rows[0]["cpu_ms"] == 4.0 and rows[0]["us_per_atom"] == 400.0
    assert rows[0]["spread_pct"] == 12.5
    assert md_step.add_ratios(rows, ["b", "broken"]) == ["b"]
    assert rows[0]["vs b"] == 4.0 and rows[1]["vs b"] == 1.0


@pytest.mark.slow
def test_peers_that_fail_are_named(tmp_path):
    """One that cannot be imported, and one whose process ends at the first question."""
    ends = tmp_path / "python"
    hello = json.dumps({"device": "cpu", "dtype": "float64", "versions": {}})
    ends.write_text(f"#!/bin/sh\necho '{hello}'\nread question\necho lost >&2\nexit 7\n")
    ends.chmod(0o755)
    command = [sys.executable, str(FOLDER / "md_step.py"), "--calculators", "fast", "--systems", "silicon8"]
    command += ["--peer", f"nequip-S={sys.executable}", "--peer", f"snap={ends}", "--peer", "uf3=not/a/python"]
    command += ["--rounds", "1", "--seconds", "0.01", "--out", str(tmp_path / "result")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nequip-S, start: its process ended with code 1: ModuleNotFoundError" in done.stderr
    assert "snap, silicon8: its process ended with code 7: lost" in done.stderr
    assert "uf3, start: [Errno 2]" in done.stderr
    assert [row["calculator"] for row in json.loads((tmp_path / "result.json").read_text())["rows"]] == ["fast"]


@pytest.mark.slow
def test_profile_of_a_step():
    """Most of a step is spent in compiled code, and the rest outside."""
    command = [sys.executable, str(FOLDER / "step.py"), "acetylacetone-pbe", "--profile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    step, inside, outside = (int(line.split()[-2]) for line in done.stdout.splitlines()[1:])
    assert 0 < outside < step and 0 < inside < step and abs(step - inside - outside) < 0.2 * step


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


def write_molecules(folder):
    """A few frames in place of some of the field's sets."""
    files = {"rmd17/ethanol_train": (4, "CH3CH2OH", 0), "rmd17/ethanol_test": (2, "CH3CH2OH", 1)}
    files |= {"acac/train_300K": (4, "C2H6CHOH", 0), "acac/test_300K": (2, "C2H6CHOH", 1)}
    files |= {"acac/test_600K": (2, "C2H6CHOH", 2)}
    for path, (count, build, seed) in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        ase.io.write(folder / f"{path}.xyz", emt_atoms(count, lambda build=build: molecule(build), seed=seed))
    lone_atoms = [emt_atoms(1, lambda z=z: molecule(z))[0] for z in "HCO"]
    ase.io.write(folder / "acac/isolated_atoms.xyz", lone_atoms)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [["SchNet, by density"], pytest.param(["SchNet, by density", "SEGNN as published"], marks=pytest.mark.proof)],
)
def test_special_cases_side_by_side(tmp_path, cases):
    write_molecules(tmp_path)
    command = [sys.executable, str(FOLDER / "special_cases.py"), str(tmp_path), "--sets", "acac", "--seeds", "1"]
    command += ["--minutes", "0.01", "--out", str(tmp_path / "out"), "--cases", *cases]
    for _ in range(2):  # the second finds everything
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["potential"] for row in rows] == cases
    assert all(row["F_300K"] > 0 and 0 <= row["jump"] < 1e-3 for row in rows)  # no pair is near the cutoff
    assert (tmp_path / "out-acac.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("frames", [["3"], pytest.param(["3", "4"], marks=pytest.mark.proof)])
def test_fine_tuning_on_another_molecule(tmp_path, frames):
    write_molecules(tmp_path)
    command = [sys.executable, str(FOLDER / "finetune.py"), str(tmp_path), "--work", str(tmp_path / "work")]
    command += ["--cases", "ethanol", "--modes", "plain", "pseudo", "--frames", *frames, "--scale", "0.001"]
    for _ in range(2):  # the second finds everything
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = done.stdout.partition("rmse")[2].splitlines()
        assert [row.split()[1:3] for row in rows if row.strip()] == [
            ["mode", "frames"],
            *([mode, count] for mode in ("plain", "pseudo") for count in frames),
        ]


@pytest.mark.slow
def test_properties_are_kept(tmp_path):
    """A table with DFT and experiment; the second call finds everything, a property that is gone is measured again."""
    command = [sys.executable, str(FOLDER / "properties.py"), "silicon-pbe", "--groups", "lattice", "melt"]
    command += ["--ps", "0.5", "--work", str(tmp_path), "--out", str(tmp_path / "result")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for told in (2, 0):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" ...\n") == told
    rows = {row["property"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    lattice = rows["lattice constant"]
    assert abs(lattice["model"] / lattice["dft"] - 1) < 0.01 and "data" in lattice["sources"]
    assert abs(rows["melt, first peak"]["model"] - 2.4) < 0.2 and rows["melt, first peak"]["dft"] is None
    assert (tmp_path / "result.png").stat().st_size > 1000


def test_properties_of_known_structures(monkeypatch):
    """A diffusion that was put in, hydrogen bonds that can be counted, a peak between bins, slabs of known bonds."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import crystals
    import properties

    rng = np.random.default_rng(0)
    steps = 0.05 * rng.normal(size=(400, 300, 3)).cumsum(axis=0)  # Å; D = 0.05^2 / 2 in each step
    D, spread = properties.diffusion([Atoms("O300", positions) for positions in steps], interval=25.0)
    assert abs(D - 0.5) < 3 * spread < 0.3
    pair = Atoms("OHHOHH", [[0, 0, 0], [0, 0, 0.97], [0.9, 0, -0.3], [0, 0, 2.8], [0.9, 0, 3.1], [-0.9, 0, 3.1]])
    pair.set_cell([12, 12, 12])
    pair.pbc = True
    assert properties.hydrogen_bonds([pair]) == 1.0  # given by one, taken by the other
    pair.positions[1] = [0, 0.97, 0]
    assert properties.hydrogen_bonds([pair]) == 0.0
    r = np.linspace(2, 4, 21)
    assert np.allclose(properties.peak(r, 2.5 - (r - 2.83) ** 2, (2.2, 3.3)), (2.83, 2.5))
    for name, outermost in {"(100), 1x1": [2] * 2, "(100), 2x1": [3] * 4, "(111), 1x1": [3] * 2}.items():
        slab = crystals.SILICON.surfaces[name]("Si", 5.47)
        bonds = np.sort(np.bincount(neighbor_list("i", slab, 2.6)))
        assert bonds.tolist() == outermost + [4] * (len(slab) - len(outermost))
