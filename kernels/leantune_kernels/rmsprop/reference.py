"""RMSprop in plain PyTorch: `plain` is one step in its inputs' dtype, `update` the in-place step in fp32."""

from __future__ import annotations

import torch

from leantune_kernels.tensor_list import write_back


def plain(  # type: ignore[no-untyped-def]
    p, g, v, b, a, *, step, lr, alpha=0.99, eps=1e-8, momentum=0.0, weight_decay=0.0, grad_scale=1.0
):
    """(p, v, b, a) after one step on one tensor; b is None without momentum, a is None where not centered."""
    g = g * grad_scale + weight_decay * p
    v = alpha * v + (1 - alpha) * g * g
    variance = v
    if a is not None:
        a = a + (1 - alpha) * (g - a)
        variance = v - a * a
    direction = g / (variance.sqrt() + eps)
    if b is not None:
        direction = b = momentum * b + direction
    return p - lr * direction, v, b, a


def refuses(x: torch.Tensor) -> str | None:
    return None


def update(table, grads, *, lr, weight_decay, seed, step, **numbers):  # type: ignore[no-untyped-def]
    for i, (p, master, g) in enumerate(zip(table.params, table.masters, grads, strict=True)):
        if g is not None:
            states = [None if ts is None else ts[i] for ts in table.states]
            value = p.float() if master is None else master
            value, *new = plain(value, g.float(), *states, step=step, lr=lr[i], weight_decay=weight_decay[i], **numbers)
            for state, result in zip(states, new, strict=True):
                if state is not None:
                    state.copy_(result)
            write_back(table, i, value, seed=seed, step=step)
