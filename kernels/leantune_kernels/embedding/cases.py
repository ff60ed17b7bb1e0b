"""Inputs of embedding: single, repeated and absent ids, one id for all, odd widths, a padding row, other dtypes out."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.embedding import embedding as function
from leantune_kernels.embedding.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


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
