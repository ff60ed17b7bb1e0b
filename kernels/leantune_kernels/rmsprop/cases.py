"""Inputs of rmsprop: flat tensors, cut into tensors of the given sizes; copies are updated and returned."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.rmsprop import rmsprop_step
from leantune_kernels.rmsprop.reference import plain as plain_step
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "DTYPES", "function", "plain"]

DTYPES = (torch.float32,)  # of the parameters; bfloat16 ones are in tests/kernels/test_optimizers.py
Tensor = torch.Tensor


def function(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None, a: Tensor | None, sizes: list[int], **numbers: Any
) -> tuple[Tensor, ...]:
    cut = [None if t is None else [part.clone() for part in t.split(sizes)] for t in (p, g, v, b, a)]
    params, grads, squares, buffers, means = cut
    assert params is not None and grads is not None and squares is not None
    rmsprop_step(params, grads, squares, buffers, means, **numbers)
    return tuple(torch.cat(ts) for ts in (params, squares, buffers, means) if ts is not None)


def plain(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None, a: Tensor | None, sizes: list[int], **numbers: Any
) -> tuple[Tensor, ...]:
    return tuple(t for t in plain_step(p, g, v, b, a, **numbers) if t is not None)


def _case(sizes: list[int], centered: bool = False, **numbers: Any) -> Case:
    n = sum(sizes)

    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        mean = normal(g, n, dtype=dtype, scale=0.1)
        return {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype, scale=0.1),
            "v": mean.square() + normal(g, n, dtype=dtype, scale=0.1).square() + 1e-3,  # at least the mean's square
            "b": normal(g, n, dtype=dtype) if numbers.get("momentum") else None,
            "a": mean if centered else None,
            "sizes": sizes,
            **numbers,
        }

    return Case(f"{sizes} {'centered ' if centered else ''}{numbers}", make, ())


CASES = [
    _case([1], step=1, lr=1e-2),
    _case([0], step=1, lr=1e-2),
    _case([3, 0, 17, 64], step=1, lr=1e-2, momentum=0.9, weight_decay=0.1),
    _case([5, 2049], step=7, lr=1e-2, centered=True, weight_decay=0.1, grad_scale=0.25),
    _case([16385, 5, 8192], step=2, lr=1e-2, centered=True, momentum=0.9, alpha=0.9, eps=1e-6),
]
