"""Inputs of attention for tests and benchmarks: lengths around the blocks, groups of heads, both masks, windows."""

from __future__ import annotations

import torch

from leantune_kernels.attention import attention as function
from leantune_kernels.attention.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def cumulative(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens, int32 [n + 1], of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _case(
    lengths: list[int], heads: int, kv_heads: int, dim: int, causal: bool = True, window: int | None = None
) -> Case:
    tokens = sum(lengths)
    return Case(
        f"{lengths} heads {heads}/{kv_heads} dim {dim}"
        + ("" if causal else " bidirectional")
        + (f" window {window}" if window else ""),
        lambda g, dtype: {
            "q": normal(g, tokens, heads, dim, dtype=dtype),
            "k": normal(g, tokens, kv_heads, dim, dtype=dtype),
            "v": normal(g, tokens, kv_heads, dim, dtype=dtype),
            "cu_seqlens": cumulative(lengths),
            "causal": causal,
            "window": window,
        },
        ("q", "k", "v"),
    )


CASES = [
    _case([1, 0, 17, 65, 130], 4, 2, 64),
    _case([1, 0, 17, 65, 130], 3, 1, 80, causal=False),
    _case([48, 49, 5], 2, 2, 8, window=64),  # longer than any sequence
    _case([420], 2, 1, 16),  # the C++ kernel splits the keys of so long a sequence between items of work
    _case([420, 30], 1, 1, 40, causal=False, window=100),
    _case([7, 33], 2, 1, 19, window=2),
    _case([150, 64], 2, 1, 128, window=70),
    _case([90, 1], 3, 3, 32, causal=False, window=9),
    _case([0, 0], 2, 1, 8),
]
