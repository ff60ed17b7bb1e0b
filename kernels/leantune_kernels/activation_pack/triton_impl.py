"""Packing in Triton; 8 bits are those of the int8 op."""

from __future__ import annotations

import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.int8.triton_impl import dequantise as unpack_int8
from leantune_kernels.int8.triton_impl import quantise as pack_int8
from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["pack_bf16", "pack_int8", "refuses", "unpack_bf16", "unpack_int8"]

TILE = 4096  # elements of a program


@triton.jit(do_not_specialize=["rows", "x_stride", "y_stride"])
def _convert_kernel(x_ptr, x_stride, y_ptr, y_stride, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (i < cols)
    tl.store(y_ptr + row * y_stride + i, tl.load(x_ptr + row * x_stride + i, mask=mask).to(tl.float32), mask=mask)


def _convert(x, y):
    if x.numel():
        block = power_of_two(x.shape[1], at_most=TILE)
        _convert_kernel[(ceil_div(x.shape[0], TILE // block), ceil_div(x.shape[1], block))](
            x_ptr=x, x_stride=x.stride(0), y_ptr=y, y_stride=y.stride(0), rows=x.shape[0], cols=x.shape[1],
            ROWS=TILE // block, BLOCK=block,
        )  # fmt: skip


@on_device
def pack_bf16(x, data):
    _convert(rows(x), data)


@on_device
def unpack_bf16(data, out):
    _convert(data, out)
