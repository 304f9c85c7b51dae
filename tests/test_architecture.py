"""The house: imports run one way, importing costs nothing, and the public names are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segnn_ase

PACKAGE = Path(segnn_ase.__file__).parent
LEVELS = (
    {"config", "files", "o3", "neighbors", "plot", "codegen", "tables", "uncertainty"},
    {"graph", "operations", "triton_codegen", "archive", "surrogate", "ensembles", "analysis"},
    {"kernels", "data", "copies", "restart"},
    {"layers", "flaws", "strains"},
    {"model", "program", "relations"},
    {"plan", "doctor"},
    {"engine", "device_engine"},
    {"training_engine"},
    {"potential"},
    {"domain", "accelerate", "captured", "items"},
    {"checkpoint", "watch"},
    {"calculator", "certificate", "assess"},
    {"stability"},
    {"train", "md", "lammps", "torchsim"},
    {"subject"},
    {"verify"},
    {"cli", "__init__"},
    {"__main__"},
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
SIDEWAYS = {  # the only imports within a level
    ("config", "o3"),  # irreps in settings are checked by the one parser of irreps
    ("files", "config"),  # typed errors
    ("neighbors", "config"),  # typed errors
    ("plot", "config"),  # typed errors
    ("plot", "files"),  # figures are written atomically
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("segnn_ase.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "segnn_ase":
                found |= {alias.name if alias.name in LEVEL else "__init__" for alias in node.names}
            elif (node.module or "").startswith("segnn_ase."):
                found.add(node.module.split(".")[1])
    return found


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_parser_sees_every_kind_of_import():
    source = """
import segnn_ase.o3
import numpy
from segnn_ase import plot, __version__
def f():
    from segnn_ase.md import run_md
"""
    assert imported_modules(source) == {"o3", "plot", "__init__", "md"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module):
    assert module in LEVEL, f"{module}.py has no place in the table of levels"
    for other in imported_modules((PACKAGE / f"{module}.py").read_text()):
        assert LEVEL[other] < LEVEL[module] or (module, other) in SIDEWAYS, f"{module} imports {other}"


def test_no_exception_is_left_over():
    for module, other in SIDEWAYS:
        assert other in imported_modules((PACKAGE / f"{module}.py").read_text())
        assert (other, module) not in SIDEWAYS


@pytest.mark.parametrize("module", ["segnn_ase", "segnn_ase.config", "segnn_ase.cli"])
def test_importing_is_cheap_and_silent(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'e3nn', 'ase', 'matplotlib'}} & set(sys.modules)))"
    assert run_python(code).strip() == ""


def test_importing_everything_prints_nothing_and_changes_no_global():
    names = ", ".join(f"segnn_ase.{module}" for module in MODULES if module != "__init__")
    code = f"""
import os, signal, torch
state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ),
                 torch.backends.cuda.matmul.allow_tf32, signal.getsignal(signal.SIGINT), torch.random.initial_seed())
before = state()
import {names}
assert state() == before
"""
    assert run_python(code) == ""


def test_no_public_name_is_that_of_a_module():
    """Importing the module would replace the name: `from segnn_ase import train` gives one or the other."""
    assert not set(segnn_ase.__all__) & set(MODULES)


def test_public_names():
    for name in segnn_ase.__all__:
        assert callable(getattr(segnn_ase, name)), name
    with pytest.raises(AttributeError, match="no attribute 'walrus'"):
        _ = segnn_ase.walrus
