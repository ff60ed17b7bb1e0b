"""The Triton kernels beyond their results: machine code, memory traffic, no compilation for every length.

Without a GPU kernels run in the interpreter, where loads and stores are counted, and are compiled in a process of their
own (tests/triton_compile.py), since interpreted kernels cannot be.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import leantune_kernels
import traffic

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
OPS = [op for op in leantune_kernels.ops() if find_spec(f"leantune_kernels.{op}.triton_impl")]
LIMIT = 1.1  # of the floor
STACK = (
    16  # bytes: the bottleneck adapter of rank 128 and more in float32 lacks up to four registers, no other kernel any
)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="traffic is counted in the interpreter")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Results of compiling what the cases launch, and what launches at other lengths would add."""
    report = tmp_path_factory.mktemp("triton") / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "triton_compile.py"), "--json", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert report.exists(), result.stdout + result.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_for_sm_80_90_and_100(op, compiled):
    mine = [r for r in compiled["compiled"] if r["op"] == op]
    assert {r["sm"] for r in mine} == {80, 90, 100}
    assert not [f"{r['kernel']} sm_{r['sm']}: {r['error']}" for r in mine if r["error"]]
    assert not [f"{r['kernel']} sm_{r['sm']}: {r['stack']} bytes of stack" for r in mine if r["stack"] > STACK]


@pytest.mark.parametrize("op", OPS)
def test_a_new_length_compiles_nothing_new(op, compiled):
    assert compiled["added_by_length"][op] == []


@interpreted
@pytest.mark.parametrize(("op", "dtype"), traffic.memory_bound("triton_impl"))
def test_traffic_is_near_its_floor(op, dtype, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "triton")
    ratio = traffic.measured(op, dtype, traffic.by_triton)
    assert ratio.forward <= LIMIT
    assert ratio.backward is None or ratio.backward <= LIMIT
