"""Inputs of lora_linear: one row, odd ranks and sizes, no bias, no rows, and a layer of SmolLM2-135M."""

from __future__ import annotations

import torch

from leantune_kernels.low_rank import lora_linear as function
from leantune_kernels.low_rank.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


def _case(rows: int, inputs: int, outputs: int, rank: int, bias: bool = True) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "x": normal(g, rows, inputs, dtype=dtype),
            "weight": normal(g, outputs, inputs, dtype=dtype, scale=inputs**-0.5),
            "bias": normal(g, outputs, dtype=dtype) if bias else None,
            "A": normal(g, rank, inputs, dtype=torch.float32, scale=inputs**-0.5),
            "B": normal(g, outputs, rank, dtype=torch.float32, scale=rank**-0.5),
            "scale": 2.0,
        }

    wanted = ("x", "weight", *(("bias",) if bias else ()), "A", "B")
    return Case(f"{rows}x{inputs}x{outputs} rank {rank}", make, wanted)


CASES = [
    _case(1, 5, 3, 1),
    _case(0, 8, 8, 4),
    _case(7, 33, 50, 5),
    _case(33, 48, 17, 8, bias=False),
    _case(130, 576, 192, 16, bias=False),
    _case(61, 100, 130, 65, bias=False),
]
