"""Inputs of grad_norm: a flat set of numbers, cut into tensors of the given sizes; the norm, and the clipped copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.grad_norm import clip_grad_norm_
from leantune_kernels.grad_norm.reference import plain as norm_of
from leantune_kernels.optimizer_cases import SIZES, cut
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "TRAFFIC", "contenders", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True
Tensor = torch.Tensor


def function(x: Tensor, sizes: list[int], max_norm: float) -> tuple[Tensor, Tensor]:
    parts = cut(x, sizes)
    norm = clip_grad_norm_(parts, max_norm)
    return norm, torch.cat(parts)


def plain(x: Tensor, sizes: list[int], max_norm: float) -> tuple[Tensor, Tensor]:
    norm = norm_of(x, sizes)
    return norm, x * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _case(sizes: list[int], max_norm: float, scale: float = 1.0) -> Case:
    return Case(
        f"{len(sizes)} tensors, {sum(sizes)} elements, scale {scale}, max_norm {max_norm}",
        lambda g, dtype: {"x": normal(g, sum(sizes), dtype=dtype, scale=scale), "sizes": sizes, "max_norm": max_norm},
        (),
    )


CASES = [
    _case([1], 0.1),
    _case([0], 1.0),
    _case([3, 0, 17, 64], 100.0),
    _case([30000, 5, 8192, 8193], 0.5, scale=1e-2),
]
TRAFFIC = _case([40000, 1000], 1.0)
BENCHMARKS = {name: _case(sizes, 1.0) for name, sizes in SIZES.items()}


def of_length(n: int) -> Case:
    return _case([n], 0.1)


def floor(x: Tensor, **_: Any) -> Floor:
    """Gradients are read for the norm, then read and written for the scaling."""
    return Floor(forward_bytes=3 * x.numel() * x.element_size())


def contenders(x: Tensor, sizes: list[int], max_norm: float) -> dict[str, Callable[[], Any]]:
    """The norm and the scaling by it, which takes place each time: what is allowed shrinks from call to call."""
    ours, theirs = cut(x.clone(), sizes), [torch.nn.Parameter(part) for part in cut(x, sizes)]
    for parameter in theirs:
        parameter.grad = parameter.detach().clone()
    limits = {name: (max_norm * 0.99**k for k in itertools.count()) for name in ("leantune", "torch")}
    return {
        "leantune": lambda: clip_grad_norm_(ours, next(limits["leantune"])),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(theirs, next(limits["torch"])),
    }
