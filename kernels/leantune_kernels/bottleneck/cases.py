"""Inputs of bottleneck: one row, no rows, rank 1, ranks that are no multiple of 8 or above 64, every activation."""

from __future__ import annotations

import torch

from leantune_kernels.bottleneck import bottleneck as function
from leantune_kernels.bottleneck.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


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
]
