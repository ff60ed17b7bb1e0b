"""Inputs of int8: rows shorter and longer than a vector, the product that reads the codes and the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.int8 import FUSED_ROWS, linear, quantise
from leantune_kernels.int8.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "contenders", "floor", "function", "plain"]

MEMORY_BOUND = False  # `function` quantises as well; test_quantised_weights.py holds each part against its floor


def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Quantises `weight` and multiplies by it."""
    return linear(x, quantise(weight), bias)


def _case(rows: int, inputs: int, outputs: int, bias: bool = True, differentiable: bool = True) -> Case:
    return Case(
        f"{rows}x{inputs}x{outputs}" + (" bias" if bias else ""),
        lambda g, dtype: {
            "x": normal(g, rows, inputs, dtype=dtype),
            "weight": normal(g, outputs, inputs, dtype=dtype, scale=0.05),
            "bias": normal(g, outputs, dtype=dtype) if bias else None,
        },
        () if not differentiable else ("x", "bias") if bias else ("x",),
    )


CASES = [
    _case(1, 64, 1),
    _case(0, 8, 5),
    _case(2, 131, 67),
    _case(3, 5, 3, bias=False),
    _case(FUSED_ROWS - 1, 544, 20),
    _case(FUSED_ROWS, 48, 18, bias=False),
    _case(FUSED_ROWS + 1, 192, 18),
]


BENCHMARKS = {f"{n} x 4096 x 4096": _case(n, 4096, 4096, bias=False, differentiable=False) for n in (1, 4)}


def contenders(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Callable[[], Any]]:
    """The product with the weight quantised before, and PyTorch's with the weight as it was."""
    w = quantise(weight)
    return {"leantune": lambda: linear(x, w, bias), "torch": lambda: torch.nn.functional.linear(x, weight, bias)}


def floor(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> Floor:
    """Few rows: codes, scales and x to y."""
    moved = x.nbytes + weight.numel() + 4 * weight.shape[0] + x.shape[0] * weight.shape[0] * x.element_size()
    return Floor(forward_bytes=moved, forward_flop=2 * x.shape[0] * weight.numel())
