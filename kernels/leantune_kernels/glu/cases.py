"""Inputs of the gated activations: one row, odd sizes, values far into both tails, the model's own width."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.glu import geglu, swiglu
from leantune_kernels.glu.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "PEERS", "TRAFFIC", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def function(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The public function that `activation` names."""
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def _case(activation: str, rows: int, cols: int, scale: float = 1.0) -> Case:
    return Case(
        f"{activation} {rows}x{cols}" + (f" scale {scale}" if scale != 1.0 else ""),
        lambda g, dtype: {
            "gate": normal(g, rows, cols, dtype=dtype, scale=scale),
            "up": normal(g, rows, cols, dtype=dtype),
            "activation": activation,
        },
        ("gate", "up"),
    )


CASES = [
    _case("silu", 1, 5),
    _case("gelu", 0, 8),
    _case("gelu", 7, 17),
    _case("gelu_tanh", 70, 33),
    _case("silu", 33, 1536),
    *(_case(activation, 9, 64, scale=30.0) for activation in ("silu", "gelu", "gelu_tanh")),
]
TRAFFIC = _case("silu", 33, 1536)


def of_length(rows: int) -> Case:
    return _case("silu", rows, 64)


BENCHMARKS = {
    f"{name}, {activation}": _case(activation, *shape)
    for name, shape in {"SmolLM2-135M": (1600, 1536), "Llama 7B": (2048, 11008)}.items()
    for activation in ("silu", "gelu", "gelu_tanh")
}
PEERS = {"torch": plain}


def floor(gate: torch.Tensor, **_: Any) -> Floor:
    """gate and up to h; dh, gate and up to d_gate and d_up."""
    size = gate.numel() * gate.element_size()
    return Floor(forward_bytes=3 * size, backward_bytes=5 * size)
