"""LayerNorm: a large mean, the added residual, gradients of any subset, what the raw forms refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from helpers_kernels import each_of
from leantune_kernels import layer_norm, rms_norm
from leantune_kernels.layer_norm.reference import plain
from leantune_kernels.testing import error

implementation = each_of("cpu", "reference", autouse=True)
each_implementation = each_of("triton", "cuda", "cpu", "reference")


def parameters(cols, dtype=torch.float32):
    return torch.randn(cols).add(1).to(dtype), torch.randn(cols).to(dtype)


@settings(deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 70),
    gap=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
)
def test_any_shape_stride_and_dtype(rows, cols, gap, dtype, weight_dtype, with_bias):
    dy, x, residual = (torch.randn(rows, cols + gap).to(dtype)[:, :cols] for _ in range(3))
    weight, bias = parameters(cols, weight_dtype)
    bias = bias if with_bias else None
    s, y, dx = (torch.full((rows, cols + gap), float("nan"), dtype=dtype)[:, :cols] for _ in range(3))
    _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5, y, residual, s)
    assert torch.equal(s, (x.float() + residual.float()).to(dtype))
    exact = [t.double().requires_grad_() for t in (s, weight, *([bias] if with_bias else []))]
    wanted = plain(*exact, **({} if with_bias else {"bias": None}), eps=1e-5)
    grads = torch.autograd.grad(wanted, exact, dy.double())
    limit = (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * max(1, float(rstd.max()) if rows else 1)
    assert error(y, wanted.detach()) <= limit
    _, dweight, dbias = layer_norm.backward(
        dy, s, weight, mean, rstd, residual, dx, need_dweight=True, need_dbias=with_bias
    )
    if cols > 1:  # the gradient of a row of one is zero, whatever rounding leaves of it
        assert error(dx, grads[0] + residual.double()) <= limit
    assert error(dweight, grads[1]) <= limit or cols == 1
    assert (dbias is None) == (not with_bias)
    assert dbias is None or error(dbias, grads[2]) <= limit


@pytest.mark.parametrize("mean", [1e2, -1e4])
def test_a_large_mean_costs_no_digits_beyond_the_input_s_own(mean):
    """E[x^2] - E[x]^2 would leave a variance of 1 with no digit at a mean of 1e4."""
    x, (weight, bias) = torch.randn(7, 1536) + mean, parameters(1536)
    exact = plain(x.double(), weight.double(), bias.double())
    y, _, rstd = layer_norm.forward(x, weight, bias, 1e-5)
    assert error(y, exact) < abs(mean) * 6e-8 + 1e-6  # the mean is kept in fp32
    assert error(rstd, x.double().var(-1, correction=0).add(1e-5).rsqrt()) < 1e-6


@pytest.mark.parametrize("place", ["x", "residual"])
def test_the_sum_may_go_over_an_input(place):
    inputs = {"x": torch.randn(9, 37), "residual": torch.randn(9, 37)}
    weight, bias = parameters(37)
    s, y_rms, y = torch.empty(9, 37), torch.empty(9, 37), torch.empty(9, 37)
    rms_norm.forward(inputs["x"], weight, 1e-5, y_rms, inputs["residual"], s)
    layer_norm.forward(inputs["x"], weight, bias, 1e-5, y, inputs["residual"], s)
    for function, wanted in (
        (lambda x, **rest: rms_norm.forward(x, weight, 1e-5, **rest), y_rms),
        (lambda x, **rest: layer_norm.forward(x, weight, bias, 1e-5, **rest), y),
    ):
        mine = {name: t.clone() for name, t in inputs.items()}
        assert torch.equal(function(mine["x"], residual=mine["residual"], summed=mine[place])[0], wanted)
        assert torch.equal(mine[place], s)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight bias", "x bias", "x residual weight bias"])
@pytest.mark.parametrize("used", ["y", "s", "y s"])
def test_gradients_of_any_subset_through_any_result(wanted, used):
    names = wanted.split()
    weight, bias = parameters(24)
    values = {"x": torch.randn(2, 5, 24), "residual": torch.randn(2, 5, 24), "weight": weight, "bias": bias}
    upstream = {"y": torch.randn(2, 5, 24), "s": torch.randn(5, 2, 24).transpose(0, 1)}
    results = []
    for function in (layer_norm.add_layer_norm, lambda **inputs: plain(**inputs)):
        inputs = {k: v.clone().requires_grad_(k in names) for k, v in values.items()}
        found = dict(zip("ys", function(**inputs), strict=True))
        outputs = [found[k] for k in used.split() if found[k].requires_grad]
        if not outputs:
            assert used == "s"
            return
        grads = [upstream[k] for k in used.split() if found[k].requires_grad]
        results.append(torch.autograd.grad(outputs, [inputs[k] for k in names], grads, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [rms_norm, layer_norm])
def test_adding_keeps_upstream_gradients_and_repeats_itself(op):
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in ((4, 20), (4, 20), (20,)))
    function = op.add_rms_norm if op is rms_norm else op.add_layer_norm
    y, s = function(x, residual, weight)
    upstream = [torch.randn(4, 20) for _ in range(2)]
    before = [t.clone() for t in upstream]
    first, second = (torch.autograd.grad((y, s), (x, residual, weight), upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(upstream, before, strict=True))
    (y * s).sum().backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


def test_a_weight_that_trains_gets_its_gradient_and_a_frozen_one_costs_none():
    x, (weight, bias) = torch.randn(3, 8), parameters(8)
    for op, result in ((layer_norm, layer_norm.layer_norm), (rms_norm, rms_norm.rms_norm)):
        trained = weight.clone().requires_grad_()
        result(x, trained).sum().backward()
        assert trained.grad is not None and trained.grad.abs().sum() > 0, op
    _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5)
    assert layer_norm.backward(x, x, weight, mean, rstd)[1:] == (None, None)


def test_raw_forms_name_what_does_not_fit():
    x, (weight, bias) = torch.randn(4, 6), parameters(6)
    bad_rows = x.bfloat16(), x[:3], x[:, :5], x.to("meta")
    strided = torch.empty(6, 4).t()
    for bad in (*bad_rows, strided):
        with pytest.raises(ValueError, match="out is"):
            layer_norm.forward(x, weight, bias, 1e-5, bad)
        with pytest.raises(ValueError, match="summed is"):
            layer_norm.forward(x, weight, bias, 1e-5, residual=x, summed=bad)
    for bad in bad_rows:
        with pytest.raises(ValueError, match="residual is"):
            layer_norm.forward(x, weight, bias, 1e-5, residual=bad, summed=x)
    for bad in (weight[:5], weight.double(), weight[None]):
        with pytest.raises(ValueError, match="weight is"):
            layer_norm.forward(x, bad, bias, 1e-5)
    for bad in (bias[:5], bias.bfloat16()):
        with pytest.raises(ValueError, match="bias is"):
            layer_norm.forward(x, weight, bad, 1e-5)
    for op, arguments in ((layer_norm, (x, weight, bias, 1e-5)), (rms_norm, (x, weight, 1e-5))):
        with pytest.raises(ValueError, match=r"summed is None .*summed may be residual"):
            op.forward(*arguments, residual=x)
        with pytest.raises(ValueError, match="residual is None"):
            op.forward(*arguments, summed=x)
    for add in (layer_norm.add_layer_norm, rms_norm.add_rms_norm):
        with pytest.raises(ValueError, match=r"residual has shape \(4, 5\)"):
            add(x, x[:, :5], weight)
    _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5)
    right = {"dy": x, "x": x, "weight": weight, "mean": mean, "rstd": rstd, "residual": x, "out": x.clone()}
    for name, bad in [
        *((name, bad) for name in ("dy", "residual", "out") for bad in bad_rows),
        ("out", strided),
        ("mean", mean[:3]),
        ("rstd", rstd.double()),
    ]:
        with pytest.raises(ValueError, match=f"{name} is"):
            layer_norm.backward(**{**right, name: bad})


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (2, 0, 0), (2, 0, 3), (0,)])
def test_no_columns_or_no_rows_as_pytorch_has_it(shape, each_implementation):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.ones(shape[-1], requires_grad=True) for _ in range(2))
    wanted = F.layer_norm(x, shape[-1:], weight, bias)
    for y in (layer_norm.layer_norm(x, weight, bias), layer_norm.add_layer_norm(x, x, weight, bias)[0]):
        assert y.shape == wanted.shape
        dx, *grads = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert dx.shape == x.shape and all(torch.equal(g, torch.zeros(shape[-1])) for g in grads)
