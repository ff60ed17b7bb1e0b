"""Inputs of sgd: flat tensors, cut into tensors of the given sizes; copies are updated and returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.optimizer_cases import FACTOR, SIZES, bytes_of_parameters, cut, masters, torch_step
from leantune_kernels.sgd import SGDTable, sgd_step
from leantune_kernels.sgd.reference import plain as plain_step
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


def function(p: Tensor, g: Tensor, b: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    params, grads, buffers = (cut(t, sizes) for t in (p, g, b))
    sgd_step(params, grads, buffers, masters=masters(params), **numbers)
    return torch.cat(params), torch.cat(buffers)


def plain(p: Tensor, g: Tensor, b: Tensor, sizes: list[int], **numbers: Any) -> tuple[Tensor, ...]:
    new_p, b = plain_step(p, g, b, **numbers)
    return new_p.to(p.dtype), b


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)
    return Case(
        f"{len(sizes)} tensors, {n} elements, {numbers}",
        lambda g, dtype: {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype),
            "b": normal(g, n, dtype=torch.float32),
            "sizes": sizes,
            **numbers,
        },
        (),
    )


CASES = [
    _case([1], step=1, lr=1e-2),
    _case([0], step=1, lr=1e-2),
    _case([3, 0, 17, 64], step=1, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    _case([5, 2049], step=7, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1, grad_scale=0.25),
    _case([16385, 5, 8192], step=2, lr=1e-2, momentum=0.9, nesterov=True),
]
TRAFFIC = _case([40000, 1000], step=2, lr=1e-2, momentum=0.9, weight_decay=0.1)
BENCHMARKS = {name: _case(sizes, step=2, lr=1e-3, momentum=0.9, weight_decay=0.1) for name, sizes in SIZES.items()}


def of_length(n: int) -> Case:
    return _case([n], step=n, lr=1e-2, momentum=0.9)


def floor(p: Tensor, g: Tensor, **_: Any) -> Floor:
    """20 bytes a parameter in fp32: parameters and momentum are read and written, gradients read."""
    return Floor(forward_bytes=bytes_of_parameters(p, g) + 8 * p.numel())


def contenders(p: Tensor, g: Tensor, b: Tensor, sizes: list[int], **numbers: Any) -> dict[str, Callable[[], Any]]:
    params, grads, buffers = (cut(t, sizes) for t in (p, g, b))
    table = SGDTable(params, buffers)
    options = {k: numbers[k] for k in ("lr", "momentum", "weight_decay")}
    return {
        "leantune": lambda: table.step(grads, **numbers),
        "torch fused": torch_step(params, grads, lambda ts: torch.optim.SGD(ts, fused=True, **options)),
        "torch foreach": torch_step(params, grads, lambda ts: torch.optim.SGD(ts, foreach=True, **options)),
    }
