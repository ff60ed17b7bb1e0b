"""Inputs of adamw_8bit: moments that were quantised; the parameters and the blocks' maxima after a step are compared.

The codes are compared between implementations in tests/kernels/test_adamw_8bit.py: a number next to a boundary may fall
on either side, which no bound on an error describes.
"""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.adamw_8bit import adamw_8bit_step
from leantune_kernels.adamw_8bit.code_book import encode
from leantune_kernels.adamw_8bit.reference import plain as plain_step
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "DTYPES", "function", "plain"]

DTYPES = (torch.float32,)  # of the parameters; bfloat16 ones are in tests/kernels/test_optimizers.py
Tensor = torch.Tensor


def function(p: Tensor, g: Tensor, states: list[list[Tensor]], sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    params, grads = ([part.clone() for part in t.split(sizes)] for t in (p, g))
    given = [[t.clone() for t in tensors] for tensors in states]
    adamw_8bit_step(params, grads, *given, **numbers)
    return tuple(torch.cat(tensors) for tensors in (params, given[1], given[3]))


def plain(p: Tensor, g: Tensor, states: list[list[Tensor]], sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    results = [
        plain_step(p_i, g_i, codes_m, absmax_m.to(p), codes_v, absmax_v.to(p), **numbers)
        for p_i, g_i, codes_m, absmax_m, codes_v, absmax_v in zip(p.split(sizes), g.split(sizes), *states, strict=True)
    ]
    return tuple(torch.cat([result[k] for result in results]) for k in (0, 2, 4))


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)

    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        m = [encode(t, signed=True) for t in normal(g, n, dtype=dtype, scale=0.1).split(sizes)]
        v = [encode(t.square(), signed=False) for t in normal(g, n, dtype=dtype, scale=0.1).split(sizes)]
        states = [[t[k] for t in moments] for moments in (m, v) for k in (0, 1)]
        p, grad = normal(g, n, dtype=dtype), normal(g, n, dtype=dtype, scale=0.1)
        return {"p": p, "g": grad, "states": states, "sizes": sizes, **numbers}

    return Case(f"{sizes} {numbers}", make, ())


CASES = [
    _case([1], step=1, lr=1e-3),
    _case([0], step=1, lr=1e-3),
    _case([3, 0, 17, 256, 257], step=7, lr=1e-2, weight_decay=0.1),
    _case([16640, 5, 1025], step=1000, lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, grad_scale=0.25),
]
