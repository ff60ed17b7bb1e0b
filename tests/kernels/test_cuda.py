"""The CUDA part: what can be shown without a device, and what runs where there is one."""

import ctypes
import importlib
import re
from pathlib import Path

import pytest
import torch

import leantune_kernels
from leantune_kernels import conformance, cuda, testing
from leantune_kernels.dispatch import Op

HEADER = Path(__file__).parent.parent.parent / "csrc" / "include" / "leantune_kernels.h"
built = pytest.mark.skipif(cuda.library() is None, reason="built without nvcc")
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_device_the_reason_is_given():
    reason = Op("leantune_kernels.rms_norm").refusal("cuda", torch.empty(0))
    assert reason == ("device is cpu" if cuda.library() else "the package was built without nvcc")


@built
def test_the_library_exports_what_the_header_declares():
    declared = re.findall(r"\b(lt_cuda_\w+)\(", HEADER.read_text())
    library = ctypes.CDLL(str(cuda.library()))
    assert declared and all(hasattr(library, name) for name in declared)
    library.lt_cuda_error_string.restype = ctypes.c_char_p
    assert b"invalid argument" in library.lt_cuda_error_string(1)


@built
def test_machine_code_for_each_architecture_is_inside():
    """nvcc names each image's architecture in the fat binary."""
    content = cuda.library().read_bytes()
    assert {b"sm_80", b"sm_90", b"sm_100"} <= set(re.findall(rb"sm_\d+", content))


def all_cases():
    for op in leantune_kernels.ops():
        if Op(f"leantune_kernels.{op}").implementation("cuda") is not None:
            module = importlib.import_module(f"leantune_kernels.{op}.cases")
            for case in module.CASES:
                for dtype in getattr(module, "DTYPES", [torch.float32, torch.bfloat16, torch.float16]):
                    yield pytest.param(module, case, dtype, id=f"{op}-{case.name}-{dtype}")


@on_device
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize(("module", "case", "dtype"), all_cases())
def test_on_a_device(module, case, dtype, name, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", name)
    testing.accept(case, dtype, module.function, module.plain, testing.factor_of(module, dtype), device="cuda")


@on_device
@pytest.mark.parametrize("op", leantune_kernels.ops())
def test_every_op_conforms_on_a_device(op):
    """Every implementation that serves there: NaN-poisoned memory, strides, inputs, a second backward pass, bits."""
    reports = list(conformance.check([op], device="cuda"))
    assert {report.implementation for report in reports} >= {"cuda", "triton"}
    assert not [(report, report.failures) for report in reports if not report.passed or report.skipped]
