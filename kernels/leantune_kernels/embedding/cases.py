"""Inputs of embedding: single, repeated and absent ids, one id for all, odd widths, a padding row, other dtypes out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from leantune_kernels.embedding import embedding as function
from leantune_kernels.embedding.reference import plain
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def _case(shape: tuple[int, ...], vocabulary: int, cols: int, distinct: int = 0, **options: Any) -> Case:
    """`distinct` ids at most, 0 for the whole vocabulary."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        ids = torch.randint(distinct or vocabulary, shape, generator=g)
        return {"ids": ids, "weight": normal(g, vocabulary, cols, dtype=dtype), **options}

    described = "".join(f" {k}={v}" for k, v in options.items())
    ids = "x".join(map(str, shape))
    return Case(f"{ids} of {vocabulary}x{cols}{f' among {distinct}' if distinct else ''}{described}", make, ("weight",))


CASES = [
    _case((1,), 3, 5),
    _case((0,), 4, 8),
    _case((3, 7), 50, 17, scale=2.5),
    _case((300,), 9, 33),  # every id many times, segments across pieces
    _case((200,), 40, 64, distinct=1, scale=0.5),  # one segment over several pieces
    _case((130,), 1000, 24, padding_idx=0),
    _case((150,), 5, 40, distinct=2, padding_idx=1),
    _case((40,), 64, 256, dtype=torch.float32),
]
TRAFFIC = _case((200,), 4000, 64)  # many more rows than tokens, as in a vocabulary


def of_length(tokens: int) -> Case:
    return _case((64 + tokens,), 50, 64)  # more than a piece, so that all kernels run


BENCHMARKS = {"SmolLM2-135M": _case((1600,), 49152, 576), "Llama 7B": _case((2048,), 32000, 4096)}


def _torch(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, weight)


PEERS = {"torch": _torch}


def floor(ids: torch.Tensor, weight: torch.Tensor, **_: Any) -> Floor:
    """The rows that are looked up, read and written; dy read and the whole gradient of the table written."""
    rows, size = ids.numel() * weight.shape[1], weight.element_size()
    return Floor(forward_bytes=2 * rows * size, backward_bytes=(rows + weight.numel()) * size)
