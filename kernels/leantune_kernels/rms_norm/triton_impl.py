"""RMSNorm in Triton: a program takes a few whole rows, and leaves their part of the weight's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.cpu import rows
from leantune_kernels.triton_runtime import ceil_div, power_of_two, refuses

__all__ = ["backward", "forward", "refuses"]

GROUP = 16  # rows of a program that sums for the weight's gradient: few enough to fill a device, many enough to pay


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, x_stride, weight_ptr, y_ptr, y_stride, rstd_ptr, rows, cols, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (h < cols)[None, :]
    x = tl.load(x_ptr + t[:, None] * x_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / cols + eps)
    tl.store(rstd_ptr + t, rstd, mask=t < rows)
    tl.store(y_ptr + t[:, None] * y_stride + h[None, :], x * rstd[:, None] * weight[None, :], mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy_ptr, dy_stride, x_ptr, x_stride, weight_ptr, rstd_ptr, residual_ptr, residual_stride, dx_ptr, dx_stride,
    partials_ptr, rows, cols, HAS_RESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of GROUP rows, ROWS at a time; partials[group, h] = sum over these rows of dy * x * rstd."""
    group = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    partial = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, GROUP, ROWS):
        t = group * GROUP + begin + tl.arange(0, ROWS)
        mask = (t < rows)[:, None] & (h < cols)[None, :]
        x = tl.load(x_ptr + t[:, None] * x_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t[:, None] * dy_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t, mask=t < rows, other=0.0)
        if NEED_DWEIGHT:
            partial += tl.sum(dy * x * rstd[:, None], axis=0)
        g = dy * weight[None, :]
        correction = rstd * rstd * tl.sum(g * x, axis=1) / cols
        dx = rstd[:, None] * (g - x * correction[:, None])
        if HAS_RESIDUAL:
            residual = residual_ptr + t[:, None] * residual_stride + h[None, :]
            dx += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t[:, None] * dx_stride + h[None, :], dx, mask=mask)
    if NEED_DWEIGHT:
        tl.store(partials_ptr + group * cols + h, partial, mask=h < cols)


def _tile(cols: int) -> dict[str, int]:
    """Rows, columns and warps of a program: whole rows, several where they are short, held in registers."""
    block = power_of_two(cols)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def forward(x, weight, eps, out=None):
    x, weight = rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        tile = _tile(x.shape[1])
        _forward[(ceil_div(x.shape[0], tile["ROWS"]),)](
            x_ptr=x, x_stride=x.stride(0), weight_ptr=weight, y_ptr=y, y_stride=y.stride(0), rstd_ptr=rstd,
            rows=x.shape[0], cols=x.shape[1], eps=eps, **tile,
        )  # fmt: skip
    return y, rstd


def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):
    dy, x, weight, rstd = rows(dy), rows(x), weight.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tile = _tile(x.shape[1])
    group = max(GROUP, tile["ROWS"]) if need_dweight else tile["ROWS"]
    groups = ceil_div(x.shape[0], group)
    partials = torch.empty(groups, x.shape[1], dtype=torch.float32, device=x.device) if need_dweight else None
    if groups:
        _backward[(groups,)](
            dy_ptr=dy, dy_stride=dy.stride(0), x_ptr=x, x_stride=x.stride(0), weight_ptr=weight, rstd_ptr=rstd,
            residual_ptr=residual, residual_stride=0 if residual is None else residual.stride(0),
            dx_ptr=dx, dx_stride=dx.stride(0), partials_ptr=partials, rows=x.shape[0], cols=x.shape[1],
            HAS_RESIDUAL=residual is not None, NEED_DWEIGHT=need_dweight, GROUP=group, **tile,
        )  # fmt: skip
    # The order of torch's sum over the groups is fixed, and the groups are a sixteenth of the rows.
    return dx, None if partials is None else partials.sum(0)
