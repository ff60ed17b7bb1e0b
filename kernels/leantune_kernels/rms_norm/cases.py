"""Inputs of rms_norm for tests and benchmarks: one row, odd sizes, no multiple of a vector, the models' own shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.rms_norm import rms_norm as function
from leantune_kernels.rms_norm.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def _case(rows: int, cols: int, scale: float = 1.0) -> Case:
    return Case(
        f"{rows}x{cols}" + (f" scale {scale}" if scale != 1.0 else ""),
        lambda g, dtype: {
            "x": normal(g, rows, cols, dtype=dtype, scale=scale),
            "weight": normal(g, cols, dtype=dtype) + 1,
            "eps": 1e-5,
        },
        ("x", "weight"),
    )


CASES = [_case(1, 5), _case(0, 8), _case(3, 17), _case(70, 576), _case(513, 33), _case(5, 64, scale=1e-3)]
TRAFFIC = _case(256, 576)


def of_length(rows: int) -> Case:
    return _case(rows, 64)


BENCHMARKS = {"SmolLM2-135M": _case(1600, 576), "Llama 7B": _case(2048, 4096)}


def _torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


PEERS = {"torch": _torch}


def floor(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> Floor:
    """x to y; dy and x to dx. The backward pass of the weight reads them again only where they no longer fit."""
    size = x.numel() * x.element_size()
    return Floor(forward_bytes=2 * size, backward_bytes=3 * size)
