"""NF4 by csrc/nf4/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream

__all__ = ["dequantise", "linear", "quantise", "quantise_absmax", "refuses"]


def quantise(weight, codes, absmax):  # type: ignore[no-untyped-def]
    weight = weight.contiguous()
    with stream(weight) as s:
        lib.nf4_quantise(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), codes.data_ptr(), absmax.data_ptr(), weight.numel(), s,
        )  # fmt: skip


def quantise_absmax(absmax, offset, codes, scales):  # type: ignore[no-untyped-def]
    with stream(absmax) as s:
        lib.nf4_quantise_absmax(
            absmax.data_ptr(), offset.data_ptr(), codes.data_ptr(), scales.data_ptr(), absmax.numel(), s,
        )  # fmt: skip


def dequantise(w, out, reused):  # type: ignore[no-untyped-def]
    with stream(out) as s:
        lib.nf4_dequantise(*_stored(w), DTYPE_CODES[out.dtype], out.data_ptr(), out.numel(), s)


def linear(x, w, bias, y):  # type: ignore[no-untyped-def]
    x, bias = rows(x), None if bias is None else bias.contiguous()
    with stream(x) as s:
        lib.nf4_linear(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *_stored(w), address(bias), y.data_ptr(), y.stride(0),
            x.shape[0], *w.shape[::-1], s,
        )  # fmt: skip


def _stored(w):  # type: ignore[no-untyped-def]
    """codes, absmax, absmax_codes, absmax_scales, absmax_offset, of which the second or the last three are null."""
    nested = w.scales is not None
    return (
        w.codes.data_ptr(), 0 if nested else w.absmax.data_ptr(), w.absmax.data_ptr() if nested else 0,
        address(w.scales), address(w.offset),
    )  # fmt: skip
