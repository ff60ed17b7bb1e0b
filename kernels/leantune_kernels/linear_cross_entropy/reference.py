"""Linear cross-entropy in plain PyTorch: `plain` has all logits at once, in its inputs' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def plain(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    targets,
    *,
    bias=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    chunk_rows=0,
):
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    labelled = targets != ignore_index
    losses = losses + torch.where(labelled, z_loss * logits.logsumexp(-1).square(), 0)
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, int(labelled.sum())) if reduction == "mean" else 1)


def refuses(x: torch.Tensor) -> str | None:
    return None


def cross_entropy_rows(  # type: ignore[no-untyped-def]
    *, logits, targets, row_scale, scale, label_smoothing, z_loss, need_gradient
):
    """Losses [R] fp64 of `logits` [R, V] fp32, where the gradient of scale * row_scale * losses is left."""
    lse = logits.logsumexp(-1, keepdim=True)
    target = targets[:, None]
    losses = lse - (1 - label_smoothing) * logits.gather(1, target) + z_loss * lse.square()
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(-1, keepdim=True)
    if need_gradient:
        logits.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse).sub_(label_smoothing / logits.shape[1])
        logits.scatter_add_(1, target, torch.full_like(lse, label_smoothing - 1))
        logits.mul_(scale if row_scale is None else scale * row_scale[:, None])
    return losses.squeeze(1).double()
