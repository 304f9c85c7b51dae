"""What is kept between processes: whole, of this user, and made by many at once."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ase.build import molecule

from segnn_ase.compiled import build, cache, steered_formulas
from segnn_ase.compiled.build import load_libraries, load_library, load_triton
from segnn_ase.compiled.cache import CompilerError, cache_folder
from segnn_ase.model.irreps import Coupling, spherical_kinds

SOURCE = "int answer(void) { return 41; }"
AS_ROOT = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="gives files to another user")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEGNN_ASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def the_library(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def test_the_folder_and_what_is_in_it_are_private(folder):
    assert load_library(SOURCE).answer() == 41
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(the_library(folder).stat().st_mode) == 0o600
    folder.chmod(0o777)
    assert load_library(SOURCE).answer() == 41
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(("looks", "few", "said"), [(True, 0, 1), (True, 1, 0), (False, 0, 0)])
def test_who_waits_for_kernels_at_a_terminal_is_told_once(folder, monkeypatch, capsys, looks, few, said):
    monkeypatch.setattr(build, "somebody_looks", lambda: looks)
    monkeypatch.setattr(build, "FEW", few)
    kinds = spherical_kinds(1)
    wanted = [(steered_formulas.product(Coupling(kinds, kinds, kinds), 2), 0)]
    for _ in range(2):
        load_libraries(wanted, torch.float64)
    text = f"segnn_ase: 1 kernels are compiled for this machine, once, into {folder}\n"
    assert capsys.readouterr() == ("", text * said)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 6 // 10)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another(path: Path) -> None:
    other = path.with_name("other.c")
    other.write_text("int answer(void) { return 666; }")
    subprocess.run(["cc", "-shared", "-fPIC", other, "-o", path], check=True)
    other.unlink()


def linked(path: Path) -> None:
    aside = path.parent.with_name("aside")
    another(path)
    path.rename(aside)
    path.symlink_to(aside)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flipped, another, linked, emptied], ids=lambda damage: damage.__name__)
def test_a_library_that_is_not_whole_is_made_again(folder, damage):
    """In a process of its own: this one has the good library loaded."""
    assert load_library(SOURCE).answer() == 41
    whole = (library := the_library(folder)).read_bytes()
    os.replace(shutil.copy2(library, folder / "copy"), library)  # what is loaded here stays whole
    damage(library)
    code = f"from segnn_ase.compiled.build import load_library\nprint(load_library({SOURCE!r}).answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "41"), done.stderr
    assert the_library(folder).read_bytes() == whole and not the_library(folder).is_symlink()


def planted(folder: Path, **rights) -> None:
    """A library under a name that is right for its content, which no compiler of ours made."""
    library = the_library(folder)
    another(library)
    key = library.name.partition("-")[0]
    evil = library.rename(folder / f"{key}-{cache._sum_of(library.read_bytes())}.so")
    evil.chmod(rights.get("mode", 0o600))
    if "owner" in rights:
        os.chown(evil, rights["owner"], rights["owner"])


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_library_that_others_may_write_is_not_run(folder, mode):
    load_library(SOURCE)
    planted(folder, mode=mode)
    assert load_library(SOURCE).answer() == 41


@AS_ROOT
def test_a_library_of_another_user_is_not_run(folder):
    load_library(SOURCE)
    planted(folder, owner=12345)
    assert load_library(SOURCE).answer() == 41


def test_these_would_have_been_run(folder):
    """Guards the two tests above."""
    load_library(SOURCE)
    planted(folder)
    assert load_library(SOURCE).answer() == 666


@AS_ROOT
def test_a_folder_of_another_user_is_not_used(folder):
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(
        CompilerError, match=r"not kept in .*cache, which others may write .owner 12345, mode 755.; set"
    ):
        load_library(SOURCE)
    assert not list(folder.iterdir())


def test_generated_python_is_run_from_memory(folder):
    pytest.importorskip("triton")
    source = "import triton\nKERNEL = 1\n"
    assert load_triton(source) == 1
    (path,) = folder.glob("*.py")
    assert path.read_text() == source and stat.S_IMODE(path.stat().st_mode) == 0o600
    del sys.modules[path.stem]
    path.write_text("KERNEL = 666\n")
    assert load_triton(source) == 1 and path.read_text() == source


# what has not been used for long


def aged(path: Path, days: float) -> Path:
    os.utime(path, (time.time() - days * cache.DAY,) * 2)
    return path


def test_code_that_is_not_used_any_more_goes_when_other_is_made(folder):
    load_library(SOURCE)
    ours = [f"{'0' * 32}-{'1' * 32}.so", f"{'ab' * 16}.so", f"{'c' * 64}.so", f"segnn_ase_{'d' * 32}.py"]
    for name in [*ours, ".left.so.0123abcd", "libmine.so", "notes.txt", "0123.so"]:
        aged(folder / name, 1000) if (folder / name).write_text("x") else None
    (folder / "tmpabcd_123").mkdir()
    (folder / "tmpabcd_123" / "kernel.c").write_text("")
    aged(folder / "tmpabcd_123", 2)
    (folder / "tmpnew45678").mkdir()
    (folder / ".new.so.89abcdef").write_text("")
    (folder / f"{'2' * 32}.so").write_text("")
    aged(folder / f"{'2' * 32}.so", 59)
    aged(the_whole(folder), 61)
    cache._clear_once.cache_clear()  # as in another process
    load_library("int answer(void) { return 42; }")
    kept = {"libmine.so", "notes.txt", "0123.so", "tmpnew45678", ".new.so.89abcdef", f"{'2' * 32}.so"}
    assert {path.name for path in folder.iterdir()} == {*kept, the_whole(folder).name}


def the_whole(folder: Path) -> Path:
    """The only library that a compiler made."""
    (library,) = (path for path in folder.glob("*-*.so") if cache._is_good(path))
    return library


def test_code_that_is_used_stays(folder):
    load_library(SOURCE)
    used = aged(the_library(folder), 61)
    assert load_library(SOURCE).answer() == 41 and cache._age(used) < cache.DAY
    before = aged(used, 0.5).lstat().st_mtime
    load_library(SOURCE)
    assert used.lstat().st_mtime == before  # noted once a day
    load_library("int answer(void) { return 42; }")
    assert used.exists()


def test_code_of_others_and_what_cannot_be_touched_stay(folder, monkeypatch):
    load_library(SOURCE)
    foreign = folder / f"{'e' * 32}.so"
    foreign.symlink_to("/nonexistent")
    old = folder / f"{'f' * 32}.so"
    old.write_text("x")
    aged(old, 100)
    monkeypatch.setattr(cache, "_is_ours", lambda state: False)
    cache.clear_unused(folder)
    assert old.exists() and foreign.is_symlink()
    aged(the_whole_of(folder), 70)

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert load_library(SOURCE).answer() == 41


def the_whole_of(folder: Path) -> Path:
    (library,) = folder.glob("*-*.so")
    return library


def test_loaded_code_outlives_its_file(folder):
    library = load_library(SOURCE)
    aged(the_library(folder), 1000)
    cache.clear_unused(folder)
    assert not list(folder.glob("*.so")) and library.answer() == 41
    assert load_library(SOURCE).answer() == 41 and the_library(folder)


def clearing(arguments) -> list[int]:
    """Make, use and remove at the same time."""
    folder, seed = arguments
    answers = []
    for n in range(6):
        answers.append(load_library(f"int answer(void) {{ return {500 + (seed + n) % 3}; }}").answer())
        for path in Path(folder).glob("*.so"):
            try:
                aged(path, 1000)
            except FileNotFoundError:
                pass
        cache.clear_unused(Path(folder))
    return answers


def test_processes_that_clear_and_compile_at_once(folder):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(clearing, [(str(folder), seed) for seed in range(3)], chunksize=1)
    assert found == [[500 + (seed + n) % 3 for n in range(6)] for seed in range(3)]


# where the folder is


def test_where_the_folder_is(tmp_path, monkeypatch):
    for name in ("SEGNN_ASE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "segnn_ase"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "segnn_ase"
    monkeypatch.setenv("SEGNN_ASE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def nobody(monkeypatch, tmp_path) -> None:
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)


def a_file_as_home(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))


def a_file_as_cache(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


@pytest.mark.parametrize("spoil", [nobody, a_file_as_home, a_file_as_cache], ids=lambda spoil: spoil.__name__)
def test_without_a_home_a_private_temporary_folder_serves(tmp_path, monkeypatch, spoil):
    for name in ("SEGNN_ASE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    spoil(monkeypatch, tmp_path)
    folder = cache_folder()
    assert folder == tmp_path / "tmp" / f"segnn_ase-{os.getuid()}" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(CompilerError, match=r"is a link; expected a folder\. Set SEGNN_ASE_CACHE"):
        cache_folder()


@AS_ROOT
def test_a_user_without_home_or_name_compiles(tmp_path):
    """A container that is run by `--user`."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    code = f"""
import os, tempfile
from segnn_ase.compiled import build
os.chdir({str(tmp_path / "tmp")!r})
tempfile.tempdir = "."
for name in ("HOME", "XDG_CACHE_HOME", "SEGNN_ASE_CACHE"):
    os.environ.pop(name, None)
os.setuid(12345)
print(build.load_library({SOURCE!r}).answer())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "41\n"), done.stderr
    folder = tmp_path / "tmp" / "segnn_ase-12345"
    assert folder.stat().st_uid == 12345 and stat.S_IMODE(folder.stat().st_mode) == 0o700


# many at once


def compiled(arguments) -> list[int]:
    start, numbers = arguments
    time.sleep(max(0.0, start - time.time()))
    return [load_library(f"int answer(void) {{ return {n}; }}").answer() for n in numbers]


# a spawned process imports PyTorch: few of them, and eight in the proofs
@pytest.mark.parametrize(
    ("method", "processes"),
    [("spawn", 3), ("fork", 8), pytest.param("spawn", 8, marks=pytest.mark.proof)],
)
@pytest.mark.parametrize("damaged", [False, True], ids=["empty", "damaged"])
def test_many_processes_compile_into_one_cache_at_once(folder, method, processes, damaged):
    numbers = list(range(100, 104))
    if damaged:
        compiled((0, numbers))
        for library in folder.glob("*.so"):
            cut(library)
    with multiprocessing.get_context(method).Pool(processes) as pool:
        found = pool.map(compiled, [(time.time() + 4 * (method == "spawn"), numbers)] * processes, chunksize=1)
    assert found == [numbers] * processes
    assert {path.suffix for path in folder.iterdir()} == {".so"} and len(list(folder.iterdir())) >= 4


def energy_in_a_process(_) -> float:
    from segnn_ase import SEGNNCalculator

    atoms = molecule("CH3CH2OH")
    atoms.calc = SEGNNCalculator("acetylacetone-pbe", domain="ignore")
    return atoms.get_potential_energy()


@pytest.mark.slow
def test_calculators_in_spawned_processes():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(energy_in_a_process, range(4), chunksize=1)
    assert max(found) - min(found) < 1e-9 and abs(found[0] - energy_in_a_process(0)) < 1e-9


# compilers that speak


def test_a_compiler_that_speaks_another_alphabet(folder, tmp_path, monkeypatch):
    speaker = tmp_path / "cc"
    speaker.write_bytes(b"#!/bin/sh\nprintf 'Fehler: \\344\\366\\374 \\377' >&2\nexit 1\n")
    speaker.chmod(0o755)
    monkeypatch.setenv("CC", str(speaker))
    with pytest.raises(CompilerError, match=r"cc does not compile the kernels: Fehler: .* "):
        load_library(SOURCE)


@pytest.mark.parametrize("text", [b"\xff" * 10**6, b"", b"a\nb\x00c"], ids=["long", "silent", "binary"])
def test_a_compiler_that_fails_in_any_way(folder, tmp_path, monkeypatch, text):
    (tmp_path / "message").write_bytes(text)
    speaker = tmp_path / "cc"
    speaker.write_text(f"#!/bin/sh\ncat {tmp_path}/message >&2\nexit 3\n")
    speaker.chmod(0o755)
    monkeypatch.setenv("CC", str(speaker))
    with pytest.raises(CompilerError, match="does not compile the kernels") as error:
        load_library(SOURCE)
    assert len(str(error.value)) < 1000 and not list(folder.glob("*.so"))


def test_a_compiler_that_makes_nothing(folder, tmp_path, monkeypatch):
    """Exit status 0, and no library."""
    speaker = tmp_path / "cc"
    speaker.write_text("#!/bin/sh\nexit 0\n")
    speaker.chmod(0o755)
    monkeypatch.setenv("CC", str(speaker))
    with pytest.raises(CompilerError, match="does not compile the kernels"):
        load_library(SOURCE)
