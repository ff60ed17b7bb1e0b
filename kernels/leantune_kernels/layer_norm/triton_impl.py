"""LayerNorm in Triton: a program goes through a few whole rows, parameters and sums of their gradients at hand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.rms_norm.triton_impl import plan
from leantune_kernels.triton_runtime import on_device, refuses

__all__ = ["backward", "forward", "refuses"]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, x_stride, residual_ptr, residual_stride, sum_ptr, sum_stride, weight_ptr, bias_ptr, y_ptr, y_stride,
    mean_ptr, rstd_ptr, rows, cols, eps, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (t < rows) & (h < cols)
        x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            added = tl.load(residual_ptr + t * residual_stride + h, mask=mask, other=0.0)
            x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)  # the norm is that of the rounded sum
            tl.store(sum_ptr + t * sum_stride + h, x, mask=mask)
        x = x.to(tl.float32)
        mean = tl.sum(x, axis=1, keep_dims=True) / cols
        mean += tl.sum(tl.where(h < cols, x - mean, 0.0), axis=1, keep_dims=True) / cols  # what rounding left
        centred = tl.where(h < cols, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1, keep_dims=True) / cols + eps)
        tl.store(mean_ptr + t, mean, mask=t < rows)
        tl.store(rstd_ptr + t, rstd, mask=t < rows)
        y = centred * rstd * weight
        if HAS_BIAS:
            y += bias
        tl.store(y_ptr + t * y_stride + h, y, mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward(
    dy_ptr, dy_stride, x_ptr, x_stride, weight_ptr, mean_ptr, rstd_ptr, residual_ptr, residual_stride, dx_ptr,
    dx_stride, partials_ptr, rows, cols, programs, HAS_RESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr, KEEP_WEIGHT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[0, program, h] = sum over the program's rows of dy * n, partials[1, ...] that of dy, where needed."""
    h = tl.arange(0, BLOCK)[None, :]
    if KEEP_WEIGHT:
        weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (t < rows) & (h < cols)
        x = tl.load(x_ptr + t * x_stride + h, mask=mask, other=0.0).to(tl.float32)
        if not KEEP_WEIGHT:
            weight = tl.load(weight_ptr + h, mask=h < cols, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t * dy_stride + h, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + t, mask=t < rows, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=t < rows, other=0.0)
        n = (x - mean) * rstd  # beyond the row g is zero, and so is what n is multiplied with
        g = dy * weight
        g_mean = tl.sum(g, axis=1, keep_dims=True) / cols
        dx = rstd * (g - g_mean - n * (tl.sum(g * n, axis=1, keep_dims=True) / cols))
        if NEED_DWEIGHT:
            dweight += dy * n
        if NEED_DBIAS:
            dbias += dy
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + t * residual_stride + h, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t * dx_stride + h, dx, mask=mask)
    out = partials_ptr + tl.program_id(0).to(tl.int64) * cols + h
    if NEED_DWEIGHT:
        tl.store(out, tl.sum(dweight, axis=0, keep_dims=True), mask=h < cols)
    if NEED_DBIAS:
        out += programs.to(tl.int64) * cols
        tl.store(out, tl.sum(dbias, axis=0, keep_dims=True), mask=h < cols)


@on_device
def forward(x, weight, bias, eps, out=None, residual=None, summed=None):
    x, weight, bias = rows(x), weight.contiguous(), None if bias is None else bias.contiguous()
    residual = None if residual is None else rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    # Two allocations: halves of one would be aligned for some lengths only, and Triton compiles for alignments.
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.shape[0]:
        grid, constants = plan(x, 16)
        _forward[grid](
            x_ptr=x, x_stride=x.stride(0), residual_ptr=residual,
            residual_stride=0 if residual is None else residual.stride(0), sum_ptr=summed,
            sum_stride=0 if residual is None else summed.stride(0), weight_ptr=weight, bias_ptr=bias, y_ptr=y,
            y_stride=y.stride(0), mean_ptr=mean, rstd_ptr=rstd, rows=x.shape[0], cols=x.shape[1], eps=eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, **constants,
        )  # fmt: skip
    return y, mean, rstd


@on_device
def backward(dy, x, weight, mean, rstd, residual=None, out=None, need_dweight=False, need_dbias=False):
    dy, x, weight, mean, rstd = rows(dy), rows(x), weight.contiguous(), mean.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    sums = need_dweight or need_dbias
    grid, constants = plan(x, 32 if sums else 8)
    partials = torch.empty(2, *grid, x.shape[1], dtype=torch.float32, device=x.device) if sums else None
    if x.shape[0]:
        _backward[grid](
            dy_ptr=dy, dy_stride=dy.stride(0), x_ptr=x, x_stride=x.stride(0), weight_ptr=weight, mean_ptr=mean,
            rstd_ptr=rstd, residual_ptr=residual, residual_stride=0 if residual is None else residual.stride(0),
            dx_ptr=dx, dx_stride=dx.stride(0), partials_ptr=partials, rows=x.shape[0], cols=x.shape[1],
            programs=grid[0], HAS_RESIDUAL=residual is not None, NEED_DWEIGHT=need_dweight, NEED_DBIAS=need_dbias,
            KEEP_WEIGHT=constants["BLOCK"] <= 4096, **constants,
        )  # fmt: skip
    if partials is None:
        return dx, None, None
    # Added by torch's own reduction, in a fixed order; they are small beside the rest.
    return dx, partials[0].sum(0) if need_dweight else None, partials[1].sum(0) if need_dbias else None
