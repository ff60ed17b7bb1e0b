"""int8 weights: the same bits from every implementation, rounding, what cannot be quantised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_kernels import DTYPES, IMPLEMENTATIONS, by_reference, each_of, forced, same
from leantune_kernels import int8

implementation = each_of(*IMPLEMENTATIONS)


def assert_same(a, b):
    assert torch.equal(a.codes, b.codes) and same(a.scales, b.scales)


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 130), (2, 4100)])
def test_same_bits_as_the_reference(shape, implementation):
    torch.manual_seed(0)
    for dtype in DTYPES:
        weight = (torch.randn(shape) * 0.05).to(dtype)
        w = int8.quantise(weight)
        assert_same(w, by_reference(int8.quantise, weight))
        for target in DTYPES:
            assert same(int8.dequantise(w, target), by_reference(int8.dequantise, w, target)), target


@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(DTYPES), st.floats(-30, 30))
def test_any_shape_and_scale(rows, cols, dtype, exponent):
    torch.manual_seed(cols)
    weight = (torch.randn(rows, cols) * 2.0**exponent).to(dtype)
    with pytest.MonkeyPatch.context() as patch, forced("cpu", patch):
        w = int8.quantise(weight)
        values = int8.dequantise(w)
    assert_same(w, by_reference(int8.quantise, weight))
    assert same(values, by_reference(int8.dequantise, w))


def test_ties_go_to_the_even_code(implementation):
    halves = torch.arange(-126.5, 127)
    w = int8.quantise(torch.cat((halves, torch.tensor([127.0])))[None])
    assert w.scales.tolist() == [1.0]
    assert torch.equal(w.codes[0, :-1].float(), halves.round()) and w.codes[0, -1] == 127


def test_zeros_tiny_and_not_finite(implementation):
    weight = torch.randn(5, 40)
    weight[0], weight[1], weight[2, 3], weight[3, 39] = 0, 1e-37, torch.nan, -torch.inf
    w = int8.quantise(weight)
    assert w.codes[:4].count_nonzero() == 0 and w.scales[:2].tolist() == [0, 0]
    values = int8.dequantise(w)
    assert values[2:4].isnan().all() and values[4].isfinite().all()


def test_empty_and_strided_weights(implementation):
    for shape in ((0, 8), (3, 0)):
        w = int8.quantise(torch.empty(shape))
        assert int8.dequantise(w).shape == shape
    weight = torch.randn(48, 130)
    assert_same(int8.quantise(weight.t()), int8.quantise(weight.t().contiguous()))
    w = int8.quantise(weight)
    out = torch.full((48, 200), torch.nan)
    int8.dequantise(w, out=out[:, 7:137])
    assert torch.equal(out[:, 7:137], int8.dequantise(w)) and out[:, :7].isnan().all() and out[:, 137:].isnan().all()


def test_error_is_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(64, 1000)
    w = int8.quantise(weight)
    error = (int8.dequantise(w) - weight).abs()
    assert (error <= 0.5001 * w.scales[:, None]).all()
    assert w.nbytes == 64 * 1000 + 64 * 4


@pytest.mark.parametrize("rows", [1, 3, int8.FUSED_ROWS])
@pytest.mark.parametrize("inputs", [64, 131])
def test_the_two_products_agree(rows, inputs, implementation):
    w = int8.quantise(torch.randn(33, inputs) * 0.1)
    x, bias = torch.randn(inputs, rows).t(), torch.randn(33)
    found = int8.fused_linear(x, w, bias, torch.full((rows, 33), torch.nan))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, int8.dequantise(w), bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(int8.linear(x, w, bias), found)


def test_errors_name_the_argument():
    w, x = int8.quantise(torch.randn(6, 64)), torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        int8.quantise(torch.randn(3, 3).double())
    with pytest.raises(ValueError, match="weight has shape"):
        int8.quantise(torch.randn(3))
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        int8.dequantise(w, torch.int8)
    for out in (torch.empty(6, 65), torch.empty(64, 6).t(), torch.empty(6, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="out is"):
            int8.dequantise(w, torch.float32, out)
    for bad, name in ((x[:, :5], "x has"), (x.double(), "x is")):
        with pytest.raises(ValueError, match=name):
            int8.linear(bad, w)
    with pytest.raises(ValueError, match="bias is"):
        int8.linear(x, w, torch.zeros(5))
    with pytest.raises(ValueError, match="buffer is"):
        int8.linear(x, w, buffer=torch.zeros(6, 64).double())
    with pytest.raises(ValueError, match=r"w\.scales is"):
        int8.linear(x, int8.Int8Weight(w.codes, w.scales[:5], torch.float32))
    with pytest.raises(ValueError, match=r"w\.codes has strides"):
        int8.linear(torch.randn(2, 6), int8.Int8Weight(w.codes.t(), torch.ones(64), torch.float32))
