"""Inputs of rms_norm for tests and benchmarks: one row, odd sizes, no multiple of a vector, the model's own shape."""

from __future__ import annotations

from leantune_kernels.rms_norm import rms_norm as function
from leantune_kernels.rms_norm.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def _case(rows: int, cols: int, scale: float = 1.0) -> Case:
    return Case(
        f"{rows}x{cols}" + (f" scale {scale}" if scale != 1.0 else ""),
        lambda g, dtype: {
            "x": normal(g, rows, cols, dtype=dtype, scale=scale),
            "weight": normal(g, cols, dtype=dtype) + 1,
            "eps": 1e-5,
        },
        ("x", "weight"),
    )


CASES = [
    *(_case(rows, cols) for rows, cols in [(1, 5), (0, 8), (3, 17), (70, 576), (513, 33)]),
    _case(9, 1030),  # longer than what the CUDA kernels hold in registers
    _case(5, 64, scale=1e-3),
]
