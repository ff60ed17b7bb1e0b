"""Cross-entropy of hidden @ weight^T (+ bias) without its logits: [N, V] never exists, nor does its gradient.

After Cut Cross-Entropy (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989): rows without a label are left
out first, the others pass in chunks through one buffer of logits, whose gradient takes their place and is
multiplied on at once. The products are PyTorch's: their last bits may depend on its number of threads, but
not on the run.

Shapes: N rows (tokens), H columns (hidden size), V vocabulary. With x a row's logits and lse =
log(sum(exp(x))): loss = lse - (1 - label_smoothing) * x[target] - label_smoothing * mean(x) + z_loss * lse^2.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from leantune_kernels.dispatch import Op
from leantune_kernels.linear_cross_entropy import chunked
from leantune_kernels.linear_cross_entropy.chunked import LossAndGradients, Settings

__all__ = ["OP", "LossAndGradients", "forward", "linear_cross_entropy"]

OP = Op(__name__)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int = 256,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of predicting `targets` [N] int64 from `hidden` [N, H] by the head `weight` [V, H] and `bias` [V].

    Returns fp32: a scalar for reduction "mean" (over the rows that have a label; 0 if none has) and "sum",
    [N] with 0 at ignored rows for "none". Differentiable once in hidden, weight and bias. hidden, weight and
    bias: float32, bfloat16 or float16, each its own, any strides; logits, softmax and sums over rows are fp32
    (loss sums fp64). Memory beyond the results: about chunk_rows * V * 4 bytes, which is `workspace` where given,
    fp32 [min(chunk_rows, N) or more, V]: whoever calls again and again spares new memory's page faults. Gradients
    of "mean" and "sum" are computed together with the loss; "none" computes the logits again in its backward pass
    (in the workspace, too). Raises ValueError for shapes that do not fit and for the first target that is neither
    `ignore_index` nor in [0, V).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r} is none of "mean", "sum", "none"')
    settings = Settings(ignore_index, label_smoothing, z_loss, chunk_rows, workspace)
    function = _PerRow if reduction == "none" else _Reduced
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return function.apply(hidden, weight, bias, targets, settings, reduction == "mean")


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_scale: float = 1.0,
    need_dhidden: bool = True,
    need_dweight: bool = False,
    chunk_rows: int = 256,
    workspace: torch.Tensor | None = None,
) -> LossAndGradients:
    """(loss_sum, label_count, dhidden, dweight, dbias): summed loss and gradients of grad_scale * loss_sum.

    loss_sum: fp32 scalar, unscaled. dhidden [N, H] in hidden's dtype, 0 at ignored rows. dweight [V, H] and
    dbias [V] are fp32; dbias comes with dweight where there is a bias. What was not asked for is None. `workspace`
    is as in linear_cross_entropy; its contents are lost.
    """
    settings = Settings(ignore_index, label_smoothing, z_loss, chunk_rows, workspace)
    needs = (need_dhidden, need_dweight, need_dweight and bias is not None)
    return _run(hidden, weight, bias, targets, settings, grad_scale, None, needs)[0]


def _run(hidden, weight, bias, targets, settings, grad_scale, row_scale, needs):  # type: ignore[no-untyped-def]
    rows = OP.pick(hidden).cross_entropy_rows
    return chunked.run(rows, hidden, weight, bias, targets, settings, grad_scale, row_scale, needs)


class _Reduced(torch.autograd.Function):
    """Sum or mean: the forward pass leaves finished gradients, the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings, mean):  # type: ignore[no-untyped-def]
        scale = 1.0 / max(1, int((targets != settings.ignore_index).sum())) if mean else 1.0
        needs = ctx.needs_input_grad[:3]
        result, _ = _run(hidden, weight, bias, targets, settings, scale, None, needs)
        ctx.save_for_backward(result.dhidden, result.dweight, result.dbias)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return result.loss_sum * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        scale = float(upstream)
        # The saved gradients stay as they are: a graph that is kept may ask for them again.
        grads = (g if g is None or scale == 1.0 else g * scale for g in ctx.saved_tensors)
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*cast, None, None, None)


class _PerRow(torch.autograd.Function):
    """One loss a row: each row has its own upstream gradient, so the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings, mean):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        return _run(hidden, weight, bias, targets, settings, 1.0, None, (False, False, False))[1].float()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        result, _ = _run(hidden, weight, bias, targets, ctx.settings, 1.0, upstream.float().contiguous(), needs)
        grads = (result.dhidden, result.dweight, result.dbias)
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, weight, bias), strict=True))
        return (*cast, None, None, None)
