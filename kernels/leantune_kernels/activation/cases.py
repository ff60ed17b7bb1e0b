"""Inputs of the activations: one row, odd sizes, an empty one, values far into both tails, other numbers of dims."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.activation import gelu, silu
from leantune_kernels.activation.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


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
TRAFFIC = _case("gelu", 33, 576)


def of_length(rows: int) -> Case:
    return _case("gelu", rows, 64)


BENCHMARKS = {
    f"{name}, {activation}": _case(activation, *shape)
    for name, shape in {"SmolLM2-135M": (1600, 1536), "Llama 7B": (2048, 11008)}.items()
    for activation in ("silu", "gelu", "gelu_tanh")
}
PEERS = {"torch": plain}


def floor(x: torch.Tensor, **_: Any) -> Floor:
    """x to y; dy and x to dx."""
    size = x.numel() * x.element_size()
    return Floor(forward_bytes=2 * size, backward_bytes=3 * size)
