"""Inputs of dropout: sizes around a counter and a vector, offsets within a counter and past 32 bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.dropout import dropout as function
from leantune_kernels.dropout.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def _case(shape: tuple[int, ...], p: float, seed: int = 3, offset: int = 0) -> Case:
    return Case(
        f"{shape} p={p} seed={seed} offset={offset}",
        lambda g, dtype: {"x": normal(g, *shape, dtype=dtype), "p": p, "seed": seed, "offset": offset},
        ("x",),
    )


CASES = [
    _case((1,), 0.5),
    _case((0, 4), 0.1),
    _case((3, 17), 0.0),
    _case((7, 37), 0.1, offset=3),
    _case((33, 1025), 0.75, seed=2**64 - 1, offset=2**34 + 1),
]
TRAFFIC = _case((70, 576), 0.1)


def of_length(rows: int) -> Case:
    return _case((rows, 64), 0.1)


BENCHMARKS = {"SmolLM2-135M": _case((1600, 576), 0.1), "Llama 7B": _case((2048, 4096), 0.1)}


def _torch(x: torch.Tensor, p: float, seed: int, offset: int) -> torch.Tensor:
    return F.dropout(x, p)  # its own generator, and a mask that is kept


PEERS = {"torch": _torch}


def floor(x: torch.Tensor, **_: Any) -> Floor:
    """x to y, dy to dx; the mask is nowhere."""
    size = x.numel() * x.element_size()
    return Floor(forward_bytes=2 * size, backward_bytes=2 * size)
