"""Every op, every implementation that runs here, every case: the acceptance rule of leantune_kernels.testing.

Ops are found, not listed: a new folder with a cases.py is tested without touching this file. The C++ kernels are tried
at each instruction level that the processor has, the Triton kernels in Triton's interpreter. The CUDA sources have
test_cuda_host.py (emulated); what there is a device for has test_cuda.py. Upstream gradients of any strides, inputs
that stay as they are and a second backward pass are with test_conformance.py.
"""

import importlib

import pytest
import torch

import leantune_kernels
from helpers_kernels import DTYPES, IMPLEMENTATIONS, forced
from leantune_kernels import testing
from leantune_kernels.conformance import uninitialised_is_nan
from leantune_kernels.dispatch import Op


def all_cases():
    for op in leantune_kernels.ops():
        module = importlib.import_module(f"leantune_kernels.{op}.cases")
        for case in module.CASES:
            yield pytest.param(module, op, case, id=f"{op}-{case.name}")


def all_cases_and_dtypes():
    """Every case in every storage type of its op: all three, or those that its cases.py names."""
    for parameters in all_cases():
        module, op, case = parameters.values
        for dtype in getattr(module, "DTYPES", DTYPES):
            yield pytest.param(module, op, case, dtype, id=f"{parameters.id}-{dtype}")


@pytest.fixture(params=["reference", *IMPLEMENTATIONS[:-1]])
def implementation(request, monkeypatch):
    """Forces one implementation, and for the C++ one an instruction level. CUDA has files of its own."""
    with forced(request.param, monkeypatch):
        yield request.param.partition(":")[0]


def skip_unless_written(op, name):
    if Op(f"leantune_kernels.{op}").implementation(name) is None:
        pytest.skip(f"{op} has no {name} implementation")


@pytest.mark.parametrize(("module", "op", "case", "dtype"), all_cases_and_dtypes())
def test_error_is_within_plain_pytorchs_own(module, op, case, dtype, implementation):
    """In memory that holds NaN wherever nobody has written, so that an element left out of an output shows."""
    skip_unless_written(op, implementation)
    with uninitialised_is_nan():
        testing.accept(case, dtype, module.function, module.plain, testing.factor_of(module, dtype))


@pytest.mark.parametrize(("module", "op", "case"), all_cases())
def test_same_bits_on_every_run_and_for_any_number_of_threads(module, op, case, monkeypatch):
    """Other threads may change the last bits of BITS_BY_THREADS in cases.py alone: there, a product is PyTorch's."""
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    loose = [name in getattr(module, "BITS_BY_THREADS", ()) for name in case.differentiable]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            results.append(testing.run(module.function, inputs, case))
    finally:
        torch.set_num_threads(before)
    outputs = len(results[0]) - len(loose)
    for same_threads, again in zip((True, False, False), results[1:], strict=True):
        for i, (first, second) in enumerate(zip(results[0], again, strict=True)):
            if i >= outputs and loose[i - outputs] and not same_threads:
                assert testing.error(first, second) <= 1e-6
            else:
                assert torch.equal(first, second)


@pytest.mark.parametrize("op", leantune_kernels.ops())
def test_reference_exists_and_forcing_an_absent_implementation_fails(op, monkeypatch):
    x = torch.empty(0)
    assert Op(f"leantune_kernels.{op}").refusal("reference", x) is None
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    with pytest.raises(RuntimeError, match="float64"):
        Op(f"leantune_kernels.{op}").pick(torch.empty(0, dtype=torch.float64))
