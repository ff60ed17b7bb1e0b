"""SwiGLU by csrc/swiglu/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses, rows

__all__ = ["backward_", "forward", "refuses"]


def forward(gate, up, out=None):  # type: ignore[no-untyped-def]
    gate, up = rows(gate), rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
    lib.swiglu_forward(
        DTYPE_CODES[gate.dtype], gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0),
        h.data_ptr(), h.stride(0), gate.shape[0], gate.shape[1],
    )  # fmt: skip
    return h


def backward_(dh, gate, up):  # type: ignore[no-untyped-def]
    lib.swiglu_backward(
        DTYPE_CODES[dh.dtype], dh.data_ptr(), dh.stride(0), gate.data_ptr(), gate.stride(0),
        up.data_ptr(), up.stride(0), dh.shape[0], dh.shape[1],
    )  # fmt: skip
