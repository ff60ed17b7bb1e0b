"""Activations in Triton: a program takes a tile of rows and columns, and writes what it alone has read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["backward", "forward", "place", "refuses", "tiles", "value_slope"]

TILE = 1024  # elements of a program


@triton.jit
def value_slope(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) of an fp32 x; the polynomial is explained in csrc/common/activation.h."""
    if ACTIVATION == "gelu":
        a = tl.minimum(tl.abs(x), 13.285, propagate_nan=tl.PropagateNan.ALL)
        gauss = tl.exp(-0.5 * a * a)
        t = 1.0 / (1.0 + 0.34 * a)
        u = t - 0.5
        p = -0.026471851 * u + 0.03526252
        p = p * u + 0.03230798
        p = p * u - 0.06772998
        p = p * u - 0.06747644
        p = p * u + 0.10799363
        p = p * u + 0.29794392
        p = p * u + 0.3410649
        p = p * u + 0.24713932
        tail = gauss * (p * t)
        phi = tl.where(x > 0, 1.0 - tail, tail)  # the normal distribution function
        value = x * phi
        slope = phi + x * gauss * 0.3989422804014327
    else:
        z = x
        dz = 1.0
        if ACTIVATION == "gelu_tanh":  # (1 + tanh(z / 2)) / 2 is the sigmoid of z
            z = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
            dz = 1.5957691216057308 + 0.21406444881780076 * x * x
        e = tl.exp(-tl.abs(z))
        r = 1.0 / (1.0 + e)
        sigmoid = tl.where(z > 0, r, e * r)
        value = x * sigmoid
        slope = sigmoid + value * tl.where(z > 0, e * r, r) * dz
    return value, slope


@triton.jit
def place(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1], columns [1, BLOCK], mask) of this program's tile."""
    spans = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    t = (program // spans).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    h = (program % spans).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return t, h, (t < rows) & (h < cols)


def tiles(x: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants) of a launch over x [T, I]: TILE elements a program, of several rows where they are short."""
    block = power_of_two(x.shape[1], at_most=TILE)
    rows = TILE // block
    return (ceil_div(x.shape[0], rows) * ceil_div(x.shape[1], block),), {"ROWS": rows, "BLOCK": block, "num_warps": 4}


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, x_stride, y_ptr, y_stride, rows, cols, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    t, h, mask = place(rows, cols, ROWS, BLOCK)
    x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0).to(tl.float32)
    y, _ = value_slope(x, ACTIVATION)
    tl.store(y_ptr + t * y_stride + h, y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy_ptr, dy_stride, x_ptr, x_stride, dx_ptr, dx_stride, rows, cols,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, h, mask = place(rows, cols, ROWS, BLOCK)
    dy = tl.load(dy_ptr + t * dy_stride + h, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0).to(tl.float32)
    _, slope = value_slope(x, ACTIVATION)
    tl.store(dx_ptr + t * dx_stride + h, dy * slope, mask=mask)


@on_device
def forward(x, activation, out=None):
    x = rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.numel():
        grid, constants = tiles(x)
        _forward[grid](
            x_ptr=x, x_stride=x.stride(0), y_ptr=y, y_stride=y.stride(0), rows=x.shape[0], cols=x.shape[1],
            ACTIVATION=activation, **constants,
        )  # fmt: skip
    return y


@on_device
def backward(dy, x, activation, out=None):
    dy, x = rows(dy), rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.numel():
        grid, constants = tiles(x)
        _backward[grid](
            dy_ptr=dy, dy_stride=dy.stride(0), x_ptr=x, x_stride=x.stride(0), dx_ptr=dx, dx_stride=dx.stride(0),
            rows=x.shape[0], cols=x.shape[1], ACTIVATION=activation, **constants,
        )  # fmt: skip
    return dx
