"""Every block of the README runs as printed: Python and shell blocks, in order, in one empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    found = blocks()
    assert len(found) >= 5
    for language, block in found:
        if language == "python":
            run([sys.executable, "-W", "error", "-c", block], tmp_path)
        elif lines := shell_lines(block):
            run(["bash", "-ec", "\n".join(lines)], tmp_path)


def test_the_two_commands_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in ("make md", "make test"):
        assert target in README.read_text()
        assert f"\n{target.removeprefix('make ')}:" in makefile
