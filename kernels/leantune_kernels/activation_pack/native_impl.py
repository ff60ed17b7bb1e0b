"""Packing by csrc/activation_pack/cpu.cpp; 8 bits by csrc/int8/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses, rows
from leantune_kernels.int8.native_impl import dequantise as unpack_int8
from leantune_kernels.int8.native_impl import quantise as pack_int8

__all__ = ["pack_bf16", "pack_int8", "refuses", "unpack_bf16", "unpack_int8"]


def pack_bf16(x, data):  # type: ignore[no-untyped-def]
    x = rows(x)
    lib.pack_bf16(DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), data.data_ptr(), *x.shape)


def unpack_bf16(data, out):  # type: ignore[no-untyped-def]
    lib.unpack_bf16(data.data_ptr(), DTYPE_CODES[out.dtype], out.data_ptr(), out.stride(0), *out.shape)
