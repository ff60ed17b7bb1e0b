"""Every op's CUDA kernels on the host: results, the same bits in any order of threads, no race, no bad access, traffic.

Ops are found by their cuda_impl.py. What the emulator can find is shown by test_cuda_emulator.py.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import traffic
from cuda_host import host
from cuda_host.build import FLAVOURS, HERE
from leantune_kernels import conformance, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMIT = 1.1  # of the floor
ORDERS = [b"forward", b"reverse", b"random:1"]


def all_cases() -> Iterator:
    for op in host.cuda_ops():
        module = importlib.import_module(f"leantune_kernels.{op}.cases")
        for case in module.CASES:
            yield pytest.param(module, case, id=f"{op}-{case.name}")


def dtypes_of(module) -> list[torch.dtype]:
    return getattr(module, "DTYPES", DTYPES)


@pytest.fixture(scope="module", autouse=True)
def sanitized() -> Iterator[subprocess.Popen]:
    """All cases under the sanitizers, in a process beside the other tests."""
    with ThreadPoolExecutor() as workers:
        list(workers.map(host.library, FLAVOURS))
    command = [sys.executable, str(HERE / "run_cases.py"), "sanitized"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)) as process:
        yield process
        process.kill()


@pytest.fixture
def plain() -> Iterator:
    with host.kernels("plain") as library:
        yield library
        library.lt_host_order(b"forward")


@pytest.fixture
def traced() -> Iterator:
    with host.kernels("traced") as library:
        library.lt_host_traffic_reset()
        yield library


@pytest.mark.parametrize(("module", "case"), all_cases())
def test_results_do_not_depend_on_the_order_of_threads(module, case, plain):
    for dtype in dtypes_of(module):
        testing.accept(case, dtype, module.function, module.plain, testing.factor_of(module, dtype))
        inputs = case.make(torch.Generator().manual_seed(0), dtype)
        results = []
        for order in ORDERS:
            plain.lt_host_order(order)
            results.append(testing.run(module.function, inputs, case))
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert same_bits(first, again), f"{case.name}, {dtype}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("op", host.cuda_ops())
def test_every_op_conforms(op, plain):
    """Also in memory that holds NaN, for upstream gradients of any strides, without touching an input, twice."""
    dtypes = ["bfloat16"] if op == "attention" else []  # half a minute in all three
    reports = list(conformance.check([op], ["cuda"], dtypes))
    assert reports and not [(report, report.failures) for report in reports if not report.passed or report.skipped]
    assert all(report.cases for report in reports)


@pytest.mark.parametrize(("module", "case"), all_cases())
def test_no_race_and_all_traffic_is_counted(module, case, traced):
    for dtype in dtypes_of(module):
        testing.run(module.function, case.make(torch.Generator().manual_seed(0), dtype), case)
    for found in host.read_traffic(traced).values():
        for each in ("loaded", "stored"):
            requested, per_block, per_launch = (
                getattr(level, each) for level in (found.requested, found.per_block, found.per_launch)
            )
            assert requested >= per_block >= per_launch >= 0


@pytest.mark.parametrize(("op", "dtype"), traffic.memory_bound("cuda_impl"))
def test_traffic_is_near_its_floor(op, dtype, traced):
    """Each byte once a launch, forward and backward."""
    ratio = traffic.measured(op, dtype, traffic.by_cuda(traced))
    assert ratio.forward <= LIMIT
    assert ratio.backward is None or ratio.backward <= LIMIT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_moves_no_more_than_it_must(dtype):
    """Memory sees each input and each output once; only the partial sums of the weight's gradient come on top."""
    rows, cols, size = 70, 576, torch.empty(0, dtype=dtype).element_size()
    matrix, weight, rstd, partials = rows * cols * size, cols * size, rows * 4, 5 * cols * 4
    moved = {kernel: found.per_launch for kernel, found in host.traffic("rms_norm", "70x576", dtype).items()}
    assert moved == {
        "rms_norm_forward_kernel": host.Bytes(loaded=matrix + weight, stored=matrix + rstd),
        "rms_norm_backward_kernel": host.Bytes(loaded=2 * matrix + weight + rstd, stored=matrix + partials),
        "rms_norm_sum_partials_kernel": host.Bytes(loaded=partials, stored=cols * 4),
    }
    assert host.moved("rms_norm", "70x576", dtype).stored == 2 * matrix + rstd + partials + cols * 4


@pytest.mark.parametrize("cols", [64, 66, 4160])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_rms_norm_with_a_weight_of_another_type_a_residual_and_in_place(cols, dtypes, traced):
    """4160 columns of fp32 are more than a block holds in registers."""
    from leantune_kernels.rms_norm import cuda_impl, reference

    x, dy, residual = (torch.randn(5, 2 * cols)[:, :cols].to(dtypes[0]) for _ in range(3))
    weight = torch.randn(cols).to(dtypes[1])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtypes[0] == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for got, want in zip(cuda_impl.forward(x, weight, 1e-5), reference.forward(x, weight, 1e-5), strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    rstd = reference.forward(x, weight, 1e-5)[1]
    want = reference.backward(dy, x, weight, rstd, residual, None, True)
    for out in (dy.clone(), residual.clone()):
        given = (out, x, weight, rstd, residual) if torch.equal(out, dy) else (dy, x, weight, rstd, out)
        dx, dweight = cuda_impl.backward(*given, out, True)
        assert dx is out
        torch.testing.assert_close(dx, want[0], **tolerance)
        torch.testing.assert_close(dweight, want[1], rtol=1e-5, atol=1e-4)


def test_the_sanitizers_find_nothing(sanitized):
    output, _ = sanitized.communicate(timeout=600)
    assert sanitized.returncode == 0, output[-4000:]
    assert output.count(" ok, ") == sum(len(dtypes_of(p.values[0])) for p in all_cases())
