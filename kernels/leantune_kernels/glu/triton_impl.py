"""Gated activations in Triton: a program takes a tile, and writes what it alone has read, even in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.activation.triton_impl import place, tiles, value_slope
from leantune_kernels.checks import rows
from leantune_kernels.triton_runtime import on_device, refuses

__all__ = ["backward", "backward_", "forward", "refuses"]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate_ptr, gate_stride, up_ptr, up_stride, h_ptr, h_stride, rows, cols,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, i, mask = place(rows, cols, ROWS, BLOCK)
    gate = tl.load(gate_ptr + t * gate_stride + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + t * up_stride + i, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_slope(gate, ACTIVATION)
    tl.store(h_ptr + t * h_stride + i, value * up, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dh_ptr, dh_stride, gate_ptr, gate_stride, up_ptr, up_stride, h_ptr, h_stride, d_gate_ptr, d_gate_stride, d_up_ptr,
    d_up_stride, rows, cols, NEED_H: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, i, mask = place(rows, cols, ROWS, BLOCK)
    dh = tl.load(dh_ptr + t * dh_stride + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + t * gate_stride + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + t * up_stride + i, mask=mask, other=0.0).to(tl.float32)
    value, slope = value_slope(gate, ACTIVATION)
    if NEED_H:
        tl.store(h_ptr + t * h_stride + i, value * up, mask=mask)
    tl.store(d_gate_ptr + t * d_gate_stride + i, dh * up * slope, mask=mask)
    tl.store(d_up_ptr + t * d_up_stride + i, dh * value, mask=mask)


@on_device
def forward(gate, up, out=None, activation="silu"):
    gate, up = rows(gate), rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    if gate.numel():
        grid, constants = tiles(gate)
        _forward[grid](
            gate_ptr=gate, gate_stride=gate.stride(0), up_ptr=up, up_stride=up.stride(0), h_ptr=h,
            h_stride=h.stride(0), rows=gate.shape[0], cols=gate.shape[1], ACTIVATION=activation, **constants,
        )  # fmt: skip
    return h


@on_device
def backward(dh, gate, up, activation="silu"):
    dh, gate, up = rows(dh), rows(gate), rows(up)
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch_backward(dh, gate, up, None, d_gate, d_up, activation)
    return d_gate, d_up


@on_device
def backward_(dh, gate, up, activation="silu"):
    _launch_backward(dh, gate, up, dh, gate, up, activation)


def _launch_backward(dh, gate, up, h, d_gate, d_up, activation):
    if gate.numel() == 0:
        return
    grid, constants = tiles(gate)
    _backward[grid](
        dh_ptr=dh, dh_stride=dh.stride(0), gate_ptr=gate, gate_stride=gate.stride(0), up_ptr=up,
        up_stride=up.stride(0), h_ptr=h, h_stride=0 if h is None else h.stride(0), d_gate_ptr=d_gate,
        d_gate_stride=d_gate.stride(0), d_up_ptr=d_up, d_up_stride=d_up.stride(0), rows=gate.shape[0],
        cols=gate.shape[1], NEED_H=h is not None, ACTIVATION=activation, **constants,
    )  # fmt: skip
