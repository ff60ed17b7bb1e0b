"""Inputs of rms_norm for tests and benchmarks: one row, odd sizes, no multiple of a vector, the models' own shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.rms_norm import add_rms_norm, rms_norm
from leantune_kernels.rms_norm.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def function(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The public function of a case: add_rms_norm where there is a residual."""
    return rms_norm(x, weight, eps) if residual is None else add_rms_norm(x, residual, weight, eps)


def _case(rows: int, cols: int, scale: float = 1.0, residual: bool = False) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        inputs = {
            "x": normal(g, rows, cols, dtype=dtype, scale=scale),
            "weight": normal(g, cols, dtype=dtype) + 1,
            "eps": 1e-5,
        }
        return inputs | ({"residual": normal(g, rows, cols, dtype=dtype)} if residual else {})

    notes = f" scale {scale}" * (scale != 1.0) + " residual" * residual
    return Case(f"{rows}x{cols}{notes}", make, ("x", "weight", *["residual"] * residual))


CASES = [
    *(_case(rows, cols) for rows, cols in [(1, 5), (0, 8), (3, 17), (70, 576), (513, 33)]),
    _case(9, 1030),  # longer than what the CUDA kernels hold in registers
    _case(2100, 8),  # more rows than the CUDA kernels have blocks
    _case(5, 64, scale=1e-3),
    _case(9, 17, residual=True),
    _case(6, 4100, residual=True),
]
TRAFFIC = _case(256, 576)


def of_length(rows: int) -> Case:
    return _case(rows, 64)


BENCHMARKS = {"SmolLM2-135M": _case(1600, 576), "Llama 7B": _case(2048, 4096)}
BENCHMARKS["Llama 7B, residual"] = _case(2048, 4096, residual=True)


def _torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, eps)
    return y if residual is None else (y, s)


PEERS = {"torch": _torch}


def floor(x: torch.Tensor, residual: torch.Tensor | None = None, **_: Any) -> Floor:
    """x to y; dy and x to dx. With a residual also it to s, and the gradient of s."""
    size, added = x.numel() * x.element_size(), residual is not None
    return Floor(forward_bytes=(4 if added else 2) * size, backward_bytes=(4 if added else 3) * size)
