"""Inputs of rope: one token, partial rotation, halves that are no multiple of a vector, the model's shape."""

from __future__ import annotations

import torch

from leantune_kernels.rope import rope as function
from leantune_kernels.rope.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain", "tables"]


def tables(positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [positions, half] fp32 for the usual base of 10000."""
    inverse_frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse_frequency
    return angles.cos().float(), angles.sin().float()


def _case(tokens: int, heads: int, head_dim: int, rotary_dim: int) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        cos, sin = tables(50, rotary_dim // 2)
        x = normal(g, tokens, heads, head_dim, dtype=dtype)
        return {"x": x, "cos": cos, "sin": sin, "positions": torch.randint(50, (tokens,), generator=g)}

    return Case(f"{tokens}x{heads}x{head_dim} rotary {rotary_dim}", make, ("x",))


SIZES = [(1, 1, 2, 2), (0, 2, 8, 8), (7, 3, 10, 6), (33, 2, 80, 32), (70, 12, 64, 64)]
CASES = [_case(*size) for size in SIZES]
