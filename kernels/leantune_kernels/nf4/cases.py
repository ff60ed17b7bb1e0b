"""Inputs of nf4: weights with a last block cut short, rows that no block fits, the fused product and the dense one."""

from __future__ import annotations

import torch

from leantune_kernels.nf4 import FUSED_ROWS, linear, quantise
from leantune_kernels.nf4.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, double_quant: bool) -> torch.Tensor:
    """Quantises `weight` and multiplies by it."""
    return linear(x, quantise(weight, double_quant), bias)


def _case(rows: int, inputs: int, outputs: int, double_quant: bool = True, bias: bool = True) -> Case:
    return Case(
        f"{rows}x{inputs}x{outputs}" + (" nested" if double_quant else "") + (" bias" if bias else ""),
        lambda g, dtype: {
            "x": normal(g, rows, inputs, dtype=dtype),
            "weight": normal(g, outputs, inputs, dtype=dtype, scale=0.05),
            "bias": normal(g, outputs, dtype=dtype) if bias else None,
            "double_quant": double_quant,
        },
        ("x", "bias") if bias else ("x",),
    )


CASES = [
    _case(1, 64, 1),
    _case(0, 64, 5),
    _case(2, 128, 131, double_quant=False),
    _case(3, 320, 33, bias=False),
    _case(FUSED_ROWS - 1, 576, 20),
    _case(FUSED_ROWS, 192, 18, double_quant=False, bias=False),
    _case(FUSED_ROWS + 1, 192, 18),
    _case(2, 33, 17),
    _case(19, 7, 5, double_quant=False),
]
