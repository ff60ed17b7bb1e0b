"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, residual add (Zhang and Sennrich 2019, arXiv:1910.07467).

Shapes: T rows (tokens), H columns (hidden size). x [T, H]; weight [H]; rstd [T] fp32, kept for the backward pass.
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import FLOATS, as_rows, changed, expect, expect_dims, expect_rows, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects
from leantune_kernels.ranges import expect_number

OP = Op(__name__, effects={"forward": Effects((3, 5), returns=True), "backward": Effects((5,), returns=True)})


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm of `x` [..., H] by `weight` [H], differentiable in both.

    x and weight: float32, bfloat16 or float16, each its own, any strides; the result has x's dtype and shape.
    Statistics and sums are fp32. Raises ValueError for a weight that does not fit.
    """
    expect_rows("x", x)
    return call(_RMSNorm, x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s): s = `x` + `residual`, both [..., H], rounded to x's dtype, and y the RMSNorm of s.

    Differentiable in all three, through y and through s; dtypes as for rms_norm. Raises ValueError for a residual
    unlike x, or a weight that does not fit.
    """
    expect_rows("x", x)
    expect_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must have x's, {tuple(x.shape)}")
    return call(_AddRMSNorm, x, residual, weight, eps)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    summed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) for x [T, H]; y goes to `out` where given.

    With `residual` [T, H], x + residual goes to `summed` (which may be x or residual), and the norm is that sum's.
    Raises ValueError for what does not fit x.
    """
    _check(x, weight, out)
    expect_number("eps", eps)
    if residual is not None or summed is not None:
        check_sum(x, residual, summed)
    result = OP.pick(x).forward(x, weight, eps, out, residual, summed)
    changed(out, summed)
    return result


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    need_dweight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx [T, H], dweight [H] fp32 or None). `residual` [T, H] is added to dx; `out` takes dx and may be dy.

    dy and residual have x's dtype, rstd is float32 [T]; x is the sum where forward had a residual. Raises
    ValueError for what does not fit x.
    """
    _check(x, weight, out)
    expect("dy", dy, x.shape, x.dtype, x.device)
    expect("rstd", rstd, x.shape[:1], torch.float32, x.device)
    if residual is not None:
        expect("residual", residual, x.shape, x.dtype, x.device)
    result = OP.pick(x).backward(dy, x, weight, rstd, residual, out, need_dweight)
    changed(out)
    return result


def check_sum(x: torch.Tensor, residual: torch.Tensor | None, summed: torch.Tensor | None) -> None:
    """ValueError unless x + `residual` can go to `summed`."""
    if residual is None or summed is None:
        name, other = ("residual", "summed") if residual is None else ("summed", "residual")
        raise ValueError(f"{name} is None though {other} is not; x + residual needs both (summed may be residual)")
    expect("residual", residual, x.shape, x.dtype, x.device)
    expect("summed", summed, x.shape, x.dtype, x.device, written=True)


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> None:
    expect_dims("x", x, "T", "H")
    expect_tensor("weight", weight)
    expect("weight", weight, x.shape[1:], weight.dtype if weight.dtype in FLOATS else x.dtype, x.device)
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device, written=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        flat = as_rows(x)
        y, rstd = forward(flat, weight, eps)
        save(ctx, flat, weight, rstd, exact=(weight, rstd))
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = backward(dy.reshape(x.shape), x, weight, rstd, need_dweight=ctx.needs_input_grad[1])
        return dx.view(dy.shape), None if dweight is None else dweight.to(weight.dtype), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        flat = as_rows(x)
        s = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        y, rstd = forward(flat, weight, eps, residual=residual.reshape(flat.shape), summed=s)
        save(ctx, s, weight, rstd, exact=(weight, rstd))
        ctx.set_materialize_grads(False)
        return y.view(x.shape), s.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):  # type: ignore[no-untyped-def]
        s, weight, rstd = ctx.saved_tensors
        if dy is None:  # y was not used
            return ds, ds, None, None
        added = None if ds is None else ds.reshape(s.shape)
        dx, dweight = backward(dy.reshape(s.shape), s, weight, rstd, added, need_dweight=ctx.needs_input_grad[2])
        dx = dx.view(dy.shape)
        return dx, dx, None if dweight is None else dweight.to(weight.dtype), None
