"""Packing by csrc/activation_pack/cuda.cu; 8 bits by csrc/int8/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import DTYPE_CODES, lib, refuses, rows, stream
from leantune_kernels.int8.cuda_impl import dequantise as unpack_int8
from leantune_kernels.int8.cuda_impl import quantise as pack_int8

__all__ = ["pack_bf16", "pack_int8", "refuses", "unpack_bf16", "unpack_int8"]


def pack_bf16(x, data):  # type: ignore[no-untyped-def]
    x = rows(x)
    with stream(x) as s:
        lib.pack_bf16(DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), data.data_ptr(), *x.shape, s)


def unpack_bf16(data, out):  # type: ignore[no-untyped-def]
    with stream(out) as s:
        lib.unpack_bf16(data.data_ptr(), DTYPE_CODES[out.dtype], out.data_ptr(), out.stride(0), *out.shape, s)
