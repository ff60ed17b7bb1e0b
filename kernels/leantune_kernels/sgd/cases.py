"""Inputs of sgd: flat tensors, cut into tensors of the given sizes; copies are updated and returned."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.sgd import sgd_step
from leantune_kernels.sgd.reference import plain as plain_step
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "DTYPES", "function", "plain"]

DTYPES = (torch.float32,)  # of the parameters; bfloat16 ones are in tests/kernels/test_optimizers.py
Tensor = torch.Tensor


def function(p: Tensor, g: Tensor, b: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    params, grads, buffers = ([part.clone() for part in t.split(sizes)] for t in (p, g, b))
    sgd_step(params, grads, buffers, **numbers)
    return torch.cat(params), torch.cat(buffers)


def plain(p: Tensor, g: Tensor, b: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = plain_step(p, g, b, **numbers)
    return result


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)
    return Case(
        f"{sizes} {numbers}",
        lambda g, dtype: {name: normal(g, n, dtype=dtype) for name in "pgb"} | {"sizes": sizes, **numbers},
        (),
    )


CASES = [
    _case([1], step=1, lr=1e-2),
    _case([0], step=1, lr=1e-2),
    _case([3, 0, 17, 64], step=1, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    _case([5, 2049], step=7, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1, grad_scale=0.25),
    _case([16385, 5, 8192], step=2, lr=1e-2, momentum=0.9, nesterov=True),
]
