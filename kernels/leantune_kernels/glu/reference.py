"""Gated activations in plain PyTorch: `plain` is the formula in its inputs' dtype, the others are fp32 inside."""

from __future__ import annotations

import torch

from leantune_kernels.activation import reference as activations


def plain(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    return activations.plain(gate, activation) * up


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(gate, up, out=None, activation="silu"):  # type: ignore[no-untyped-def]
    h = (activations.value_and_slope(gate.float(), activation)[0] * up.float()).to(gate.dtype)
    return h if out is None else out.copy_(h)


def backward(dh, gate, up, activation="silu"):  # type: ignore[no-untyped-def]
    value, slope = activations.value_and_slope(gate.float(), activation)
    return (dh.float() * up.float() * slope).to(gate.dtype), (dh.float() * value).to(gate.dtype)


def backward_(dh, gate, up, activation="silu"):  # type: ignore[no-untyped-def]
    results = forward(gate, up, activation=activation), *backward(dh, gate, up, activation)
    for place, result in zip((dh, gate, up), results, strict=True):
        place.copy_(result)
