"""The house: imports run from floor to floor downwards, importing costs nothing, and the public names are there.

Floors, limits and everything counted come from benchmarks/structure.py.
"""

import ast
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

import segnn_ase

CHECKOUT = Path(segnn_ase.__file__).parent.parent
TESTS = Path(__file__).parent
HOUSE = SimpleNamespace(**runpy.run_path(str(TESTS.parent / "benchmarks" / "structure.py")))
PACKAGE = HOUSE.read_package(CHECKOUT)
IMPORTS = HOUSE.all_imports(PACKAGE)
OF_EXTRA = "segnn_ase.engines.torchsim"  # whose class is one of another library
THIRD_PARTY = "ase, ase.io, matplotlib, matscipy, numpy, pydantic, scipy, tqdm, typer"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_room_has_a_floor():
    assert HOUSE.rooms_of(PACKAGE) == set(HOUSE.FLOOR)


@pytest.mark.parametrize("room", sorted(HOUSE.FLOOR))
def test_imports_run_downwards(room):
    assert not [i for i in sorted(IMPORTS) if HOUSE.room_of(i.importer) == room and not HOUSE.runs_downwards(i)]


def test_the_package_itself_imports_only_from_the_lowest_floor():
    assert {HOUSE.room_of(i.module) for i in IMPORTS if HOUSE.room_of(i.importer) == "__init__"} == {"base"}


def test_no_private_name_leaves_its_room():
    across = [i for i in IMPORTS if HOUSE.room_of(i.importer) != HOUSE.room_of(i.module)]
    private = re.compile(r"(^|\.)_(?!_)")
    assert not [i for i in across if private.search(i.module) or private.search(i.name)]


def test_no_import_is_relative():
    assert not [i for i in IMPORTS if not i.module.startswith("segnn_ase")]


def test_no_modules_import_each_other():
    assert HOUSE.circle(PACKAGE, IMPORTS) == []


@pytest.mark.parametrize("room", ["base", "structure", "model", "data", "md", "check"])
def test_the_compiler_is_not_named_below_it(room):
    """Not in a string given to import_module either."""
    found = {m for m, source in PACKAGE.items() if re.search(r"segnn_ase\.compiled|\bimport compiled\b", source)}
    assert not {module for module in found if HOUSE.room_of(module) == room}


def test_nothing_is_too_long():
    measured = (
        (HOUSE.module_lengths, HOUSE.LONGEST_MODULE),
        (HOUSE.functions, HOUSE.LONGEST_FUNCTION),
        (HOUSE.classes, HOUSE.LONGEST_CLASS),
    )
    long = {length.where for measure, limit in measured for length in measure(PACKAGE) if length.lines > limit}
    assert not long


def test_a_name_is_defined_in_one_module():
    twice = HOUSE.names_in_two_modules(PACKAGE)
    assert not twice


def test_no_test_module_imports_another_one():
    """What two of them need is in tests/helpers."""
    modules = {path.stem for path in TESTS.rglob("*.py") if path.parent.name != "helpers"}
    for path in TESTS.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not modules & imported, path


@pytest.mark.parametrize("module", ["segnn_ase", "segnn_ase.train.settings", "segnn_ase.md.settings", "segnn_ase.cli"])
def test_importing_is_cheap_and_silent(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'e3nn', 'ase', 'matplotlib'}} & set(sys.modules)))"
    assert run_python(code).strip() == ""


def test_what_a_calculator_does_not_need_is_not_imported_with_it():
    unneeded = {"e3nn", "sympy", "torch._dynamo", "matplotlib", "pandas"}
    code = "import sys, torch; before = set(sys.modules); from segnn_ase import SEGNNCalculator; "
    code += f"print(*({unneeded} & (set(sys.modules) - before)))"
    assert run_python(code).strip() == ""


def test_importing_everything_prints_nothing_and_changes_no_global():
    names = ", ".join(sorted(module for module in PACKAGE if not module.endswith("__init__") and module != OF_EXTRA))
    code = f"""
import atexit, logging, os, random, signal, sys, threading, warnings, torch, {THIRD_PARTY}
state = lambda: (
    torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.initial_seed(),
    torch.random.get_rng_state().sum(), torch.backends.cuda.matmul.allow_tf32, random.getstate(), numpy.geterr(),
    numpy.random.get_state()[1].tolist(), dict(os.environ), os.getcwd(), os.umask(0o22), threading.active_count(),
    {{number: signal.getsignal(number) for number in signal.valid_signals()}}, list(logging.root.handlers),
    sys.excepthook, list(sys.path), sys.getrecursionlimit(), sys.getswitchinterval(), list(warnings.filters),
)
hooks = []
def hook(kind):
    def record(*args, **kwargs):
        hooks.append((kind, sys._getframe(1).f_globals.get("__name__", "")))
    return record
os.register_at_fork, atexit.register = hook("fork"), hook("exit")
before = state()
import {names}
assert state() == before
hooks = [(kind, module) for kind, module in hooks if module.startswith("segnn_ase")]
assert not hooks, hooks
"""
    assert run_python(code) == ""


def test_every_folder_and_file_is_installed():
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = {p for p in (CHECKOUT / "segnn_ase").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    listed = {name: CHECKOUT.joinpath(*name.split(".")) for name in settings["packages"]}
    del listed["segnn_ase.potentials"]  # lies elsewhere; tests/test_potentials.py finds its files
    assert set(listed.values()) == {path.parent for path in (CHECKOUT / "segnn_ase").rglob("*.py")}
    assert files == {
        p for name, folder in listed.items() for g in settings["package-data"].get(name, []) for p in folder.glob(g)
    }


def test_the_oldest_versions_are_those_that_are_declared():
    dependencies = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = dict(dependency.split(">=") for dependency in dependencies)
    tested = dict(re.findall(r"^(.+)==(.+)$", (TESTS.parent / ".ci" / "oldest.txt").read_text(), flags=re.MULTILINE))
    assert {n: Version(v) for n, v in declared.items()} == {n: Version(v) for n, v in tested.items() if n in declared}


def test_no_public_name_is_that_of_a_room():
    """Importing the module would replace the name: `from segnn_ase import train` gives one or the other."""
    assert not set(segnn_ase.__all__) & HOUSE.rooms_of(PACKAGE)


@pytest.mark.parametrize("room", ["", ".data", ".md", ".model", ".train", ".verify"])
def test_public_names(room):
    module = importlib.import_module(f"segnn_ase{room}")
    assert module.__all__
    for name in module.__all__:
        assert callable(getattr(module, name)), name


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'walrus'"):
        _ = segnn_ase.walrus
