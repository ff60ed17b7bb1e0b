"""NF4 in Triton: whole blocks of 64 weights a program, values looked up in small tables that stay in the L1 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.nf4.reference import SMALLEST, tables
from leantune_kernels.triton_runtime import ceil_div, on_device, refuses

__all__ = ["dequantise", "linear", "quantise", "quantise_absmax", "refuses"]

BLOCKS = 32  # of 64 weights, a program
OUTPUTS, BYTES, TOKENS = (
    8,
    128,
    4,
)  # of a program of the product: rows of the weight, bytes of each at a time, rows of x
_SMALLEST = tl.constexpr(SMALLEST)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _normalised(x, AXIS: tl.constexpr):
    """x / largest magnitude along AXIS, and that magnitude, as they are stored: see the rules in nf4/__init__.py."""
    finite = tl.abs(x) <= _LARGEST
    x = tl.where(finite, x, _NAN)
    largest = tl.max(tl.where(finite, tl.abs(x), 0.0), axis=AXIS)
    whole = tl.min(finite.to(tl.int32), axis=AXIS) > 0
    largest = tl.where(whole, tl.where(largest < _SMALLEST, 0.0, largest), _NAN)
    inverse = tl.where(largest > 0, tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    return x * tl.expand_dims(inverse, AXIS), largest


@triton.jit
def _absmax(absmax_ptr, scales_ptr, offset_ptr, map_ptr, block, mask, NESTED: tl.constexpr):
    """Absolute maxima of `block`. Products of two floats are exact in fp64: the sum is rounded once, fused or not."""
    stored = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        scale = tl.load(scales_ptr + block // 256, mask=mask, other=0.0).to(tl.float64)
        product = tl.load(map_ptr + stored.to(tl.int32)).to(tl.float64) * scale
        result = (product + tl.load(offset_ptr).to(tl.float64)).to(tl.float32)
    else:
        result = stored
    return result


@triton.jit(do_not_specialize=["size"])
def _quantise_kernel(weight_ptr, midpoints_ptr, codes_ptr, absmax_ptr, size, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(weight_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    normed, largest = _normalised(x, 1)
    tl.store(absmax_ptr + block, largest, mask=block * 64 < size)
    code = tl.zeros((BLOCKS, 64), dtype=tl.int32)
    for i in tl.static_range(15):
        code += (normed > tl.load(midpoints_ptr + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, 32, 2)))
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes_ptr + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < size)


@triton.jit(do_not_specialize=["blocks"])
def _quantise_absmax_kernel(absmax_ptr, offset_ptr, midpoints_ptr, codes_ptr, scales_ptr, blocks):
    group = tl.program_id(0).to(tl.int64)
    block = group * 256 + tl.arange(0, 256)
    x = tl.load(absmax_ptr + block, mask=block < blocks, other=0.0) - tl.load(offset_ptr)
    normed, largest = _normalised(tl.where(block < blocks, x, 0.0), 0)
    tl.store(scales_ptr + group, largest)
    code = tl.zeros((256,), dtype=tl.int32)
    for i in tl.static_range(8):
        code += tl.where(normed > tl.load(midpoints_ptr + code + (128 >> i) - 1), 128 >> i, 0)
    tl.store(codes_ptr + block, code.to(tl.uint8), mask=block < blocks)


@triton.jit(do_not_specialize=["size"])
def _dequantise_kernel(
    codes_ptr, absmax_ptr, scales_ptr, offset_ptr, values_ptr, map_ptr, out_ptr, size,
    NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    codes = tl.load(codes_ptr + byte, mask=byte * 2 < size, other=0).to(tl.int32)
    absmax = _absmax(absmax_ptr, scales_ptr, offset_ptr, map_ptr, block, block * 64 < size, NESTED)
    pairs = tl.join(tl.load(values_ptr + (codes >> 4)), tl.load(values_ptr + (codes & 15)))
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + place, tl.reshape(pairs, (BLOCKS, 64)) * absmax[:, None], mask=place < size)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr, x_stride, codes_ptr, absmax_ptr, scales_ptr, offset_ptr, values_ptr, map_ptr, bias_ptr, y_ptr, y_stride,
    rows, inputs, outputs,
    NESTED: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS, BYTES), dtype=tl.float32)
    for start in range(0, inputs // 2, BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = byte < inputs // 2
        mask = (n < outputs)[:, None] & inside[None, :]
        place = n[:, None] * (inputs // 2) + byte[None, :]
        codes = tl.load(codes_ptr + place, mask=mask, other=0).to(tl.int32)
        absmax = _absmax(absmax_ptr, scales_ptr, offset_ptr, map_ptr, place // 32, mask, NESTED)
        even = tl.load(values_ptr + (codes >> 4)) * absmax
        odd = tl.load(values_ptr + (codes & 15)) * absmax
        at = x_ptr + t[:, None] * x_stride + 2 * byte[None, :]
        mask = (t < rows)[:, None] & inside[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)[:, None, :] * even[None, :, :]
        total += tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)[:, None, :] * odd[None, :, :]
    y = tl.sum(total, axis=2)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * y_stride + n[None, :], y, mask=(t < rows)[:, None] & (n < outputs)[None, :])


@on_device
def quantise(weight, codes, absmax):
    if weight.numel():
        _quantise_kernel[(ceil_div(absmax.numel(), BLOCKS),)](
            weight_ptr=weight.contiguous(), midpoints_ptr=tables(weight.device)[1], codes_ptr=codes,
            absmax_ptr=absmax, size=weight.numel(), BLOCKS=BLOCKS,
        )  # fmt: skip


@on_device
def quantise_absmax(absmax, offset, codes, scales):
    if absmax.numel():
        _quantise_absmax_kernel[(scales.numel(),)](
            absmax_ptr=absmax, offset_ptr=offset, midpoints_ptr=tables(absmax.device)[3], codes_ptr=codes,
            scales_ptr=scales, blocks=absmax.numel(),
        )  # fmt: skip


@on_device
def dequantise(w, out, reused):
    if out.numel():
        _dequantise_kernel[(ceil_div(w.absmax.numel(), BLOCKS),)](
            **_stored(w), out_ptr=out, size=out.numel(), BLOCKS=BLOCKS
        )


@on_device
def linear(x, w, bias, y):
    x, bias = rows(x), None if bias is None else bias.contiguous()
    if y.numel():
        tokens = 1 if x.shape[0] == 1 else TOKENS
        _linear_kernel[(ceil_div(w.shape[0], OUTPUTS), ceil_div(x.shape[0], tokens))](
            x_ptr=x, x_stride=x.stride(0), **_stored(w), bias_ptr=bias, y_ptr=y, y_stride=y.stride(0),
            rows=x.shape[0], inputs=w.shape[1], outputs=w.shape[0], TOKENS=tokens, OUTPUTS=OUTPUTS, BYTES=BYTES,
        )  # fmt: skip


def _stored(w):
    values, _, dynamic_map, _ = tables(w.codes.device)
    return {
        "codes_ptr": w.codes, "absmax_ptr": w.absmax, "scales_ptr": w.scales, "offset_ptr": w.offset,
        "values_ptr": values, "map_ptr": dynamic_map, "NESTED": w.scales is not None,
    }  # fmt: skip
