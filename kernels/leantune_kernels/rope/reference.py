"""Rotary embedding in plain PyTorch: `plain` is the formula in its inputs' dtype, apply_ is fp32 inside."""

from __future__ import annotations

import torch


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    c, s = cos.to(x.dtype)[positions][:, None], sin.to(x.dtype)[positions][:, None]
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)


def refuses(x: torch.Tensor) -> str | None:
    return None


def apply_(x, cos, sin, positions, inverse):  # type: ignore[no-untyped-def]
    x.copy_(plain(x.float(), cos, -sin if inverse else sin, positions))
