"""The bottleneck adapter: every activation, any shape and rank, any subset of gradients, strided inputs."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import bottleneck as op
from leantune_kernels.bottleneck import ACTIVATIONS, Weights, bottleneck
from leantune_kernels.bottleneck.reference import plain

implementation = each_of("reference", "cpu:base", "cpu:avx512", "triton", "cuda", autouse=True)


def tensors(rows, size, rank, dtype=torch.float32):
    """x, down, up, down_bias, up_bias."""
    down, up = torch.randn(rank, size) / size**0.5, torch.randn(size, rank) / rank**0.5
    return [torch.randn(rows, size).to(dtype), down, up, torch.randn(rank), torch.randn(size)]


def results(function, values, dy, *options):
    values = [v.detach().requires_grad_() for v in values]
    y = function(*values, *options)
    return [y.detach(), *torch.autograd.grad(y, values, dy)]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(0, 150),
    size=st.integers(1, 140),
    rank=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130, 256])),
    activation=st.sampled_from([*ACTIVATIONS]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_rank(rows, size, rank, activation, seed):
    torch.manual_seed(seed)
    values, dy = tensors(rows, size, rank), torch.randn(rows, size)
    found = results(bottleneck, values, dy, 0.7, activation)
    truth = results(plain, [v.double() for v in values], dy.double(), 0.7, activation)
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5 * max(1, rows) ** 0.5)


@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_far_into_both_tails(activation):
    values = tensors(40, 32, 8)
    values[0] *= 30
    dy = torch.randn(40, 32)
    found = results(bottleneck, values, dy, 1.0, activation)
    truth = results(plain, [v.double() for v in values], dy.double(), 1.0, activation)
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("wanted", [w for n in range(6) for w in itertools.combinations(range(5), n)])
def test_gradients_of_any_subset(wanted):
    values, dy = tensors(70, 33, 9), torch.randn(70, 33)
    given = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(values)]
    y = bottleneck(*given, 0.5, "gelu")
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    y.backward(dy)
    truth = results(plain, [v.double() for v in values], dy.double(), 0.5, "gelu")[1:]
    for i, (value, exact) in enumerate(zip(given, truth, strict=True)):
        assert (value.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(value.grad.double(), exact, rtol=1e-5, atol=1e-4)


def test_rows_any_distance_apart_and_only_they_are_written():
    wide, x_wide = torch.full((37, 60), float("nan")), torch.full((37, 55), float("nan"))
    values = tensors(37, 50, 12)
    x, out = x_wide[:, 2:52], wide[:, 3:53]
    x.copy_(values[0])
    assert op.forward(x, Weights(*values[1:]), 1.0, "silu", out) is out
    torch.testing.assert_close(out.double(), plain(*(v.double() for v in values), 1.0, "silu"), rtol=1e-5, atol=1e-5)
    assert wide.isnan().sum() == wide.numel() - out.numel()
    dy_wide = torch.full((37, 61), float("nan"))
    dy = dy_wide[:, 1:51]
    dy.copy_(torch.randn(37, 50))
    found = op.backward(dy, x, Weights(*values[1:]), 1.0, "silu", (True,) * 5)
    truth = results(plain, [v.double() for v in values], dy.double(), 1.0, "silu")[1:]
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)


def test_upstream_gradient_of_zero_stride_and_used_twice():
    values = [v.requires_grad_() for v in tensors(20, 24, 6)]
    y = bottleneck(*values)
    dense = torch.autograd.grad(y, values, torch.ones(20, 24), retain_graph=True)
    for _ in range(2):
        strided = torch.autograd.grad(y, values, torch.ones(()).expand(20, 24), retain_graph=True)
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b)


def test_no_rows_give_no_gradient_but_zeros():
    grads = results(bottleneck, tensors(0, 12, 4), torch.empty(0, 12), 1.0, "relu")[1:]
    assert grads[0].shape == (0, 12) and not any(g.any() for g in grads[1:])


def test_weights_of_any_strides_and_more_dimensions():
    x, down, up, down_bias, up_bias = tensors(12, 16, 5)
    y = bottleneck(x.view(3, 4, 16), down.t().contiguous().t(), up.t().contiguous().t(), down_bias, up_bias)
    torch.testing.assert_close(y, bottleneck(x, down, up, down_bias, up_bias).view(3, 4, 16))


def test_nan_in_one_row_reaches_exactly_that_row():
    values = tensors(70, 32, 8)
    values[0][3, 7] = float("nan")
    for activation in ACTIVATIONS:
        y = bottleneck(*values, activation=activation)
        assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


def test_errors_name_the_argument():
    x, down, up, _, up_bias = tensors(3, 8, 4)
    with pytest.raises(ValueError, match=r"rank=257 is outside \[1, 256\]"):
        bottleneck(x, torch.zeros(257, 8), torch.zeros(8, 257))
    with pytest.raises(ValueError, match="activation='tanh' is not known; use silu"):
        bottleneck(x, down, up, activation="tanh")
    with pytest.raises(ValueError, match="up is"):
        bottleneck(x, down, up.t())
    with pytest.raises(ValueError, match="down_bias is"):
        bottleneck(x, down, up, up_bias)
    with pytest.raises(ValueError, match=r"down is torch\.float16"):
        bottleneck(x, down.half(), up)
    with pytest.raises(ValueError, match="out is"):
        op.forward(x, Weights(down, up), 1.0, "relu", torch.empty(8, 3).t())
