"""Gated activations by csrc/glu/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.activation import ACTIVATIONS
from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream

__all__ = ["backward", "backward_", "forward", "refuses"]


def forward(gate, up, out=None, activation="silu"):  # type: ignore[no-untyped-def]
    gate, up = rows(gate), rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    with stream(gate) as s:
        lib.glu_forward(
            DTYPE_CODES[gate.dtype], ACTIVATIONS[activation], gate.data_ptr(), gate.stride(0),
            up.data_ptr(), up.stride(0), h.data_ptr(), h.stride(0), *gate.shape, s,
        )  # fmt: skip
    return h


def backward(dh, gate, up, activation="silu"):  # type: ignore[no-untyped-def]
    dh, gate, up = rows(dh), rows(gate), rows(up)
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _backward(dh, gate, up, None, d_gate, d_up, activation)
    return d_gate, d_up


def backward_(dh, gate, up, activation="silu"):  # type: ignore[no-untyped-def]
    _backward(dh, gate, up, dh, gate, up, activation)


def _backward(dh, gate, up, h, d_gate, d_up, activation):  # type: ignore[no-untyped-def]
    with stream(dh) as s:
        lib.glu_backward(
            DTYPE_CODES[dh.dtype], ACTIVATIONS[activation], dh.data_ptr(), dh.stride(0),
            gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), address(h), 0 if h is None else h.stride(0),
            d_gate.data_ptr(), d_gate.stride(0), d_up.data_ptr(), d_up.stride(0), *dh.shape, s,
        )  # fmt: skip
