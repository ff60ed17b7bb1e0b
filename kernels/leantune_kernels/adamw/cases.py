"""Inputs of adamw: flat tensors, cut into tensors of the given sizes; copies are updated and returned."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.adamw import adamw_step
from leantune_kernels.adamw.reference import plain as plain_step
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "DTYPES", "function", "plain"]

# Of the parameters and moments; gradients in half precision are in tests/kernels/test_adamw.py.
DTYPES = (torch.float32,)
Tensor = torch.Tensor


def function(p: Tensor, g: Tensor, m: Tensor, v: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    cut = [[part.clone() for part in t.split(sizes)] for t in (p, g, m, v)]
    adamw_step(*cut, **numbers)
    return tuple(torch.cat(cut[i]) for i in (0, 2, 3))


def plain(p: Tensor, g: Tensor, m: Tensor, v: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = plain_step(p, g, m, v, **numbers)
    return result


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)
    return Case(
        f"{sizes} {numbers}",
        lambda g, dtype: {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype, scale=0.1),
            "m": normal(g, n, dtype=dtype, scale=0.1),
            "v": normal(g, n, dtype=dtype, scale=0.1).square(),
            "sizes": sizes,
            **numbers,
        },
        (),
    )


CASES = [
    _case([1], step=1, lr=1e-3),
    _case([3, 0, 17, 64], step=7, lr=1e-2, weight_decay=0.1),
    _case([30000, 5, 8192, 8193], step=1000, lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, grad_scale=0.25),
]
