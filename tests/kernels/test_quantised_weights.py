"""What int8 and nf4 have in common: traffic of each part, a shared buffer, outputs larger than the caches.

`function` in their cases.py quantises as well as multiplies, so that their parts are held against their floors here.
"""

from functools import partial

import pytest
import torch

import traffic
from cuda_host import host
from helpers_kernels import DTYPES, LEVELS, by_reference, forced
from leantune_kernels import int8, nf4

LIMIT = 1.1  # of the floor
each_op = pytest.mark.parametrize("op", [int8, nf4], ids=["int8", "nf4"])


def part(op, name, dtype):
    """(what to run, bytes it must move) of a kernel, for a weight [64, 1024] and four rows of x."""
    weight, x = torch.randn(64, 1024).to(dtype), torch.randn(4, 1024).to(dtype)
    quantise = int8.quantise if op is int8 else partial(nf4.quantise, double_quant=False)
    w, out, y = quantise(weight), torch.empty_like(weight), torch.empty(4, 64, dtype=dtype)
    return {
        "quantise": (lambda: quantise(weight), weight.nbytes + w.nbytes),
        "dequantise": (lambda: op.dequantise(w, out=out), weight.nbytes + w.nbytes),
        "linear": (lambda: op.fused_linear(x, w, None, y), w.nbytes + x.nbytes + y.nbytes),
    }[name]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["quantise", "dequantise", "linear"])
@each_op
def test_traffic_is_near_its_floor(op, name, dtype, monkeypatch):
    with host.kernels("traced") as traced:
        call, least = part(op, name, dtype)
        assert traffic.by_cuda(traced)(call) <= LIMIT * least
    with forced("triton", monkeypatch):
        call, least = part(op, name, dtype)
        assert traffic.by_triton(call) <= LIMIT * least


@each_op
def test_a_buffer_is_used_and_may_be_shared(op):
    x, buffer = torch.randn(2, 40, 64, requires_grad=True), torch.full((48, 64), torch.nan)
    first, second = (op.quantise(torch.randn(48, 64)) for _ in range(2))
    y = op.linear(x, first, buffer=buffer) * op.linear(x, second, buffer=buffer)
    (found,) = torch.autograd.grad(y.sum(), x)
    a, b = (op.dequantise(w) for w in (first, second))
    (wanted,) = torch.autograd.grad(((x @ a.t()) * (x @ b.t())).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(buffer, a) or torch.equal(buffer, b)
    with torch.no_grad():
        assert not op.linear(x, first).requires_grad


def larger_than_the_caches(op):
    """(a weight, a function that makes NaN for its values): for int8 rows with columns over, for nf4 an odd end."""
    if op is int8:
        return torch.randn(1025, 4099), lambda dtype: torch.full((1025, 4128), torch.nan, dtype=dtype)[:, :4099]
    weight = torch.randn(4 * 2**20 + 77)
    return weight, lambda dtype: torch.full_like(weight, torch.nan, dtype=dtype)


@pytest.mark.parametrize("level", LEVELS)
@each_op
def test_an_output_larger_than_the_caches(op, level, monkeypatch):
    """It is written past them, in every storage type, and what no vector fits beside."""
    weight, result = larger_than_the_caches(op)
    with forced(f"cpu:{level}", monkeypatch):
        w = op.quantise(weight)
        for dtype in DTYPES:
            assert torch.equal(op.dequantise(w, out=result(dtype)), by_reference(op.dequantise, w, dtype))
