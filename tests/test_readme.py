"""Every block of the README runs as printed: Python and shell blocks, in order, in one empty folder."""

import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

# one process for the Python blocks that follow each other, each a program of its own: PyTorch is imported once
PROGRAMS = """
for number, block in enumerate({blocks!r}):
    exec(compile(block, f"README, Python block {{number}}", "exec"), {{"__name__": "__main__"}})
"""
README = Path(__file__).parent.parent / "README.md"
SETUP = ("make ", "pip ", "git ", "python -m venv", "#")  # the tests run in what these lines set up


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path, **kwargs) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600, **kwargs
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def shell_lines(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith(SETUP)]


@pytest.mark.slow
def test_blocks_run_as_printed(tmp_path):
    found = [(language, block) for language, block in blocks() if language == "python" or shell_lines(block)]
    assert len(found) >= 5
    for language, group in groupby(found, lambda block: block[0]):
        texts = [block for _, block in group]
        if language == "python":
            run([sys.executable, "-W", "error", "-c", PROGRAMS.format(blocks=texts)], tmp_path)
        else:
            run(["bash", "-ec", "\n".join(line for block in texts for line in shell_lines(block))], tmp_path)


def test_the_two_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in ("make md", "make test"):
        assert target in README.read_text()
        assert f"\n{target.removeprefix('make ')}:" in makefile
