"""One writer for each file: in two processes, in one, by other names, and after a kill."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ase.io
import pytest
from helpers.dynamics import config, contents, crystal, run
from helpers.frames import water_frames
from helpers.trainings import configured

from segnn_ase.base import locks
from segnn_ase.base.errors import OutputError
from segnn_ase.base.locks import only_writer
from segnn_ase.train.committee import member_config
from segnn_ase.train.start import finetune, train

OWNER = """
import sys
from segnn_ase.base.locks import only_writer
with only_writer([sys.argv[1]]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def owner_of(path: Path) -> subprocess.Popen:
    """Another process that has locked the file, until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    return process


def test_another_process_is_named_and_waited_for(tmp_path):
    with owner_of(tmp_path / "log") as process:
        message = rf"cannot write '.*log': process {process.pid} on .* is writing it; wait for it, or choose another"
        with pytest.raises(OutputError, match=message), only_writer([tmp_path / "other", tmp_path / "log"]):
            pass
        with only_writer([tmp_path / "other"]):  # was let go
            pass
    with only_writer([tmp_path / "log"]):
        assert [path.name for path in tmp_path.iterdir()] == [".log.lock"]
    assert not list(tmp_path.iterdir())


def test_a_killed_owner_leaves_no_lock(tmp_path):
    with owner_of(tmp_path / "log") as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".log.lock").exists()
    with only_writer([tmp_path / "log"]):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sub/../log", "./log", "link", "folder/log"])
def test_a_file_by_another_name_is_the_same(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("log")
    (tmp_path / "folder").symlink_to(".")
    with only_writer(["log", "./log"]), pytest.raises(OutputError, match=f"cannot write '{name}'"), only_writer([name]):
        pass


def test_two_threads_exclude_each_other(tmp_path):
    found = []

    def other():
        try:
            with only_writer([tmp_path / "log"]):
                found.append("locked")
        except OutputError as error:
            found.append(str(error))

    with only_writer([tmp_path / "log"]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1 and f"process {os.getpid()} on" in found[0]


def test_many_processes_at_once_never_write_together(tmp_path):
    """Each adds one to a number, which is lost where two do it at a time."""
    code = """
import pathlib, sys, time
from segnn_ase.base.errors import OutputError
from segnn_ase.base.locks import only_writer
path, done = pathlib.Path(sys.argv[1]), 0
while done < 100:
    try:
        with only_writer([path]):
            number = int(path.read_text())
            time.sleep(0.0005)
            path.write_text(str(number + 1))
            done += 1
    except OutputError:
        pass
"""
    path = tmp_path / "number"
    path.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(4)]
    assert [process.wait(timeout=100) for process in processes] == [0] * 4
    assert path.read_text() == "400" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    def missing(file):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks, "_lock", missing)
    with (
        pytest.warns(UserWarning, match=r"log: no locks here \(Function not implemented\)"),
        only_writer([tmp_path / "log"]),
    ):
        pass


@pytest.mark.parametrize("name", ["log", "trajectory", "restart"])
def test_dynamics_leaves_files_alone_that_another_run_writes(tmp_path, name):
    settings = config(tmp_path, steps=4)
    run(crystal(), settings)
    before = contents(settings)
    for others in (settings, config(tmp_path / "b", steps=8, **{name: getattr(settings, name)})):
        with only_writer([getattr(settings, name)]), pytest.raises(OutputError, match=getattr(settings, name)):
            run(crystal(), others, overwrite=True)
    assert contents(settings) == before
    run(crystal(), settings.model_copy(update={"steps": 8}))


@pytest.mark.parametrize("kind", ["train", "committee", "member", "finetune"])
def test_training_leaves_files_alone_that_another_one_writes(tmp_path, kind):
    ase.io.write(tmp_path / "train.traj", water_frames(6))
    settings = configured(tmp_path, committee=2 if kind in ("committee", "member") else 1)
    model = "water-pbe0"
    out = member_config(settings, 2).out if kind == "member" else settings.out
    before = set(tmp_path.iterdir())
    with only_writer([out]), pytest.raises(OutputError, match=rf"cannot write '{out}': process .* is writing it"):
        if kind == "finetune":
            finetune(model, settings.model_copy(update={"model": {}}), progress=False)
        else:
            train(settings, progress=False)
    if kind != "member":
        assert set(tmp_path.iterdir()) == before
