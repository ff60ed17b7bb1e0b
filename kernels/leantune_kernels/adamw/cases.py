"""Inputs of adamw: flat tensors, cut into tensors of the given sizes; copies are updated and returned.

The moments are fp32 whatever the parameters; bfloat16 parameters are rounded stochastically, float16 ones have masters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.adamw import AdamWTable, adamw_step
from leantune_kernels.adamw.reference import plain as plain_step
from leantune_kernels.optimizer_cases import FACTOR, SIZES, bytes_of_parameters, cut, masters, torch_step
from leantune_kernels.testing import Case, Floor, normal

__all__ = [
    "BENCHMARKS",
    "CASES",
    "FACTOR",
    "MEMORY_BOUND",
    "TRAFFIC",
    "contenders",
    "floor",
    "function",
    "of_length",
    "plain",
]

MEMORY_BOUND = True
Tensor = torch.Tensor


def function(p: Tensor, g: Tensor, m: Tensor, v: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    params, grads, ms, vs = (cut(t, sizes) for t in (p, g, m, v))
    adamw_step(params, grads, ms, vs, masters=masters(params), **numbers)
    return torch.cat(params), torch.cat(ms), torch.cat(vs)


def plain(p: Tensor, g: Tensor, m: Tensor, v: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    new_p, m, v = plain_step(p, g, m, v, **numbers)
    return new_p.to(p.dtype), m, v


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)
    return Case(
        f"{len(sizes)} tensors, {n} elements, {numbers}",
        lambda g, dtype: {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype, scale=0.1),
            "m": normal(g, n, dtype=torch.float32, scale=0.1),
            "v": normal(g, n, dtype=torch.float32, scale=0.1).square(),
            "sizes": sizes,
            **numbers,
        },
        (),
    )


CASES = [
    _case([1], step=1, lr=1e-3),
    _case([0], step=1, lr=1e-3),
    _case([3, 0, 17, 64, 1025], step=7, lr=1e-2, weight_decay=0.1),
    _case([16385, 5, 8192, 2047], step=1000, lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, grad_scale=0.25),
]
TRAFFIC = _case([40000, 1000], step=2, lr=1e-3, weight_decay=0.1)
BENCHMARKS = {name: _case(sizes, step=2, lr=1e-3, weight_decay=0.1) for name, sizes in SIZES.items()}


def of_length(n: int) -> Case:
    return _case([n], step=n, lr=1e-3)


def floor(p: Tensor, g: Tensor, **_: Any) -> Floor:
    """28 bytes a parameter in fp32, 22 in bf16: parameters and moments are read and written, gradients read."""
    return Floor(forward_bytes=bytes_of_parameters(p, g) + 16 * p.numel())


def contenders(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, sizes: list[int], **numbers: Any
) -> dict[str, Callable[[], Any]]:
    params, grads, ms, vs = (cut(t, sizes) for t in (p, g, m, v))
    table = AdamWTable(params, ms, vs)
    options = {"lr": numbers["lr"], "weight_decay": numbers["weight_decay"]}
    return {
        "leantune": lambda: table.step(grads, **numbers),
        "torch fused": torch_step(params, grads, lambda ts: torch.optim.AdamW(ts, fused=True, **options)),
        "torch foreach": torch_step(params, grads, lambda ts: torch.optim.AdamW(ts, foreach=True, **options)),
    }
