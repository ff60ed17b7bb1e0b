"""Row-wise int8 in Triton: a program a row to quantise, a tile of rows and columns to dequantise and to multiply.

Products are not fused with what follows where a result is rounded to an integer, so that codes are the same everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.int8.reference import SMALLEST
from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["dequantise", "linear", "quantise", "refuses"]

COLUMNS = 4096  # of a row that a program holds at once
TILE = 4096  # elements of a program that dequantises
OUTPUTS, INPUTS, TOKENS = 8, 256, 4  # of a program of the product: rows of the weight, its columns at a time, rows of x
_SMALLEST = tl.constexpr(SMALLEST)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_NAN = tl.constexpr(float("nan"))
_ROUND = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit(do_not_specialize=["x_stride"])
def _quantise_kernel(x_ptr, x_stride, codes_ptr, scales_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * cols
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    whole = tl.full((BLOCK,), 1, dtype=tl.int32)
    for start in range(0, cols, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(x_ptr + i, mask=i < cols, other=0.0).to(tl.float32))
        finite = x <= _LARGEST
        whole = tl.where(finite, whole, 0)
        largest = tl.maximum(largest, tl.where(finite, x, 0.0))
    absmax = tl.max(largest, axis=0)
    usable = (tl.min(whole, axis=0) > 0) & (absmax >= _SMALLEST)
    scale = tl.where(usable, tl.div_rn(absmax, 127.0), tl.where(tl.min(whole, axis=0) > 0, 0.0, _NAN))
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(127.0, tl.where(usable, absmax, 1.0))
    for start in range(0, cols, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=(i < cols) & usable, other=0.0).to(tl.float32)
        tl.store(codes_ptr + i, ((x * inverse + _ROUND) - _ROUND).to(tl.int8), mask=i < cols)


@triton.jit(do_not_specialize=["rows", "out_stride"])
def _dequantise_kernel(
    codes_ptr, scales_ptr, out_ptr, out_stride, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (i < cols)
    codes = tl.load(codes_ptr + row * cols + i, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + row * out_stride + i, codes * scale, mask=mask)


@triton.jit(do_not_specialize=["rows", "x_stride", "y_stride"])
def _linear_kernel(
    x_ptr, x_stride, codes_ptr, scales_ptr, bias_ptr, y_ptr, y_stride, rows, inputs, outputs,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS, INPUTS), dtype=tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS)
        mask = (n < outputs)[:, None] & (k < inputs)[None, :]
        w = tl.load(codes_ptr + n[:, None] * inputs + k[None, :], mask=mask, other=0).to(tl.float32)
        mask = (t < rows)[:, None] & (k < inputs)[None, :]
        x = tl.load(x_ptr + t[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x[:, None, :] * w[None, :, :]
    y = tl.sum(total, axis=2) * tl.load(scales_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * y_stride + n[None, :], y, mask=(t < rows)[:, None] & (n < outputs)[None, :])


@on_device
def quantise(x, codes, scales):
    x = rows(x)
    if x.shape[0]:
        _quantise_kernel[(x.shape[0],)](
            x_ptr=x, x_stride=x.stride(0), codes_ptr=codes, scales_ptr=scales, cols=x.shape[1],
            BLOCK=power_of_two(x.shape[1], at_most=COLUMNS), enable_fp_fusion=False,
        )  # fmt: skip


@on_device
def dequantise(codes, scales, out, reused):
    if out.numel():
        block = power_of_two(out.shape[1], at_most=TILE)
        _dequantise_kernel[(ceil_div(out.shape[0], TILE // block), ceil_div(out.shape[1], block))](
            codes_ptr=codes, scales_ptr=scales, out_ptr=out, out_stride=out.stride(0), rows=out.shape[0],
            cols=out.shape[1], ROWS=TILE // block, BLOCK=block,
        )  # fmt: skip


@on_device
def linear(x, codes, scales, bias, y):
    x, bias = rows(x), None if bias is None else bias.contiguous()
    if y.numel():
        tokens = 1 if x.shape[0] == 1 else TOKENS
        _linear_kernel[(ceil_div(y.shape[1], OUTPUTS), ceil_div(x.shape[0], tokens))](
            x_ptr=x, x_stride=x.stride(0), codes_ptr=codes, scales_ptr=scales, bias_ptr=bias, y_ptr=y,
            y_stride=y.stride(0), rows=x.shape[0], inputs=x.shape[1], outputs=y.shape[1],
            TOKENS=tokens, OUTPUTS=OUTPUTS, INPUTS=INPUTS,
        )  # fmt: skip
