"""Inputs of layer_norm: one row, odd sizes, rows with a large mean, with and without bias and residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.layer_norm import add_layer_norm, layer_norm
from leantune_kernels.layer_norm.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def function(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The public function of a case: add_layer_norm where there is a residual."""
    if residual is None:
        return layer_norm(x, weight, bias, eps)
    return add_layer_norm(x, residual, weight, bias, eps)


def _case(rows: int, cols: int, mean: float = 0.0, bias: bool = True, residual: bool = False) -> Case:
    notes = [f" mean {mean}" * (mean != 0), " no bias" * (not bias), " residual" * residual]

    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        inputs = {
            "x": (normal(g, rows, cols, dtype=torch.float32) + mean).to(dtype),
            "weight": normal(g, cols, dtype=dtype) + 1,
            "bias": normal(g, cols, dtype=dtype) if bias else None,
            "eps": 1e-5,
        }
        return inputs | ({"residual": normal(g, rows, cols, dtype=dtype)} if residual else {})

    differentiable = ["x", "weight", *["bias"] * bias, *["residual"] * residual]
    return Case(f"{rows}x{cols}" + "".join(notes), make, tuple(differentiable))


CASES = [
    _case(1, 5),
    _case(0, 8),
    _case(3, 17, bias=False),
    _case(70, 576),
    _case(130, 33, residual=True),
    _case(2100, 8),  # more rows than the CUDA kernels have blocks
    _case(5, 64, mean=100.0),
    _case(6, 4100, bias=False, residual=True),
]
TRAFFIC = _case(256, 576)


def of_length(rows: int) -> Case:
    return _case(rows, 64)


BENCHMARKS = {
    "SmolLM2-135M": _case(1600, 576),
    "Llama 7B": _case(2048, 4096),
    "Llama 7B, residual": _case(2048, 4096, residual=True),
}


def _torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    s = x if residual is None else x + residual
    y = F.layer_norm(s, weight.shape, weight, bias, eps)
    return y if residual is None else (y, s)


PEERS = {"torch": _torch}


def floor(x: torch.Tensor, residual: torch.Tensor | None = None, **_: Any) -> Floor:
    """x to y; dy and x to dx. With a residual also it to s, and the gradient of s."""
    size, added = x.numel() * x.element_size(), residual is not None
    return Floor(forward_bytes=(4 if added else 2) * size, backward_bytes=(4 if added else 3) * size)
