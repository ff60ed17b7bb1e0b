"""Activations by csrc/activation/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.activation import ACTIVATIONS
from leantune_kernels.cuda import DTYPE_CODES, lib, refuses, rows, stream

__all__ = ["backward", "forward", "refuses"]


def forward(x, activation, out=None):  # type: ignore[no-untyped-def]
    x = rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    with stream(x) as s:
        lib.activation_forward(
            DTYPE_CODES[x.dtype], ACTIVATIONS[activation], x.data_ptr(), x.stride(0),
            y.data_ptr(), y.stride(0), *x.shape, s,
        )  # fmt: skip
    return y


def backward(dy, x, activation, out=None):  # type: ignore[no-untyped-def]
    dy, x = rows(dy), rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    with stream(x) as s:
        lib.activation_backward(
            DTYPE_CODES[x.dtype], ACTIVATIONS[activation], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
            dx.data_ptr(), dx.stride(0), *x.shape, s,
        )  # fmt: skip
    return dx
