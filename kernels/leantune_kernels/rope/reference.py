"""Rotary embedding in plain PyTorch: `plain` is the formula in its inputs' dtype, apply_ is fp32 inside."""

from __future__ import annotations

import torch


def plain(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    c, s = cos.to(x.dtype)[positions][:, None], sin.to(x.dtype)[positions][:, None]
    half = cos.shape[1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        return torch.cat((torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2), rest), dim=-1)
    a, b = rotated[..., :half], rotated[..., half:]
    return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)


def plain_qk(  # type: ignore[no-untyped-def]
    q, k, cos, sin, positions, interleaved=False
) -> tuple[torch.Tensor, torch.Tensor]:
    return plain(q, cos, sin, positions, interleaved), plain(k, cos, sin, positions, interleaved)


def refuses(x: torch.Tensor) -> str | None:
    return None


def apply_(x, k, cos, sin, positions, inverse, interleaved):  # type: ignore[no-untyped-def]
    for heads in (x,) if k is None else (x, k):
        heads.copy_(plain(heads.float(), cos, -sin if inverse else sin, positions, interleaved))
