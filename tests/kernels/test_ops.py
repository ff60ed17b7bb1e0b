"""Every op, every implementation that runs here, every case: the acceptance rule of leantune_kernels.testing.

Ops are found, not listed: a new folder with a cases.py is tested without touching this file. The C++ kernels are tried
at each instruction level that the processor has; the Triton kernels run on the device, or in Triton's interpreter where
there is none. The CUDA sources have test_cuda_host.py (emulated) and test_cuda.py (on a device).
"""

import importlib
from importlib.util import find_spec

import pytest
import torch

import leantune_kernels
from leantune_kernels import testing
from leantune_kernels.dispatch import Op

LEVELS = ["base", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"))


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


@pytest.fixture
def uninitialised_is_nan():
    """torch.empty and its like return NaN: a kernel that leaves an element of its output unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", *(f"cpu:{level}" for level in LEVELS), TRITON])
def implementation(request, monkeypatch):
    """Forces one implementation, and for the C++ one an instruction level, through the user's own switch."""
    from leantune_kernels.cpu import lib

    name, _, level = request.param.partition(":")
    monkeypatch.setenv("LEANTUNE_IMPL", name)
    before = lib.isa()
    if level:
        if LEVELS.index(level) > LEVELS.index(before):
            pytest.skip(f"this processor has no {level}")
        lib.set_isa(level)
    yield name
    lib.set_isa(before)


def skip_unless_written(op, name):
    if Op(f"leantune_kernels.{op}").implementation(name) is None:
        pytest.skip(f"{op} has no {name} implementation")


def on_device(function, name):
    """`function`, for Triton on a GPU with its tensors moved there and its results back."""
    if name != "triton" or DEVICE == "cpu":
        return function

    def moved(**inputs):
        given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        result = function(**given)
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    return moved


@pytest.mark.parametrize(("module", "op", "case", "dtype"), all_cases_and_dtypes())
def test_error_is_within_plain_pytorchs_own(module, op, case, dtype, implementation, uninitialised_is_nan):
    skip_unless_written(op, implementation)
    function = on_device(module.function, implementation)
    testing.accept(case, dtype, function, module.plain, getattr(module, "FACTOR", 1.5))


@pytest.mark.parametrize(("module", "op", "case"), all_cases())
def test_same_bits_on_every_run_and_for_any_number_of_threads(module, op, case, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            results.append(testing.run(module.function, inputs, case))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        for first, second in zip(results[0], again, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["cpu", TRITON])
@pytest.mark.parametrize(("module", "op", "case"), all_cases())
def test_upstream_gradient_of_any_strides(module, op, case, name, monkeypatch):
    """Zero-stride (expanded) and non-contiguous upstream gradients give what contiguous ones give."""
    skip_unless_written(op, name)
    monkeypatch.setenv("LEANTUNE_IMPL", name)
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    if not case.differentiable:
        pytest.skip("no gradients in this case")
    given = {k: testing._prepare(v, k in case.differentiable, None) for k, v in inputs.items()}
    output = on_device(module.function, name)(**given)
    output = output[0] if isinstance(output, tuple) else output
    wanted = [given[k] for k in case.differentiable]
    backwards = tuple(range(output.dim())[::-1])
    generator = torch.Generator().manual_seed(1)
    permuted = torch.randn(output.shape[::-1], generator=generator).permute(backwards)
    for dy in (torch.ones(()).expand(output.shape), permuted):
        strided = torch.autograd.grad(output, wanted, dy, retain_graph=True)
        dense = torch.autograd.grad(output, wanted, dy.contiguous().clone(), retain_graph=True)
        for a, b in zip(strided, dense, strict=True):
            assert testing.error(a, b) <= 1e-6  # the vendor's products round by layout; NaN counts as infinite


@pytest.mark.parametrize("op", leantune_kernels.ops())
def test_reference_exists_and_forcing_an_absent_implementation_fails(op, monkeypatch):
    x = torch.empty(0)
    assert Op(f"leantune_kernels.{op}").refusal("reference", x) is None
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    with pytest.raises(RuntimeError, match="float64"):
        Op(f"leantune_kernels.{op}").pick(torch.empty(0, dtype=torch.float64))
