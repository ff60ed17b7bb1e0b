"""The bottleneck adapter in plain PyTorch: `plain` in its input's dtype, the others in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "linear": lambda z: z,
}


def plain(x, down, up, down_bias=None, up_bias=None, scale=1.0, activation="relu"):  # type: ignore[no-untyped-def]
    down, up, down_bias, up_bias = (None if w is None else w.to(x.dtype) for w in (down, up, down_bias, up_bias))
    return x + scale * F.linear(_ACTIVATIONS[activation](F.linear(x, down, down_bias)), up, up_bias)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(x, weights, scale, activation, out):  # type: ignore[no-untyped-def]
    w = weights
    out.copy_(plain(x.float(), w.down, w.up, w.down_bias, w.up_bias, scale, activation))


def backward(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias):  # type: ignore[no-untyped-def]
    """Each gradient is written where a tensor is given for it."""
    x, dy = x.float(), dy.float()
    z = F.linear(x, weights.down, weights.down_bias)
    h = _ACTIVATIONS[activation](z)
    dz = scale * (dy @ weights.up) * _slope(activation, z)
    found = (dy + dz @ weights.down, dz.t() @ x, scale * dy.t() @ h, dz.sum(0), scale * dy.sum(0))
    for place, value in zip((dx, ddown, dup, ddown_bias, dup_bias), found, strict=True):
        if place is not None:
            place.copy_(value)


def _slope(activation: str, z: torch.Tensor) -> torch.Tensor:
    if activation == "linear":
        return torch.ones_like(z)
    if activation == "relu":
        return (z > 0).float()
    if activation == "silu":
        s = torch.sigmoid(z)
        return s + z * s * (1 - s)
    if activation == "gelu":
        return 0.5 * torch.erfc(-z * 0.5**0.5) + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
    inner = 0.7978845608028654 * (z + 0.044715 * z**3)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * z * z)
