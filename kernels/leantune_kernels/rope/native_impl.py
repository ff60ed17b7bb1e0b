"""Rotary embedding by csrc/rope/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses

__all__ = ["apply_", "refuses"]


def apply_(x, k, cos, sin, positions, inverse, interleaved):  # type: ignore[no-untyped-def]
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    lib.rope(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), x.shape[1],
        *((0, 0, 0, 0) if k is None else (k.data_ptr(), k.stride(0), k.stride(1), k.shape[1])),
        cos.data_ptr(), sin.data_ptr(), cos.shape[0], positions.data_ptr(), x.shape[0], cos.shape[1],
        interleaved, inverse,
    )  # fmt: skip
