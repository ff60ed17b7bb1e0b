"""Inputs of bottleneck: one row, no rows, rank 1, ranks that are no multiple of 8 or above 64, every activation."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.bottleneck import bottleneck as function
from leantune_kernels.bottleneck.reference import plain
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

# The backward passes for GPUs read x and dy twice: once for dx, once, a column block at a time, for the weights'
# gradients, whose partial sums would otherwise go to memory for every block of rows.
MEMORY_BOUND = False


def _case(rows: int, size: int, rank: int, activation: str, bias: bool = True, scale: float = 1.0) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "x": normal(g, rows, size, dtype=dtype),
            "down": normal(g, rank, size, dtype=torch.float32, scale=size**-0.5),
            "up": normal(g, size, rank, dtype=torch.float32, scale=rank**-0.5),
            "down_bias": normal(g, rank, dtype=torch.float32) if bias else None,
            "up_bias": normal(g, size, dtype=torch.float32) if bias else None,
            "scale": scale,
            "activation": activation,
        }

    wanted = ("x", "down", "up", *(("down_bias", "up_bias") if bias else ()))
    return Case(f"{rows}x{size} rank {rank} {activation}" + ("" if bias else " no bias"), make, wanted)


CASES = [
    _case(1, 5, 1, "relu"),
    _case(0, 16, 8, "relu"),
    _case(33, 48, 12, "gelu", scale=0.5),
    _case(70, 130, 65, "relu", bias=False),
    _case(65, 64, 16, "gelu_tanh"),
    _case(17, 100, 8, "silu", bias=False, scale=2.0),
    _case(9, 33, 130, "linear"),
    _case(300, 20, 5, "gelu"),  # several chunks of gradients
]
TRAFFIC = _case(130, 576, 16, "gelu")


def of_length(n: int) -> Case:
    return _case(n, 64, 16, "gelu")


BENCHMARKS = {
    "SmolLM2-135M, rank 64": _case(1600, 576, 64, "gelu"),
    "SmolLM2-135M, rank 16": _case(1600, 576, 16, "relu"),
    "Llama 7B, rank 64": _case(2048, 4096, 64, "silu"),
}
PEERS = {"torch": plain}


def floor(x: torch.Tensor, down: torch.Tensor, **_: Any) -> Floor:
    """x to y; dy and x to dx; the weights, and their gradients, once each."""
    size, weights = x.numel() * x.element_size(), 8 * down.numel()
    product = 2 * x.numel() * down.shape[0]
    return Floor(2 * size + weights, 3 * size + 2 * weights, 2 * product, 5 * product)
