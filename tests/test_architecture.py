"""The house: imports run from floor to floor downwards, importing costs nothing, and the public names are there."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import segnn_ase

PACKAGE = Path(segnn_ase.__file__).parent
FLOORS = (
    "base",
    "structure",
    "model data md",
    "compiled trust check",
    "store",
    "calculator",
    "train verify",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES = {
    ".".join(["segnn_ase", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in PACKAGE.rglob("*.py")
}


class Import(NamedTuple):
    module: str  # that is imported
    name: str  # from it


def imports_of(source: str) -> set[Import]:
    """What a source imports from the package, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {Import(a.name, "") for a in node.names if a.name.startswith("segnn_ase.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "segnn_ase":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(Import(inner, "") if inner in MODULES else Import(node.module, alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
    return found


def room_of(module: str) -> str:
    """The folder of a module, or its own name where it lies on the top level."""
    return [*module.split("."), "__init__"][1]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_parser_sees_every_kind_of_import():
    source = """
import segnn_ase.cli
import numpy
from segnn_ase import cli, __version__
from segnn_ase.base import files
def f():
    from segnn_ase.base.files import append
"""
    assert imports_of(source) == {
        Import("segnn_ase.cli", ""),
        Import("segnn_ase", "__version__"),
        Import("segnn_ase.base.files", ""),
        Import("segnn_ase.base.files", "append"),
    }


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    here = room_of(module)
    for other, name in imports_of(MODULES[module].read_text()):
        there = room_of(other)
        if there == here or other == "segnn_ase":
            continue
        assert here != "__init__" or there == "base", f"{module} imports {other}"
        assert FLOOR[there] < FLOOR.get(here, 99), f"{module} imports {other} of the same floor or one above"
        assert not name.startswith("_"), f"{module} imports the private name {name} of {other}"
        assert not other.rpartition(".")[2].startswith("_"), f"{module} imports the private module {other}"


def test_no_folder_has_a_circle():
    graph = {m: {i.module for i in imports_of(path.read_text())} & set(MODULES) for m, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {module for module, others in graph.items() if module not in done and others <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("module", ["segnn_ase", "segnn_ase.train.settings", "segnn_ase.md.settings", "segnn_ase.cli"])
def test_importing_is_cheap_and_silent(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'e3nn', 'ase', 'matplotlib'}} & set(sys.modules)))"
    assert run_python(code).strip() == ""


def test_importing_everything_prints_nothing_and_changes_no_global():
    names = ", ".join(sorted(module for module in MODULES if not module.endswith("__init__")))
    code = f"""
import os, signal, torch
state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ),
                 torch.backends.cuda.matmul.allow_tf32, signal.getsignal(signal.SIGINT), torch.random.initial_seed(),
                 torch.random.get_rng_state().sum())
before = state()
import {names}
assert state() == before
"""
    assert run_python(code) == ""


def test_no_test_module_imports_another_one():
    """What two of them need is in tests/helpers."""
    tests = Path(__file__).parent
    modules = {path.stem for path in tests.rglob("*.py") if path.parent.name != "helpers"}
    for path in tests.rglob("*.py"):
        found = re.findall(r"^ *(?:from|import) (.*)", path.read_text(), flags=re.MULTILINE)
        assert not modules & set(re.findall(r"\w+", " ".join(line.partition(" import ")[0] for line in found))), path


def test_no_public_name_is_that_of_a_room():
    """Importing the module would replace the name: `from segnn_ase import train` gives one or the other."""
    assert not set(segnn_ase.__all__) & {room_of(module) for module in MODULES}


def test_public_names():
    for name in segnn_ase.__all__:
        assert callable(getattr(segnn_ase, name)), name
    with pytest.raises(AttributeError, match="no attribute 'walrus'"):
        _ = segnn_ase.walrus
