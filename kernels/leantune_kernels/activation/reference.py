"""Activations in plain PyTorch: `plain` is PyTorch's own in its input's dtype, the others are fp32 inside."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def plain(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def refuses(x: torch.Tensor) -> str | None:
    return None


def value_and_slope(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(x) and act'(x) of an fp32 x."""
    if activation == "gelu":
        phi = 0.5 * torch.erfc(x * -math.sqrt(0.5))  # no cancellation in the negative tail
        return x * phi, phi + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "silu":
        z, slope = x, torch.ones_like(x)
    else:
        z = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)  # (1 + tanh(z / 2)) / 2 is sigmoid(z)
        slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x**2)
    sigmoid = torch.sigmoid(z)
    return x * sigmoid, sigmoid + x * sigmoid * torch.sigmoid(-z) * slope


def forward(x, activation, out=None):  # type: ignore[no-untyped-def]
    y = value_and_slope(x.float(), activation)[0].to(x.dtype)
    return y if out is None else out.copy_(y)


def backward(dy, x, activation, out=None):  # type: ignore[no-untyped-def]
    dx = (dy.float() * value_and_slope(x.float(), activation)[1]).to(x.dtype)
    return dx if out is None else out.copy_(dx)
