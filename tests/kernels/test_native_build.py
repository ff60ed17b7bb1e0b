"""The native library as it was built: levels kept apart, no OpenMP of its own, forcing, threads, errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from leantune_kernels import _native

ROOT = Path(__file__).parent.parent.parent
OBJECTS = sorted(ROOT.glob("build/temp*/leantune/*.o"))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.skipif(not OBJECTS, reason="the build folder is gone; an editable install leaves it")
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
@pytest.mark.parametrize("path", [p for p in OBJECTS if p.stem.count(".")], ids=lambda p: p.stem)
def test_no_symbol_is_shared_between_instruction_levels(path):
    """A symbol that two levels define is merged by the linker, perhaps into code the processor cannot run."""
    level = path.stem.rpartition(".")[2]
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        kind, name = line.split(maxsplit=2)[1:]
        if kind.islower() and kind not in "vwu":
            continue  # local to the object
        entry_point = level == "base" and name.startswith("lt_")
        assert f"lt::{level}::" in name or entry_point, f"{path.name}: {kind} {name}"


def test_the_library_links_no_openmp_runtime():
    if shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    listing = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line for line in listing.splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "omp" in line]


def test_with_pytorch_its_openmp_runtime_is_used():
    from leantune_kernels.native import OPENMP_RUNTIME

    assert "omp" in Path(OPENMP_RUNTIME).name
    loaded = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    runtimes = {name for name in loaded if name.startswith(("libgomp", "libiomp5", "libomp."))}
    assert len(runtimes) == 1, runtimes


def test_without_pytorch_a_pool_of_its_own_gives_the_same_bits():
    """Rows of RMSNorm through the raw interface, in a process that never loads torch."""
    code = (
        "import array, hashlib, sys\n"
        "from leantune_kernels import _native as lib\n"
        "if {torch}: import torch\n"
        "runtime = lib.adopt_openmp()\n"
        "lib.set_num_threads(3)\n"
        "rows, cols = 500, 48\n"
        "x = array.array('f', [(i * 37 % 101) / 50 - 1 for i in range(rows * cols)])\n"
        "w = array.array('f', [1 + i / cols for i in range(cols)])\n"
        "y, r = array.array('f', bytes(4 * rows * cols)), array.array('f', bytes(4 * rows))\n"
        "a = lambda v: v.buffer_info()[0]\n"
        "for _ in range(20): lib.rms_norm_forward(0, a(x), cols, 0, a(w), a(y), cols, a(r), rows, cols, 1e-5)\n"
        "print(bool(runtime), 'torch' in sys.modules, hashlib.sha256(y.tobytes() + r.tobytes()).hexdigest())\n"
    )
    alone, beside = run(code.format(torch=0)), run(code.format(torch=1))
    assert alone.returncode == 0 and beside.returncode == 0, alone.stderr + beside.stderr
    assert alone.stdout.split()[:2] == ["False", "False"]
    assert beside.stdout.split()[:2] == ["True", "True"]
    assert alone.stdout.split()[2] == beside.stdout.split()[2]


def test_an_instruction_level_can_be_forced():
    code = "import leantune_kernels.native as n; print(n.lib.isa())"
    assert run(code, LEANTUNE_ISA="base").stdout.strip() == "base"
    refused = run(code, LEANTUNE_ISA="sse9")
    assert refused.returncode and "'sse9' is none of base, avx2, avx512" in refused.stderr


def test_errors_carry_a_message():
    with pytest.raises(RuntimeError, match="dtype code 9 is none of LT_F32"):
        _native.rms_norm_forward(9, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1e-5)
    with pytest.raises(RuntimeError, match="threads=-1 is negative"):
        _native.set_num_threads(-1)


def test_forcing_an_implementation(monkeypatch):
    import torch

    from leantune_kernels.dispatch import CannotServe, Op, forced, table

    assert forced("rms_norm:cpu,reference", "rms_norm") == "reference"  # the last word counts
    assert forced("reference,rms_norm:cpu", "rms_norm") == "cpu"
    assert forced("rms_norm:cpu", "rope") is None
    with pytest.raises(CannotServe, match="'gpu' is no implementation; use cuda, triton, cpu, reference"):
        forced("gpu", "rope")
    monkeypatch.setenv("LEANTUNE_IMPL", "rms_norm:cuda")
    with pytest.raises(CannotServe, match=r"rms_norm \(LEANTUNE_IMPL=rms_norm:cuda\) cannot run on cpu.*: cuda: "):
        Op("leantune_kernels.rms_norm").pick(torch.empty(0))
    assert table()["rms_norm"]["cpu"] is None and table()["rms_norm"]["triton"]
