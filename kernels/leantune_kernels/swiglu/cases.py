"""Inputs of swiglu: one row, odd sizes, values far into both tails of the sigmoid, the model's own width."""

from __future__ import annotations

from leantune_kernels.swiglu import swiglu as function
from leantune_kernels.swiglu.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def _case(rows: int, cols: int, scale: float = 1.0) -> Case:
    return Case(
        f"{rows}x{cols}" + (f" scale {scale}" if scale != 1.0 else ""),
        lambda g, dtype: {
            "gate": normal(g, rows, cols, dtype=dtype, scale=scale),
            "up": normal(g, rows, cols, dtype=dtype),
        },
        ("gate", "up"),
    )


CASES = [_case(1, 5), _case(0, 8), _case(7, 17), _case(33, 1536), _case(70, 33), _case(9, 64, scale=40.0)]
