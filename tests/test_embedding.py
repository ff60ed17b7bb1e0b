"""The kernels in other programs: the examples run as their comments say, and PyTorch is never loaded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "embedding"


@pytest.fixture
def python_on_path(tmp_path):
    """An environment where `python` is the interpreter of the tests, with the packages of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    kernels = str(ROOT / "kernels")
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": kernels}


def test_the_c_program_builds_as_its_comment_says(tmp_path, python_on_path):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc)")
    source = shutil.copy(EXAMPLES / "rms_norm.c", tmp_path)
    (command,) = re.findall(r"^ \*   (cc .*)$", Path(source).read_text(), re.MULTILINE)
    for level in ("", "base"):
        environment = {**python_on_path, **({"LEANTUNE_ISA": level} if level else {})}
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "largest error" in done.stdout and f"level {level}" in done.stdout
