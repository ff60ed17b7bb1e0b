"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, residual add (Ba et al. 2016, arXiv:1607.06450).

Shapes: T rows (tokens), H columns (hidden size). x [T, H]; weight and bias [H]; mean and rstd [T] fp32, kept for the
backward pass.
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import FLOATS, as_rows, changed, expect, expect_dims, expect_rows, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects
from leantune_kernels.ranges import expect_number
from leantune_kernels.rms_norm import check_sum

OP = Op(__name__, effects={"forward": Effects((4, 6), returns=True), "backward": Effects((6,), returns=True)})


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """LayerNorm of `x` [..., H] by `weight` [H] and, where given, `bias` [H], differentiable in all three.

    x and weight: float32, bfloat16 or float16, each its own, any strides; bias has weight's dtype. The result has x's
    dtype and shape; statistics and sums are fp32. Raises ValueError for a weight or bias that does not fit.
    """
    expect_rows("x", x)
    return call(_LayerNorm, x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s): s = `x` + `residual`, both [..., H], rounded to x's dtype, and y the LayerNorm of s.

    Differentiable in all, through y and through s; dtypes as for layer_norm. Raises ValueError for a residual unlike x,
    or a weight or bias that does not fit.
    """
    expect_rows("x", x)
    expect_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must have x's, {tuple(x.shape)}")
    return call(_AddLayerNorm, x, residual, weight, bias, eps)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    summed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd) for x [T, H]; y goes to `out` where given.

    With `residual` [T, H], x + residual goes to `summed` (which may be x or residual), and the norm is that sum's.
    Raises ValueError for what does not fit x.
    """
    _check(x, weight, bias, out)
    expect_number("eps", eps)
    if residual is not None or summed is not None:
        check_sum(x, residual, summed)
    result = OP.pick(x).forward(x, weight, bias, eps, out, residual, summed)
    changed(out, summed)
    return result


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    need_dweight: bool = False,
    need_dbias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx [T, H], dweight and dbias [H] fp32 or None). `residual` [T, H] is added to dx; `out` takes dx, may be dy.

    dy and residual have x's dtype, mean and rstd are float32 [T]; x is the sum where forward had a residual. Raises
    ValueError for what does not fit x.
    """
    _check(x, weight, None, out)
    expect("dy", dy, x.shape, x.dtype, x.device)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        expect(name, statistic, x.shape[:1], torch.float32, x.device)
    if residual is not None:
        expect("residual", residual, x.shape, x.dtype, x.device)
    result = OP.pick(x).backward(dy, x, weight, mean, rstd, residual, out, need_dweight, need_dbias)
    changed(out)
    return result


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> None:
    expect_dims("x", x, "T", "H")
    expect_tensor("weight", weight)
    expect("weight", weight, x.shape[1:], weight.dtype if weight.dtype in FLOATS else x.dtype, x.device)
    if bias is not None:
        expect("bias", bias, x.shape[1:], weight.dtype, x.device)
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device, written=True)


def _gradients(ctx, dy, ds):  # type: ignore[no-untyped-def]
    """(dx, dweight, dbias) from the gradients of y and s, of which either may be None."""
    x, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        return ds, None, None
    need_dweight, need_dbias = ctx.needs_input_grad[-3:-1]
    residual = None if ds is None else ds.reshape(x.shape)
    dx, dweight, dbias = backward(
        dy.reshape(x.shape), x, weight, mean, rstd, residual, need_dweight=need_dweight, need_dbias=need_dbias
    )
    in_its_dtype = (None if d is None else d.to(weight.dtype) for d in (dweight, dbias))
    return dx.view(ctx.shape), *in_its_dtype


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        flat = as_rows(x)
        y, mean, rstd = forward(flat, weight, bias, eps)
        save(ctx, flat, weight, mean, rstd, exact=(weight, mean, rstd))
        ctx.shape = x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, dy, None), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
        flat = as_rows(x)
        s = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        y, mean, rstd = forward(flat, weight, bias, eps, residual=residual.reshape(flat.shape), summed=s)
        save(ctx, s, weight, mean, rstd, exact=(weight, mean, rstd))
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return y.view(x.shape), s.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):  # type: ignore[no-untyped-def]
        dx, dweight, dbias = _gradients(ctx, dy, ds)
        return dx, dx, dweight, dbias, None
