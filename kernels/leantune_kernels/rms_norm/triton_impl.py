"""RMSNorm in Triton: a program goes through a few whole rows with the weight, and the sums of its gradient, at hand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["backward", "forward", "plan", "refuses"]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, x_stride, residual_ptr, residual_stride, sum_ptr, sum_stride, weight_ptr, y_ptr, y_stride, rstd_ptr, rows,
    cols, eps, HAS_RESIDUAL: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (t < rows) & (h < cols)
        x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            added = tl.load(residual_ptr + t * residual_stride + h, mask=mask, other=0.0)
            x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)  # the norm is that of the rounded sum
            tl.store(sum_ptr + t * sum_stride + h, x, mask=mask)
        x = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1, keep_dims=True) / cols + eps)
        tl.store(rstd_ptr + t, rstd, mask=t < rows)
        tl.store(y_ptr + t * y_stride + h, x * rstd * weight, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy_ptr, dy_stride, x_ptr, x_stride, weight_ptr, rstd_ptr, residual_ptr, residual_stride, dx_ptr, dx_stride,
    partials_ptr, rows, cols, HAS_RESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With NEED_DWEIGHT, partials[program, h] = sum over the program's rows of dy * x * rstd."""
    h = tl.arange(0, BLOCK)[None, :]
    if KEEP_WEIGHT:
        weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (t < rows) & (h < cols)
        x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0).to(tl.float32)
        if not KEEP_WEIGHT:
            weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t * dy_stride + h, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t, mask=t < rows, other=0.0)
        n = x * rstd
        g = dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / cols))
        if NEED_DWEIGHT:
            dweight += dy * n
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + t * residual_stride + h, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t * dx_stride + h, dx, mask=mask)
    if NEED_DWEIGHT:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * cols + h
        tl.store(out, tl.sum(dweight, axis=0, keep_dims=True), mask=h < cols)


def plan(x: torch.Tensor, rows_of_a_program: int) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants): whole rows of x [T, H], several at once where they are short, held in registers."""
    block = power_of_two(x.shape[1])
    at_once = max(1, min(rows_of_a_program, 2048 // block))
    constants = {"STEPS": rows_of_a_program // at_once, "ROWS": at_once, "BLOCK": block}
    return (ceil_div(x.shape[0], rows_of_a_program),), constants | {"num_warps": max(4, min(32, block // 256))}


@on_device
def forward(x, weight, eps, out=None, residual=None, summed=None):
    x, weight = rows(x), weight.contiguous()
    residual = None if residual is None else rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        grid, constants = plan(x, 8)
        _forward[grid](
            x_ptr=x, x_stride=x.stride(0), residual_ptr=residual,
            residual_stride=0 if residual is None else residual.stride(0), sum_ptr=summed,
            sum_stride=0 if residual is None else summed.stride(0), weight_ptr=weight, y_ptr=y, y_stride=y.stride(0),
            rstd_ptr=rstd, rows=x.shape[0], cols=x.shape[1], eps=eps, HAS_RESIDUAL=residual is not None, **constants,
        )  # fmt: skip
    return y, rstd


@on_device
def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):
    dy, x, weight, rstd = rows(dy), rows(x), weight.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    grid, constants = plan(x, 16 if need_dweight else 8)
    partials = torch.empty(*grid, x.shape[1], dtype=torch.float32, device=x.device) if need_dweight else None
    if x.shape[0]:
        _backward[grid](
            dy_ptr=dy, dy_stride=dy.stride(0), x_ptr=x, x_stride=x.stride(0), weight_ptr=weight, rstd_ptr=rstd,
            residual_ptr=residual, residual_stride=0 if residual is None else residual.stride(0),
            dx_ptr=dx, dx_stride=dx.stride(0), partials_ptr=partials, rows=x.shape[0], cols=x.shape[1],
            HAS_RESIDUAL=residual is not None, NEED_DWEIGHT=need_dweight,
            KEEP_WEIGHT=constants["BLOCK"] <= 4096, **constants,
        )  # fmt: skip
    # The partial sums are added by torch's own reduction, in a fixed order; they are small beside the rest.
    return dx, None if partials is None else partials.sum(0)
