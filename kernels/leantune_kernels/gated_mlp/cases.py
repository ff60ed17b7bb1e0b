"""Inputs of gated_mlp: one row, no rows, odd sizes, each activation, with and without biases."""

from __future__ import annotations

import torch

from leantune_kernels.gated_mlp import gated_mlp as function
from leantune_kernels.gated_mlp.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


def _case(rows: int, size: int, wide: int, activation: str, bias: bool) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        given: Inputs = {"x": normal(g, rows, size, dtype=dtype), "activation": activation}
        for name, outputs, inputs in (("gate", wide, size), ("up", wide, size), ("down", size, wide)):
            given[name + "_weight"] = normal(g, outputs, inputs, dtype=dtype, scale=inputs**-0.5)
            given[name + "_bias"] = normal(g, outputs, dtype=dtype) if bias else None
        return given

    parts = ("weight", "bias") if bias else ("weight",)
    wanted = ("x", *(f"{name}_{part}" for name in ("gate", "up", "down") for part in parts))
    return Case(f"{rows}x{size}x{wide} {activation}" + (" bias" if bias else ""), make, wanted)


CASES = [
    _case(1, 5, 7, "silu", bias=True),
    _case(0, 8, 16, "silu", bias=False),
    _case(33, 48, 130, "silu", bias=False),
    _case(17, 33, 65, "gelu", bias=True),
    _case(40, 64, 96, "gelu_tanh", bias=False),
]
