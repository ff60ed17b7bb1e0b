"""Quantised weights and packed activations, for leantune_kernels.native: NF4, int8 by rows, bfloat16.

The products with a quantised weight read its codes as they are, which pays for few rows: up to about 16, or 32 in
float32. For more, and for the gradient dx = dy W, dequantise the weight once and multiply by it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import CODES, FLOATS, View, address, apart, result, take

Array = Any  # what has __dlpack__ or the buffer protocol

BLOCK, GROUP = 64, 256  # elements that share an absmax, and absmax values that share a scale, of NF4

# ---- NF4 -------------------------------------------------------------------------------------------------------------


class NF4Weight(NamedTuple):
    """A weight of `shape` in NF4; n elements, B = ceil(n / 64) blocks. The PyTorch client's arrays have the same bytes.

    codes: uint8 [ceil(n / 2)], two elements a byte, the first in the high half. absmax: float32 [B], or uint8 [B]
    together with scales, float32 [ceil(B / 256)], and offset, float32 [].
    """

    codes: Array
    absmax: Array
    scales: Array | None
    offset: Array | None
    shape: tuple[int, ...]


def nf4_quantise(weight: Array, double_quant: bool = True) -> NF4Weight:
    """`weight`, of any shape and float dtype, in blocks of 64 of 4-bit NormalFloat.

    A block with a NaN or an infinity becomes NaN. Double quantisation keeps the absmax values, less their mean, in 8
    bits: 0.516 bytes an element instead of 0.563. Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
    """
    weight_ = take("weight", weight, ("...",) * np.ndim(weight), dense=True)
    size = math.prod(weight_.shape)
    blocks = -(-size // BLOCK)
    codes, absmax = np.empty(-(-size // 2), np.uint8), np.empty(blocks, np.float32)
    lib.nf4_quantise(weight_.code, weight_.address, codes.ctypes.data, absmax.ctypes.data, size)
    if not double_quant:
        return NF4Weight(codes, absmax, None, None, weight_.shape)
    offset = np.array(absmax.mean(dtype=np.float64) if blocks else 0.0, np.float32)
    small, scales = np.empty(blocks, np.uint8), np.empty(-(-blocks // GROUP), np.float32)
    lib.nf4_quantise_absmax(
        absmax.ctypes.data, offset.ctypes.data, small.ctypes.data, scales.ctypes.data, blocks
    )  # fmt: skip
    return NF4Weight(codes, small, scales, offset, weight_.shape)


def nf4_dequantise(w: NF4Weight, dtype: str | None = None, out: Array | None = None) -> Array:
    """The values of `w` in `dtype` (None: that of out, else float32), computed in float32 and rounded once.

    `out`, contiguous and of w.shape, takes them; bfloat16 needs it.
    """
    stored = _stored(w)
    y = _values(out, tuple(w.shape), dtype, dense=True)
    apart(y, *stored)
    lib.nf4_dequantise(*map(address, stored), y.code, y.address, math.prod(y.shape), out is not None)
    return y.source


def nf4_linear(x: Array, w: NF4Weight, bias: Array | None = None, out: Array | None = None) -> Array:
    """x W^T + bias [T, N] in x's dtype, for `x` [T, K] and the values W [N, K] of `w`; sums are float32.

    bias [N] has x's dtype. K is a multiple of 64.
    """
    stored = _stored(w)
    if len(w.shape) != 2 or w.shape[1] % BLOCK:
        raise ValueError(
            f"w has shape {list(w.shape)}; reading its codes needs [N, K] with K a multiple of {BLOCK}: use "
            "nf4_dequantise and a dense product"
        )
    x_, bias_, y = _product(x, bias, out, *w.shape)
    apart(y, x_, bias_, *stored)
    lib.nf4_linear(
        x_.code, x_.address, x_.row, *map(address, stored), address(bias_), y.address, y.row,
        x_.shape[0], *w.shape[::-1],
    )  # fmt: skip
    return y.source


def _stored(w: NF4Weight) -> tuple[View | None, ...]:
    """codes, absmax, absmax_codes, absmax_scales, absmax_offset of the C interface; the kernels go by w.shape alone."""
    if not hasattr(w, "absmax"):
        raise TypeError(f"w is a {type(w).__name__}; pass nf4_quantise(weight)")
    size = math.prod(w.shape)
    blocks = -(-size // BLOCK)
    codes = take("w.codes", w.codes, (-(-size // 2),), "uint8", dense=True)
    if w.scales is None:
        return codes, take("w.absmax", w.absmax, (blocks,), "float32", dense=True), None, None, None
    if w.offset is None:
        raise ValueError("w.offset is None; with w.scales it is the mean of the absmax values, float32 []")
    return (
        codes,
        None,
        take("w.absmax", w.absmax, (blocks,), "uint8", dense=True),
        take("w.scales", w.scales, (-(-blocks // GROUP),), "float32", dense=True),
        take("w.offset", w.offset, (), "float32", dense=True),
    )


# ---- int8 ------------------------------------------------------------------------------------------------------------


def int8_quantise(x: Array) -> tuple[Array, Array]:
    """(codes int8 [T, H], scales float32 [T]) of `x` [T, H]: x is about codes * scales, row by row.

    scales are absmax / 127 of each row; a row with a NaN or an infinity becomes NaN. For weights, W [N, K] by its rows
    (Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339), and for activations kept until the backward pass (Chen et al.
    2021, ActNN, arXiv:2104.14129).
    """
    x_ = take("x", x, ("T", "H"))
    codes, scales = result("codes", None, x_.shape, "int8"), result("scales", None, x_.shape[:1], "float32")
    lib.int8_quantise(x_.code, x_.address, x_.row, codes.address, scales.address, *x_.shape)
    return codes.source, scales.source


def int8_dequantise(codes: Array, scales: Array, dtype: str | None = None, out: Array | None = None) -> Array:
    """codes * scales [T, H] in `dtype` (None: that of out, else float32), computed in float32 and rounded once.

    codes: int8 [T, H]; scales: float32 [T]. bfloat16 needs `out`.
    """
    codes_, scales_ = _int8("T", "H", codes, scales)
    x = _values(out, codes_.shape, dtype)
    apart(x, codes_, scales_)
    lib.int8_dequantise(codes_.address, scales_.address, x.code, x.address, x.row, *codes_.shape, out is not None)
    return x.source


def int8_linear(x: Array, codes: Array, scales: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    """x W^T + bias [T, N] in x's dtype, for `x` [T, K] and W about codes * scales; sums are float32.

    codes: int8 [N, K]; scales: float32 [N]; bias [N] has x's dtype.
    """
    codes_, scales_ = _int8("N", "K", codes, scales)
    x_, bias_, y = _product(x, bias, out, *codes_.shape)
    apart(y, x_, bias_, codes_, scales_)
    lib.int8_linear(
        x_.code, x_.address, x_.row, codes_.address, scales_.address, address(bias_), y.address, y.row,
        *x_.shape, codes_.shape[0],
    )  # fmt: skip
    return y.source


def _int8(rows: str, cols: str, codes: Array, scales: Array) -> tuple[View, View]:
    codes_ = take("codes", codes, (rows, cols), "int8", dense=True)
    return codes_, take("scales", scales, codes_.shape[:1], "float32", dense=True)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


def pack_bf16(x: Array, out: Array | None = None) -> Array:
    """`x` [T, H] in bfloat16 to the nearest, ties to even: 2 bytes an element kept until the backward pass.

    As 16-bit words, uint16, which NumPy knows; `out`, contiguous, may be uint16 or bfloat16. For 1 byte an element see
    int8_quantise.
    """
    x_ = take("x", x, ("T", "H"))
    dtype = "uint16" if out is None else take("out", out, x_.shape, ("uint16", "bfloat16")).dtype
    packed = result("out", out, x_.shape, dtype, dense=True)
    apart(packed, x_)
    lib.pack_bf16(x_.code, x_.address, x_.row, packed.address, *x_.shape)
    return packed.source


def unpack_bf16(packed: Array, dtype: str | None = None, out: Array | None = None) -> Array:
    """`packed` [T, H], bfloat16 or its words in uint16, in `dtype` (None: that of out, else float32)."""
    packed_ = take("packed", packed, ("T", "H"), ("uint16", "bfloat16"), dense=True)
    x = _values(out, packed_.shape, dtype)
    apart(x, packed_)
    lib.unpack_bf16(packed_.address, x.code, x.address, x.row, *x.shape)
    return x.source


# ---- what they share -------------------------------------------------------------------------------------------------


def _values(out: Array | None, shape: tuple[int, ...], dtype: str | None, dense: bool = False) -> View:
    """Where values of any float dtype go."""
    if dtype is None:
        dtype = "float32" if out is None else take("out", out, shape).dtype
    if dtype not in CODES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(FLOATS)}")
    return result("out", out, shape, dtype, dense=dense)


def _product(
    x: Array, bias: Array | None, out: Array | None, outputs: int, inputs: int
) -> tuple[View, View | None, View]:
    x_ = take("x", x, ("T", inputs))
    bias_ = None if bias is None else take("bias", bias, (outputs,), x_.dtype, dense=True)
    return x_, bias_, result("out", out, (x_.shape[0], outputs), x_.dtype, x_)
