"""Row-wise int8 by csrc/int8/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses, rows

__all__ = ["dequantise", "linear", "quantise", "refuses"]


def quantise(x, codes, scales):  # type: ignore[no-untyped-def]
    x = rows(x)
    lib.int8_quantise(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), codes.data_ptr(), scales.data_ptr(), *x.shape
    )  # fmt: skip


def dequantise(codes, scales, out, reused):  # type: ignore[no-untyped-def]
    lib.int8_dequantise(
        codes.data_ptr(), scales.data_ptr(), DTYPE_CODES[out.dtype], out.data_ptr(), out.stride(0), *out.shape, reused,
    )  # fmt: skip


def linear(x, codes, scales, bias, y):  # type: ignore[no-untyped-def]
    x, bias = rows(x), None if bias is None else bias.contiguous()
    lib.int8_linear(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), codes.data_ptr(), scales.data_ptr(), address(bias),
        y.data_ptr(), y.stride(0), *x.shape, codes.shape[0],
    )  # fmt: skip
