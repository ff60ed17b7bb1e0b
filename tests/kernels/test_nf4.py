"""NF4: the same bits from every implementation, the layout's known answers, what cannot be quantised."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_kernels import DTYPES, IMPLEMENTATIONS, by_reference, each_of, forced, same
from leantune_kernels import nf4
from leantune_kernels.nf4.reference import BLOCK, CODE_BOOK, dynamic_map

HEADER = Path(__file__).parent.parent.parent / "csrc" / "common" / "dynamic_map.h"
FIELDS = ("codes", "absmax", "scales", "offset")


implementation = each_of(*IMPLEMENTATIONS)


def assert_same(a, b):
    for field in FIELDS:
        mine, theirs = getattr(a, field), getattr(b, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or same(mine, theirs), field


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 129, 64 * 257 + 5])
def test_same_bits_as_the_reference(size, double_quant, implementation):
    torch.manual_seed(size)
    for dtype in DTYPES:
        weight = (torch.randn(size) * 0.05).to(dtype)
        if size > 200:
            weight[64:128] = 0  # a block of zeros
            weight[128:192] *= 1e-3
        w = nf4.quantise(weight, double_quant)
        assert_same(w, by_reference(nf4.quantise, weight, double_quant))
        for target in DTYPES:
            assert same(nf4.dequantise(w, target), by_reference(nf4.dequantise, w, target)), target


@given(st.integers(1, 700), st.booleans(), st.sampled_from(DTYPES), st.floats(-30, 30))
def test_any_size_and_scale(size, double_quant, dtype, exponent):
    torch.manual_seed(size)
    weight = (torch.randn(size) * 2.0**exponent).to(dtype)
    with pytest.MonkeyPatch.context() as patch, forced("cpu", patch):
        w = nf4.quantise(weight, double_quant)
        values = nf4.dequantise(w)
    assert_same(w, by_reference(nf4.quantise, weight, double_quant))
    assert same(values, by_reference(nf4.dequantise, w))


def test_codes_as_bitsandbytes_stores_them(implementation):
    """What bitsandbytes 0.50 gives for 64 numbers from -1 to 1, and the 8-bit map's first, middle and last values."""
    w = nf4.quantise(torch.linspace(-1, 1, 64), double_quant=False)
    assert bytes(w.codes.tolist()).hex() == "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
    values = dynamic_map()
    assert values.unique().numel() == 256 and torch.equal(values, values.sort().values)
    assert values[[0, 126, 127, 128, 254, 255]].tolist() == pytest.approx(
        [-0.9929687, -5.5e-7, 0, 5.5e-7, 0.9929687, 1]
    )


def test_the_headers_map_is_the_formulas():
    listed = HEADER.read_text().split("LT_DYNAMIC_MAP")[1]
    numbers = [float(text) for text in re.findall(r"-?\d\.\d+(?:e-\d)?(?=f)", listed)]
    assert torch.equal(torch.tensor(numbers), dynamic_map())


def test_every_8_bit_absmax(implementation):
    """Blocks whose only weight is the largest one, so that the values are the absmax themselves."""
    codes = torch.full((256 * BLOCK // 2,), 0xFF, dtype=torch.uint8)
    small = torch.arange(256).to(torch.uint8)
    scale, offset = torch.tensor([0.37]), torch.tensor(1.25)
    w = nf4.NF4Weight(codes, small, scale, offset, (256, BLOCK), torch.float32)
    expected = (dynamic_map().double() * scale.double() + offset.double()).float()
    assert torch.equal(nf4.dequantise(w), expected[:, None].expand(256, BLOCK))


def test_of_a_tie_the_lower_code(implementation):
    middle = (CODE_BOOK[:-1] + CODE_BOOK[1:]) / 2
    above = torch.nextafter(middle, torch.tensor(2.0))
    weight = torch.cat((middle, above, torch.ones(34)))
    codes = nf4.quantise(weight, double_quant=False).codes
    unpacked = torch.stack((codes >> 4, codes & 15), 1).flatten()
    assert unpacked[:30].tolist() == [*range(15), *range(1, 16)]


def test_of_an_odd_number_of_weights_the_last_half_byte_is_zero(implementation):
    assert nf4.quantise(torch.ones(3), double_quant=False).codes.tolist() == [0xFF, 0xF7]


def test_zeros_tiny_and_not_finite(implementation):
    weight = torch.randn(5, 64)
    weight[0], weight[1], weight[2, 3], weight[3, 4] = 0, 1e-39, torch.nan, -torch.inf
    values = nf4.dequantise(nf4.quantise(weight, double_quant=False))
    assert torch.equal(values[:2], torch.zeros(2, 64))
    assert values[2:4].isnan().all() and values[4].isfinite().all()
    assert nf4.dequantise(nf4.quantise(weight)).isnan().all()  # the mean of the absmax is NaN
    assert nf4.dequantise(nf4.quantise(torch.zeros(300, 64))).count_nonzero() == 0


def test_empty_and_strided_weights(implementation):
    for shape in ((0,), (0, 64), (3, 0)):
        for double_quant in (False, True):
            w = nf4.quantise(torch.empty(shape), double_quant)
            assert nf4.dequantise(w).shape == shape
    weight = torch.randn(64, 130)
    assert_same(nf4.quantise(weight.t()), nf4.quantise(weight.t().contiguous()))


def test_error_is_what_the_code_book_allows():
    """At most half the widest gap; on normal weights the mean error that the paper's authors give, 0.0728 of sigma."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    widest = (CODE_BOOK[1:] - CODE_BOOK[:-1]).max() / 2
    for double_quant in (False, True):
        w = nf4.quantise(weight, double_quant)
        error = (nf4.dequantise(w) - weight).abs()
        absmax = weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
        slack = 0.04 if double_quant else 1e-6  # of absmax, by its own rounding to 8 bits
        assert (error.view(-1, BLOCK) <= (widest + slack) * absmax).all()
        assert error.mean() == pytest.approx(0.0728, abs=5e-4)


def test_bytes_a_weight():
    weight = torch.randn(1024, 4096)
    assert nf4.quantise(weight, double_quant=False).nbytes / weight.numel() == 0.5625
    assert nf4.quantise(weight).nbytes / weight.numel() == pytest.approx(0.5159, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 3, nf4.FUSED_ROWS])
def test_the_two_products_agree(rows, implementation):
    w = nf4.quantise(torch.randn(33, 192) * 0.1)
    x, bias = torch.randn(192, rows).t(), torch.randn(33)
    out = torch.full((33, rows), torch.nan).t().contiguous()
    found = nf4.fused_linear(x, w, bias, out)
    assert found is out
    torch.testing.assert_close(found, torch.nn.functional.linear(x, nf4.dequantise(w), bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nf4.linear(x, w, bias), found, rtol=0, atol=0)


def test_errors_name_the_argument():
    w = nf4.quantise(torch.randn(6, 64))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        nf4.quantise(torch.randn(3).double())
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        nf4.dequantise(w, torch.int8)
    for out in (torch.empty(6, 65), torch.empty(64, 6).t(), torch.empty(6, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="out "):
            nf4.dequantise(w, torch.float32, out)
    for bad, name in ((x[:, :5], "x has"), (x.double(), "x is")):
        with pytest.raises(ValueError, match=name):
            nf4.linear(bad, w)
    with pytest.raises(ValueError, match="bias is"):
        nf4.linear(x, w, torch.zeros(5))
    with pytest.raises(ValueError, match="buffer is"):
        nf4.linear(x, w, buffer=torch.zeros(6, 64).double())
    with pytest.raises(ValueError, match="33 columns"):
        nf4.fused_linear(torch.randn(1, 33), nf4.quantise(torch.randn(4, 33)), None, torch.empty(1, 4))
    short = {field: getattr(w, field) for field in FIELDS}
    for name, bad in (("codes", w.codes[:-1]), ("absmax", w.absmax.float()), ("offset", None)):
        with pytest.raises(ValueError, match=rf"w\.{name} is"):
            nf4.linear(x, nf4.NF4Weight(**{**short, name: bad}, shape=w.shape, dtype=w.dtype))
