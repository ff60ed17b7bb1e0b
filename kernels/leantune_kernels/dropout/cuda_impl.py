"""Dropout by csrc/dropout/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.cuda import DTYPE_CODES, lib, refuses, stream

__all__ = ["forward", "refuses"]


def forward(x, threshold, scale, seed, offset, out=None):  # type: ignore[no-untyped-def]
    x = x.contiguous()
    y = torch.empty_like(x) if out is None else out
    with stream(x) as s:
        lib.dropout(DTYPE_CODES[x.dtype], x.data_ptr(), y.data_ptr(), x.numel(), seed, offset, threshold, scale, s)
    return y
