"""Inputs of linear_cross_entropy: odd sizes, several chunks, ignored rows (some, all), every option."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.linear_cross_entropy import linear_cross_entropy as function
from leantune_kernels.linear_cross_entropy.reference import plain
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


def _case(rows: int, cols: int, vocab: int, ignored: float = 0.3, bias: bool = False, **options: Any) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        targets = torch.randint(vocab, (rows,), generator=g)
        targets[torch.rand(rows, generator=g) < ignored] = options.get("ignore_index", -100)
        inputs: Inputs = {
            "hidden": normal(g, rows, cols, dtype=dtype),
            "weight": normal(g, vocab, cols, dtype=dtype, scale=2 * cols**-0.5),
            "targets": targets,
            **options,
        }
        return inputs | ({"bias": normal(g, vocab, dtype=dtype)} if bias else {})

    described = "".join(f" {k}={v}" for k, v in options.items())
    name = f"{rows}x{cols}x{vocab} ignored {ignored}{' bias' if bias else ''}{described}"
    return Case(name, make, ("hidden", "weight", "bias") if bias else ("hidden", "weight"))


CASES = [
    _case(1, 5, 3, ignored=0.0),
    _case(37, 24, 133, chunk_rows=8),
    _case(37, 24, 133, chunk_rows=8, reduction="none"),
    _case(30, 16, 133, bias=True, label_smoothing=0.1, z_loss=1e-2, chunk_rows=16),
    _case(30, 16, 77, bias=True, label_smoothing=0.1, z_loss=1e-2, chunk_rows=7, reduction="none"),
    _case(19, 33, 65, ignore_index=3, reduction="sum"),
    _case(5, 8, 40, ignored=1.1),
    _case(5, 8, 40, ignored=1.1, reduction="none"),
    _case(0, 8, 40),
]
