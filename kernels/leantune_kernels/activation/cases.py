"""Inputs of the activations: one row, odd sizes, an empty one, values far into both tails, other numbers of dims."""

from __future__ import annotations

import torch

from leantune_kernels.activation import gelu, silu
from leantune_kernels.activation.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def function(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The public function that `activation` names."""
    if activation == "silu":
        return silu(x)
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _case(activation: str, *shape: int, scale: float = 1.0) -> Case:
    return Case(
        f"{activation} {'x'.join(map(str, shape))}" + (f" scale {scale}" if scale != 1.0 else ""),
        lambda g, dtype: {"x": normal(g, *shape, dtype=dtype, scale=scale), "activation": activation},
        ("x",),
    )


CASES = [
    _case("silu", 1, 5),
    _case("gelu", 7, 17),
    _case("gelu_tanh", 3, 2, 33),
    _case("gelu", 0, 8),
    _case("gelu", 6001),
    _case("gelu_tanh", 33, 576),
    *(_case(activation, 9, 64, scale=30.0) for activation in ("silu", "gelu", "gelu_tanh")),
]
