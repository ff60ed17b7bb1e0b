"""Inputs of rmsprop: flat tensors, cut into tensors of the given sizes; copies are updated and returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.optimizer_cases import FACTOR, SIZES, bytes_of_parameters, cut, masters, torch_step
from leantune_kernels.rmsprop import RMSpropTable, rmsprop_step
from leantune_kernels.rmsprop.reference import plain as plain_step
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


def function(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None, a: Tensor | None, sizes: list[int], **numbers: Any
) -> tuple[Tensor, ...]:
    params, grads, squares, buffers, means = (cut(t, sizes) for t in (p, g, v, b, a))
    rmsprop_step(params, grads, squares, buffers or None, means or None, masters=masters(params), **numbers)
    return tuple(torch.cat(ts) for ts in (params, squares, buffers, means) if ts)


def plain(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None, a: Tensor | None, sizes: list[int], **numbers: Any
) -> tuple[Tensor, ...]:
    new_p, *states = plain_step(p, g, v, b, a, **numbers)
    return new_p.to(p.dtype), *(t for t in states if t is not None)


def _case(sizes: list[int], centered: bool = False, **numbers: Any) -> Case:
    n = sum(sizes)

    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        mean = normal(g, n, dtype=torch.float32, scale=0.1)
        spread = normal(g, n, dtype=torch.float32, scale=0.1)
        return {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype, scale=0.1),
            "v": mean.square() + spread.square() + 1e-3,  # above the mean's square
            "b": normal(g, n, dtype=torch.float32) if numbers.get("momentum") else None,
            "a": mean if centered else None,
            "sizes": sizes,
            **numbers,
        }

    return Case(f"{len(sizes)} tensors, {n} elements, {'centered, ' if centered else ''}{numbers}", make, ())


CASES = [
    _case([1], step=1, lr=1e-2),
    _case([0], step=1, lr=1e-2),
    _case([3, 0, 17, 64], step=1, lr=1e-2, momentum=0.9, weight_decay=0.1),
    _case([5, 2049], step=7, lr=1e-2, centered=True, weight_decay=0.1, grad_scale=0.25),
    _case([16385, 5, 8192], step=2, lr=1e-2, centered=True, momentum=0.9, alpha=0.9, eps=1e-6),
]
TRAFFIC = _case([40000, 1000], step=2, lr=1e-2, centered=True, momentum=0.9)
BENCHMARKS = {name: _case(sizes, step=2, lr=1e-3, momentum=0.9, weight_decay=0.1) for name, sizes in SIZES.items()}


def of_length(n: int) -> Case:
    return _case([n], step=n, lr=1e-2)


def floor(p: Tensor, g: Tensor, b: Tensor | None, a: Tensor | None, **_: Any) -> Floor:
    """20 bytes a parameter in fp32, and 8 for each of momentum and centering."""
    states = 1 + (b is not None) + (a is not None)
    return Floor(forward_bytes=bytes_of_parameters(p, g) + 8 * states * p.numel())


def contenders(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None, a: Tensor | None, sizes: list[int], **numbers: Any
) -> dict[str, Callable[[], Any]]:
    params, grads, squares, buffers, means = (cut(t, sizes) for t in (p, g, v, b, a))
    table = RMSpropTable(params, squares, buffers or None, means or None)
    options = {k: numbers[k] for k in ("lr", "momentum", "weight_decay")}
    return {
        "leantune": lambda: table.step(grads, **numbers),
        "torch foreach": torch_step(params, grads, lambda ts: torch.optim.RMSprop(ts, foreach=True, **options)),
    }
