"""Inputs of gated_mlp: one row, no rows, odd sizes, each activation, with and without biases."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.gated_mlp import gated_mlp as function
from leantune_kernels.gated_mlp.reference import plain
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = False  # three dense products


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
TRAFFIC = _case(33, 48, 130, "silu", bias=False)


def of_length(n: int) -> Case:
    return _case(n, 32, 64, "silu", bias=False)


BENCHMARKS = {
    "SmolLM2-135M": _case(1600, 576, 1536, "silu", bias=False),
    "512 x 4096 x 11008 (Llama 7B, fewer tokens)": _case(512, 4096, 11008, "silu", bias=False),
}
PEERS = {"torch": plain}


def floor(x: torch.Tensor, gate_weight: torch.Tensor, **_: Any) -> Floor:
    """Each weight, x and y once, gate and up kept; backward also every gradient."""
    b, rows, wide = x.element_size(), x.shape[0], gate_weight.shape[0]
    weights, product = 3 * b * gate_weight.numel(), 2 * rows * gate_weight.numel()
    kept = 2 * b * rows * wide
    return Floor(
        forward_bytes=2 * b * x.numel() + weights + kept,
        backward_bytes=3 * b * x.numel() + 2 * weights + kept,
        forward_flop=3 * product,
        backward_flop=6 * product,
    )
