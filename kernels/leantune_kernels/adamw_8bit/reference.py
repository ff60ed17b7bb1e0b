"""AdamW with 8-bit moments in plain PyTorch: `plain` is one step in its inputs' dtype, `update` the step in place."""

from __future__ import annotations

import torch

from leantune_kernels.adamw.reference import plain as adamw
from leantune_kernels.adamw_8bit.code_book import decode, encode
from leantune_kernels.tensor_list import write_back


def plain(p, g, codes_m, absmax_m, codes_v, absmax_v, **numbers):  # type: ignore[no-untyped-def]
    """(p, codes of m, absmax of m, codes of v, absmax of v) after one step on one tensor."""
    m = decode(codes_m, absmax_m, signed=True).view(p.shape)
    v = decode(codes_v, absmax_v, signed=False).view(p.shape)
    p, m, v = adamw(p, g, m, v, **numbers)
    return p, *encode(m, signed=True), *encode(v, signed=False)


def refuses(x: torch.Tensor) -> str | None:
    return None


def update(table, grads, *, lr, weight_decay, seed, step, **numbers):  # type: ignore[no-untyped-def]
    for i, (p, master, g, *states) in enumerate(zip(table.params, table.masters, grads, *table.states, strict=True)):
        if g is not None:
            value = p.float() if master is None else master
            value, *new = plain(value, g.float(), *states, step=step, lr=lr[i], weight_decay=weight_decay[i], **numbers)
            for state, result in zip(states, new, strict=True):
                state.copy_(result.view(state.shape))
            write_back(table, i, value, seed=seed, step=step)
