"""Inputs of dropout: sizes around a counter and a vector, offsets within a counter and past 32 bits."""

from __future__ import annotations

from leantune_kernels.dropout import dropout as function
from leantune_kernels.dropout.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def _case(shape: tuple[int, ...], p: float, seed: int = 3, offset: int = 0) -> Case:
    return Case(
        f"{shape} p={p} seed={seed} offset={offset}",
        lambda g, dtype: {"x": normal(g, *shape, dtype=dtype), "p": p, "seed": seed, "offset": offset},
        ("x",),
    )


CASES = [
    _case((1,), 0.5),
    _case((0, 4), 0.1),
    _case((3, 17), 0.0),
    _case((7, 37), 0.1, offset=3),
    _case((33, 1025), 0.75, seed=2**64 - 1, offset=2**34 + 1),
]
