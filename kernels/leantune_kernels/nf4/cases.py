"""Inputs of nf4: weights with a last block cut short, rows that no block fits, the fused product and the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.nf4 import FUSED_ROWS, linear, quantise
from leantune_kernels.nf4.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "contenders", "floor", "function", "plain"]

MEMORY_BOUND = False  # `function` quantises as well; test_quantised_weights.py holds each part against its floor


def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, double_quant: bool) -> torch.Tensor:
    """Quantises `weight` and multiplies by it."""
    return linear(x, quantise(weight, double_quant), bias)


def _case(
    rows: int, inputs: int, outputs: int, double_quant: bool = True, bias: bool = True, differentiable: bool = True
) -> Case:
    return Case(
        f"{rows}x{inputs}x{outputs}" + (" nested" if double_quant else "") + (" bias" if bias else ""),
        lambda g, dtype: {
            "x": normal(g, rows, inputs, dtype=dtype),
            "weight": normal(g, outputs, inputs, dtype=dtype, scale=0.05),
            "bias": normal(g, outputs, dtype=dtype) if bias else None,
            "double_quant": double_quant,
        },
        () if not differentiable else ("x", "bias") if bias else ("x",),
    )


CASES = [
    _case(1, 64, 1),
    _case(0, 64, 5),
    _case(2, 128, 131, double_quant=False),
    _case(3, 320, 33, bias=False),
    _case(2, 192, 100),  # more than one group of 256 nested scales
    _case(FUSED_ROWS - 1, 576, 20),
    _case(FUSED_ROWS, 192, 18, double_quant=False, bias=False),
    _case(FUSED_ROWS + 1, 192, 18),
    _case(2, 33, 17),
    _case(19, 7, 5, double_quant=False),
]


BENCHMARKS = {f"{n} x 4096 x 4096": _case(n, 4096, 4096, bias=False, differentiable=False) for n in (1, 4)}


def contenders(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, double_quant: bool
) -> dict[str, Callable[[], Any]]:
    """The product with the weight quantised before, and PyTorch's with the weight as it was."""
    w = quantise(weight, double_quant)
    return {"leantune": lambda: linear(x, w, bias), "torch": lambda: torch.nn.functional.linear(x, weight, bias)}


def floor(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> Floor:
    """Few rows: codes, 8-bit absmax and x to y."""
    codes = weight.numel() // 2 + weight.numel() // 64 + weight.numel() // 4096
    moved = x.nbytes + codes + x.shape[0] * weight.shape[0] * x.element_size()
    return Floor(forward_bytes=moved, forward_flop=2 * x.shape[0] * weight.numel())
