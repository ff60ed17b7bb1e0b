"""Inputs of attention for tests and benchmarks: lengths around the blocks, groups of heads, both masks, windows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.attention import attention as function
from leantune_kernels.attention.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = False


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
    _case([1, 0, 17, 130], 4, 2, 64),
    _case([17, 65], 3, 1, 80, causal=False),
    _case([48, 49, 5], 2, 2, 8, window=64),  # longer than any sequence
    _case([390], 2, 1, 16),  # the C++ kernel splits the keys of so long a sequence between items of work
    _case([390, 30], 1, 1, 40, causal=False, window=100),
    _case([7, 33], 2, 1, 19, window=2),
    _case([100, 64], 2, 1, 128, window=50),
    _case([90, 1], 3, 3, 32, causal=False, window=9),
    _case([0, 0], 2, 1, 8),
]
TRAFFIC = _case([128, 70], 4, 2, 64)


def of_length(n: int) -> Case:
    return _case([n // 3, n - n // 3], 2, 1, 16, window=20)


BENCHMARKS = {
    "SmolLM2-135M": _case([200] * 8, 9, 3, 64),
    "SmolLM2-135M, one sequence": _case([1600], 9, 3, 64),
    "SmolLM2-135M, one sequence, window 256": _case([1600], 9, 3, 64, window=256),
    "Llama 7B": _case([2048], 32, 32, 128),
}


def _torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """The vendor's call a sequence; its window is a mask."""
    outputs = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        query, key, value = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        mask = None
        if window is not None:
            token = torch.arange(b - a, device=q.device)
            before = token[:, None] - token
            mask = (before.abs() < window) & ((before >= 0) | (not causal))
        o = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


PEERS = {"torch": _torch}


def floor(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, window: int | None, **_: Any
) -> Floor:
    """Each of q, k, v, o and the gradients once; two products a pair of tokens that meet, five more backward."""
    pairs = 0
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        token = torch.arange(b - a)
        reach = b - a if window is None else window
        first, end = (token - reach + 1).clamp(min=0), (token + (1 if causal else reach)).clamp(max=b - a)
        pairs += int((end - first).sum())
    product = 2 * pairs * q.shape[1] * q.shape[2]
    queries, keys = (x.numel() * x.element_size() for x in (q, k))
    lse = 4 * q.shape[0] * q.shape[1]
    return Floor(
        forward_bytes=2 * queries + 2 * keys + lse,
        backward_bytes=4 * queries + 4 * keys + lse,
        forward_flop=2 * product,
        backward_flop=5 * product,
    )
