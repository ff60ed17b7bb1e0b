"""Linear cross-entropy in plain PyTorch: `plain` has all logits at once, in its inputs' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from leantune_kernels.linear_cross_entropy.chunked import gradient_dtype


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


def plain_distillation(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    teacher,
    targets=None,
    *,
    bias=None,
    probabilities=False,
    alpha=0.5,
    temperature=1.0,
    ignore_index=-100,
    reduction="mean",
    chunk_rows=0,
):
    logits = F.linear(hidden, weight, bias)
    if isinstance(teacher, tuple):
        teacher = F.linear(*(t.to(hidden.dtype) for t in teacher))
    wanted = teacher / teacher.sum(-1, keepdim=True) if probabilities else (teacher / temperature).softmax(-1)
    divergence = F.kl_div((logits / temperature).log_softmax(-1), wanted, reduction="none").sum(-1)
    losses = alpha * temperature**2 * divergence
    counted = torch.ones_like(losses, dtype=torch.bool) if targets is None else targets != ignore_index
    if targets is not None:
        hard = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
        losses = torch.where(counted, losses + (1 - alpha) * hard, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, int(counted.sum())) if reduction == "mean" else 1)


def distillation_rows(  # type: ignore[no-untyped-def]
    *, logits, teacher, targets, alpha, temperature, row_scale, scale, need_gradient
):
    """As cross_entropy_rows, against the logits `teacher` [R, V] and, where alpha < 1, targets [R]."""
    x, z = logits / temperature, teacher.float() / temperature
    log_q, log_p = x.log_softmax(-1), z.log_softmax(-1)
    p = log_p.exp()
    losses = alpha * temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)
    gradient = alpha * temperature * (log_q.exp() - p)
    if alpha < 1:
        log_q = logits.log_softmax(-1)
        losses = losses - (1 - alpha) * log_q.gather(1, targets[:, None]).squeeze(1)
        gradient += (1 - alpha) * log_q.exp()
        gradient.scatter_add_(1, targets[:, None], torch.full_like(log_q[:, :1], alpha - 1))
    if need_gradient:
        logits.copy_(gradient.mul_(scale if row_scale is None else scale * row_scale[:, None]))
    return losses.double()


def reduced_shapes(hidden, weight, bias, settings, mean, needs):  # type: ignore[no-untyped-def]
    """What chunked.reduced returns, for graphs."""
    return hidden.new_empty((), dtype=torch.float32), *_gradient_shapes(hidden, weight, needs)


def per_row_shapes(hidden, weight, bias, settings, row_scale, needs):  # type: ignore[no-untyped-def]
    """What chunked.per_row returns, for graphs."""
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), *_gradient_shapes(hidden, weight, needs)


def _gradient_shapes(hidden, weight, needs):  # type: ignore[no-untyped-def]
    places = (
        hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden)),
        weight.new_empty(weight.shape, dtype=torch.float32),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )
    return tuple(place if needed else None for place, needed in zip(places, needs, strict=True))
