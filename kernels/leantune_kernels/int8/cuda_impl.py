"""Row-wise int8 by csrc/int8/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream

__all__ = ["dequantise", "linear", "quantise", "refuses"]


def quantise(x, codes, scales):  # type: ignore[no-untyped-def]
    x = rows(x)
    with stream(x) as s:
        lib.int8_quantise(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), codes.data_ptr(), scales.data_ptr(), *x.shape, s,
        )  # fmt: skip


def dequantise(codes, scales, out, reused):  # type: ignore[no-untyped-def]
    with stream(out) as s:
        lib.int8_dequantise(
            codes.data_ptr(), scales.data_ptr(), DTYPE_CODES[out.dtype], out.data_ptr(), out.stride(0), *out.shape, s,
        )  # fmt: skip


def linear(x, codes, scales, bias, y):  # type: ignore[no-untyped-def]
    x, bias = rows(x), None if bias is None else bias.contiguous()
    with stream(x) as s:
        lib.int8_linear(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), codes.data_ptr(), scales.data_ptr(), address(bias),
            y.data_ptr(), y.stride(0), *x.shape, codes.shape[0], s,
        )  # fmt: skip
