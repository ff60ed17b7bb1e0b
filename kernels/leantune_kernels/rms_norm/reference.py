"""RMSNorm in plain PyTorch: `plain` is the formula in its inputs' dtype, forward and backward are fp32 inside."""

from __future__ import annotations

import torch


def plain(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y, or (y, x + residual) with a residual."""
    s = x if residual is None else x + residual
    y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, s)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(x, weight, eps, out=None, residual=None, summed=None):  # type: ignore[no-untyped-def]
    if residual is not None:
        x = summed.copy_(x.float() + residual.float())
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    y = (x.float() * rstd[:, None] * weight.float()).to(x.dtype)
    return (y if out is None else out.copy_(y)), rstd


def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):  # type: ignore[no-untyped-def]
    normed = x.float() * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (dy.float() * normed).sum(0) if need_dweight else None
    if residual is not None:
        dx = dx + residual.float()
    dx = dx.to(x.dtype)
    return (dx if out is None else out.copy_(dx)), dweight
