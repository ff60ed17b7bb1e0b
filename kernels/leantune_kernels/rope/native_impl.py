"""Rotary embedding by csrc/rope/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses

__all__ = ["apply_", "refuses"]


def apply_(x, cos, sin, positions, inverse):  # type: ignore[no-untyped-def]
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    lib.rope(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(),
        positions.data_ptr(), x.shape[0], x.shape[1], cos.shape[1], inverse,
    )  # fmt: skip
