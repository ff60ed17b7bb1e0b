"""The Triton kernels beyond their results: machine code, memory traffic, no compilation for every length.

Without a GPU kernels run in the interpreter, where loads and stores are counted, and are compiled in a process of their
own (tests/triton_compile.py), since interpreted kernels cannot be.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import leantune_kernels
from leantune_kernels import testing

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
OPS = [op for op in leantune_kernels.ops() if find_spec(f"leantune_kernels.{op}.triton_impl")]
LIMIT = 1.1  # of the floor
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
    assert not [f"{r['kernel']} sm_{r['sm']}: {r['stack']} bytes of stack" for r in mine if r["stack"]]


@pytest.mark.parametrize("op", OPS)
def test_a_new_length_compiles_nothing_new(op, compiled):
    assert compiled["added_by_length"][op] == []


def counted(op, dtype):
    """(bytes forward, bytes backward, floor) of the op's traffic case, as its Triton kernels ask for them."""
    import triton_interpreter

    cases = importlib.import_module(f"leantune_kernels.{op}.cases")
    case = cases.TRAFFIC
    inputs = case.make(torch.Generator().manual_seed(0), dtype)
    given = {k: testing._prepare(v, k in case.differentiable, None) for k, v in inputs.items()}
    with triton_interpreter.counted() as forward:
        output = cases.function(**given)
    with triton_interpreter.counted() as backward:
        if case.differentiable:
            outputs = output if isinstance(output, tuple) else (output,)
            wanted = [given[k] for k in case.differentiable]
            torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return forward, backward, cases.floor(**inputs)


def memory_bound():
    for op in OPS:
        cases = importlib.import_module(f"leantune_kernels.{op}.cases")
        if cases.MEMORY_BOUND:
            for dtype in getattr(cases, "DTYPES", (torch.float32, torch.bfloat16)):
                yield pytest.param(op, dtype, id=f"{op}-{dtype}")


@interpreted
@pytest.mark.parametrize(("op", "dtype"), memory_bound())
def test_traffic_is_near_its_floor(op, dtype, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "triton")
    forward, backward, floor = counted(op, dtype)
    assert forward.loaded + forward.stored <= LIMIT * floor.forward_bytes
    assert backward.loaded + backward.stored <= LIMIT * floor.backward_bytes
