"""Gated activations: the raw forms on halves of one buffer, the in-place backward, inputs that stay as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import glu
from leantune_kernels.glu.reference import plain
from leantune_kernels.testing import error

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


implementation = each_of("cpu", "reference", autouse=True)


def exact_results(dh, gate, up, activation):
    """h, d_gate and d_up in fp64."""
    exact = [t.double().requires_grad_() for t in (gate, up)]
    h = plain(*exact, activation)
    return [h.detach(), *torch.autograd.grad(h, exact, dh.double())]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (7, 33), (33, 48), (0, 5), (1, 9001)])
def test_in_place_backward_on_the_halves_of_one_buffer(rows, cols, activation):
    both = torch.randn(rows, 2 * cols)
    gate, up = both[:, :cols], both[:, cols:]
    dh = torch.randn(rows, cols + 3)[:, :cols]
    wanted = exact_results(dh, gate, up, activation)
    results = glu.backward_(dh, gate, up, activation)
    for result, place, truth in zip(results, (dh, gate, up), wanted, strict=True):
        assert result is place
        assert error(result, truth) < 5e-7


def near(value, truth, limit):
    """Whether it is, of values of the order of 1: a slope near its zero has no digits of its own."""
    return (value.double() - truth).norm() <= limit * (truth.norm() + 3 * truth.numel() ** 0.5)


@settings(deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 70),
    gap=st.integers(0, 3),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_stride(rows, cols, gap, activation, dtype):
    dh, gate, up = (torch.randn(rows, cols + gap).to(dtype)[:, :cols] for _ in range(3))
    wanted = exact_results(dh, gate, up, activation)
    limit = 5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    out = torch.full((rows, cols + gap), float("nan"), dtype=dtype)[:, :cols]
    results = [glu.forward(gate, up, out, activation), *glu.backward(dh, gate, up, activation)]
    for result, truth in zip(results, wanted, strict=True):
        assert near(result, truth, limit)
    for result, truth in zip(glu.backward_(dh, gate, up, activation), wanted, strict=True):
        assert near(result, truth, limit)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_writes_out_and_may_overwrite_an_input(activation):
    both = torch.randn(9, 42)
    gate, up = both[:, :21], both[:, 21:]
    wanted = plain(gate, up, activation)
    out = torch.full((9, 30), float("nan"))
    assert glu.forward(gate, up, out[:, :21], activation).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:, :21], wanted)
    assert out[:, 21:].isnan().all()
    glu.forward(gate, up, gate, activation)
    torch.testing.assert_close(gate, wanted)


@pytest.mark.parametrize("function", [glu.swiglu, glu.geglu])
def test_public_backward_keeps_inputs_and_upstream_gradient(function):
    gate, up, dh = (torch.randn(5, 20, requires_grad=True) for _ in range(3))
    before = [t.detach().clone() for t in (gate, up, dh)]
    h = function(gate, up)
    first = torch.autograd.grad(h, (gate, up), dh.detach(), retain_graph=True)
    second = torch.autograd.grad(h, (gate, up), dh.detach())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, dh), before, strict=True))


def test_one_upstream_gradient_for_two_results():
    gate, up = (torch.randn(5, 20, requires_grad=True) for _ in range(2))
    gradients = []
    for swiglu, geglu in ((glu.swiglu, glu.geglu), (plain, lambda g, u: plain(g, u, "gelu"))):
        total = swiglu(gate, up) + geglu(gate, up)  # addition hands the same gradient to both
        gradients.append(torch.autograd.grad(total, (gate, up), torch.ones(()).expand(5, 20)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4, -1e4, 88.8, -88.8, 0.0])
def test_extreme_gates_are_what_pytorch_gives(value, activation):
    gate, up = torch.full((1, 17), value, requires_grad=True), torch.full((1, 17), 0.5)
    h, wanted = glu.forward(gate.detach(), up, activation=activation), plain(gate.double(), up.double(), activation)
    torch.testing.assert_close(h.double(), wanted.detach(), equal_nan=True, rtol=1e-5, atol=1e-30)
    if value == float("inf"):
        return  # the slope there is inf * 0 in PyTorch too
    d_gate, d_up = glu.backward(torch.ones_like(up), gate.detach(), up, activation)
    truth = torch.autograd.grad(wanted, gate, torch.ones_like(wanted))[0]
    torch.testing.assert_close(d_gate, truth, equal_nan=True, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(d_up.double(), wanted.detach() * 2, equal_nan=True, rtol=1e-5, atol=1e-30)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="same shape and dtype"):
        glu.swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="approximate='sigmoid'"):
        glu.geglu(x, x, approximate="sigmoid")
    for call in (glu.backward_, glu.backward):
        with pytest.raises(ValueError, match="activation='relu' is none of silu, gelu, gelu_tanh"):
            call(x, x, x, "relu")
    with pytest.raises(ValueError, match="activation='relu'"):
        glu.forward(x, x, activation="relu")
    for bad in (torch.zeros(2, 4), x.bfloat16(), torch.zeros(3, 2).t()):
        with pytest.raises(ValueError, match="dh is"):
            glu.backward_(bad, x, x)
        with pytest.raises(ValueError, match="up is"):
            glu.backward_(x, x, bad)
        with pytest.raises(ValueError, match="out is"):
            glu.forward(x, x, bad)
    for bad in (torch.zeros(2, 4), x.bfloat16()):
        with pytest.raises(ValueError, match="dh is"):
            glu.backward(bad, x, x)
        with pytest.raises(ValueError, match="up is"):
            glu.forward(x, bad)
    with pytest.raises(ValueError, match="gate has shape"):
        glu.forward(x[0], x[0])
