"""What a user installs: the wheel built from the sdist, alone in a directory, with this checkout out of sight."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCE = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")  # but the built .so: the sdist must refuse it
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
MISSING = [tool for tool in ("g++", "sh") if shutil.which(tool) is None]

USE = """
import leantune, leantune_kernels, torch
from leantune_kernels.rms_norm import native_impl
x, w = torch.randn(3, 8), torch.randn(8)
torch.testing.assert_close(native_impl.forward(x, w, 1e-5)[0], torch.nn.functional.rms_norm(x, (8,), w, 1e-5))
paths = leantune_kernels.paths()
print(leantune.__file__, leantune_kernels.__file__, native_impl.lib.__file__, paths.library, paths.include, sep="\\n")
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "/libleantune_kernels.so" in line}
assert loaded == {str(paths.library)}, loaded  # one copy of the library in the process
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("setuptools", "pybind11", "wheel"):
        pytest.importorskip(package)
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    folder = tmp_path_factory.mktemp("packaging")
    # A copy, since a build writes beside the sources, and reads what an earlier one wrote there.
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source)
    compiler = folder / "unoptimised"  # a third of the time
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-w", folder)
    run(*PIP, "wheel", *options, sdist, cwd=folder, LEANTUNE_CUDA="0", CXX=str(compiler))
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"leantune", "leantune_kernels"}
    assert {"leantune/py.typed", "leantune_kernels/py.typed"} < set(names)
    assert "leantune_kernels/include/leantune_kernels.h" in names
    native = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert native == ["leantune_kernels/_native", "leantune_kernels/libleantune_kernels"]


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    # PYTHONPATH comes before an editable install, which is asked only where the path has no such module.
    files = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert len(files) == 5 and all(Path(file).is_relative_to(target) for file in files), files
