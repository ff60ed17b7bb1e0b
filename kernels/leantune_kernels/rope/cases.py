"""Inputs of rope: one token, partial rotation, halves that are no multiple of a vector, both pairings, q with k."""

from __future__ import annotations

import torch

from leantune_kernels.rope import rope, rope_qk
from leantune_kernels.rope.reference import plain as plain_x
from leantune_kernels.rope.reference import plain_qk
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain", "tables"]


def function(**inputs):  # type: ignore[no-untyped-def]
    return rope_qk(**inputs) if "k" in inputs else rope(**inputs)


def plain(**inputs):  # type: ignore[no-untyped-def]
    return plain_qk(**inputs) if "k" in inputs else plain_x(**inputs)


def tables(positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [positions, half] fp32 for the usual base of 10000."""
    inverse_frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse_frequency
    return angles.cos().float(), angles.sin().float()


def _case(
    tokens: int, heads: int, head_dim: int, rotary_dim: int, interleaved: bool = False, kv_heads: int = 0
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        cos, sin = tables(50, rotary_dim // 2)
        x = normal(g, tokens, heads, head_dim, dtype=dtype)
        k = {"k": normal(g, tokens, kv_heads, head_dim, dtype=dtype)} if kv_heads else {}
        positions = torch.randint(50, (tokens,), generator=g)
        return {"q" if k else "x": x, **k, "cos": cos, "sin": sin, "positions": positions, "interleaved": interleaved}

    heads_named = f"{heads}+{kv_heads}" if kv_heads else f"{heads}"
    name = f"{tokens}x{heads_named}x{head_dim} rotary {rotary_dim}{' interleaved' if interleaved else ''}"
    return Case(name, make, ("q", "k") if kv_heads else ("x",))


CASES = [
    _case(1, 1, 2, 2),
    _case(0, 2, 8, 8),
    _case(7, 3, 10, 6),
    _case(33, 2, 80, 32),
    _case(70, 9, 64, 64, kv_heads=3),
    _case(1, 1, 2, 2, interleaved=True),
    _case(7, 3, 11, 6, interleaved=True, kv_heads=1),
    _case(33, 2, 80, 48, interleaved=True),
    _case(3, 1, 1100, 1080, kv_heads=2),  # more pairs than a block of a device holds at once
]
