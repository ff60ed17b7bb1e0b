"""AdamW in plain PyTorch: `plain` is one step in its inputs' dtype, `update` the in-place step in fp32."""

from __future__ import annotations

import torch

from leantune_kernels.tensor_list import write_back


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


def update(table, grads, *, lr, weight_decay, seed, step, **numbers):  # type: ignore[no-untyped-def]
    for i, (p, master, g, m, v) in enumerate(zip(table.params, table.masters, grads, *table.states, strict=True)):
        if g is not None:
            value = p.float() if master is None else master
            value, new_m, new_v = plain(
                value, g.float(), m, v, step=step, lr=lr[i], weight_decay=weight_decay[i], **numbers
            )
            m.copy_(new_m)
            v.copy_(new_v)
            write_back(table, i, value, seed=seed, step=step)
