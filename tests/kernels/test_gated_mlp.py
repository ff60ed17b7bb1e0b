"""The gated MLP: any subset of gradients, a second backward pass after the first overwrote gate and up, shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import gated_mlp as op
from leantune_kernels.gated_mlp import ACTIVATIONS, Weights, gated_mlp
from leantune_kernels.gated_mlp.reference import plain

implementation = each_of("reference", "cpu", "triton", "cuda", autouse=True)


def tensors(rows, size, wide):
    """x, the three weights, the three biases."""
    shapes = [(wide, size), (wide, size), (size, wide)]
    weights = [torch.randn(*shape) / max(1, shape[1]) ** 0.5 for shape in shapes]
    return [torch.randn(rows, size), *weights, torch.randn(wide), torch.randn(wide), torch.randn(size)]


def exact_gradients(values, dy, activation):
    exact = [v.double().requires_grad_() for v in values]
    return torch.autograd.grad(plain(*exact, activation), exact, dy.double())


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(0, 50),
    size=st.integers(1, 50),
    wide=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    wanted=st.sets(st.integers(0, 6), min_size=1),
    seed=st.integers(0, 99),
)
def test_any_shape_and_subset_of_gradients(rows, size, wide, activation, wanted, seed):
    torch.manual_seed(seed)
    values, dy = tensors(rows, size, wide), torch.randn(rows, size)
    given = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(values)]
    y = gated_mlp(*given, activation)
    torch.testing.assert_close(y.double(), plain(*(v.double() for v in values), activation), rtol=1e-5, atol=1e-5)
    y.backward(dy)
    for i, (found, truth) in enumerate(zip(given, exact_gradients(values, dy, activation), strict=True)):
        assert (found.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(found.grad.double(), truth, rtol=1e-5, atol=1e-4)


def test_a_second_backward_pass_gives_the_same_and_dy_is_kept():
    values = [v.requires_grad_() for v in tensors(13, 24, 40)]
    y, dy = gated_mlp(*values), torch.randn(13, 24)
    kept = dy.clone()
    first = torch.autograd.grad(y, values, dy, retain_graph=True)
    second = torch.autograd.grad(y, values, dy)
    assert torch.equal(dy, kept)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_the_raw_backward_leaves_the_gradients_of_gate_and_up_in_their_place():
    x, *rest = tensors(9, 16, 20)
    weights = Weights(*rest)
    y, gate, up = op.forward(x, weights)
    dx, *grads = op.backward_(torch.ones_like(y), x, gate, up, weights)
    assert dx is not None and grads == [None] * 6
    torch.testing.assert_close(dx, gate @ weights.gate + up @ weights.up, rtol=1e-5, atol=1e-5)


def test_more_dimensions_and_a_zero_stride_gradient():
    x, gate, up, down, *_ = (v.requires_grad_() for v in tensors(12, 16, 24))
    y = gated_mlp(x.view(3, 4, 16), gate, up, down)
    strided = torch.autograd.grad(y, (x, gate), torch.ones(()).expand(3, 4, 16), retain_graph=True)
    dense = torch.autograd.grad(y, (x, gate), torch.ones(3, 4, 16))
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument():
    x, gate, up, down, gate_bias, *_ = tensors(3, 8, 12)
    with pytest.raises(ValueError, match="activation='relu' is not known; use silu, gelu, gelu_tanh"):
        gated_mlp(x, gate, up, down, activation="relu")
    with pytest.raises(ValueError, match="down_weight is"):
        gated_mlp(x, gate, up, down.t())
    with pytest.raises(ValueError, match="down_bias is"):
        gated_mlp(x, gate, up, down, down_bias=gate_bias)
    with pytest.raises(ValueError, match=r"up_weight is torch\.float16"):
        gated_mlp(x, gate, up.half(), down)


def test_no_columns():
    values = [v.requires_grad_() for v in tensors(12, 0, 5)]
    y = gated_mlp(values[0].view(3, 4, 0), *values[1:])
    assert y.shape == (3, 4, 0)
    for v, grad in zip(values, torch.autograd.grad(y.sum(), values), strict=True):
        assert torch.equal(grad, torch.zeros_like(v))
