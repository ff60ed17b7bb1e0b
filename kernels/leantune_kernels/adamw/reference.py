"""AdamW in plain PyTorch: `plain` is one step in its inputs' dtype, `update` the in-place step in fp32."""

from __future__ import annotations

import torch


def plain(  # type: ignore[no-untyped-def]
    p, g, m, v, *, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, grad_scale=1.0
):
    """(p, m, v) after one step on one tensor."""
    g = g * grad_scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay)
    return p - lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps), m, v


def refuses(x: torch.Tensor) -> str | None:
    return None


def update(table, grads, *, lr, weight_decay, **numbers):  # type: ignore[no-untyped-def]
    tensors = zip(table.params, grads, table.exp_avgs, table.exp_avg_sqs, lr, weight_decay, strict=True)
    for p, g, m, v, lr_of_p, decay_of_p in tensors:
        if g is not None:
            results = plain(p, g.float(), m, v, lr=lr_of_p, weight_decay=decay_of_p, **numbers)
            for target, result in zip((p, m, v), results, strict=True):
                target.copy_(result)
