"""SGD in plain PyTorch: `plain` is one step in its inputs' dtype, `update` the in-place step in fp32."""

from __future__ import annotations

import torch

from leantune_kernels.tensor_list import write_back


def plain(  # type: ignore[no-untyped-def]
    p, g, b, *, step, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, grad_scale=1.0
):
    """(p, b) after one step on one tensor; b is what it was where momentum is 0."""
    g = g * grad_scale + weight_decay * p
    if momentum == 0:
        return p - lr * g, b
    b = g if step == 1 else momentum * b + (1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b), b


def refuses(x: torch.Tensor) -> str | None:
    return None


def update(table, grads, *, lr, weight_decay, seed, step, **numbers):  # type: ignore[no-untyped-def]
    buffers = table.states[0] or [None] * len(grads)
    for i, (p, master, g, b) in enumerate(zip(table.params, table.masters, grads, buffers, strict=True)):
        if g is not None:
            value = p.float() if master is None else master
            value, new_b = plain(value, g.float(), b, step=step, lr=lr[i], weight_decay=weight_decay[i], **numbers)
            if b is not None:
                b.copy_(new_b)
            write_back(table, i, value, seed=seed, step=step)
