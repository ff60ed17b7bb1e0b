"""LayerNorm in plain PyTorch: `plain` is the formula in its inputs' dtype, forward and backward are fp32 inside."""

from __future__ import annotations

import torch


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y, or (y, x + residual) with a residual."""
    s = x if residual is None else x + residual
    centred = s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, s)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(x, weight, bias, eps, out=None, residual=None, summed=None):  # type: ignore[no-untyped-def]
    if residual is not None:
        x = summed.copy_(x.float() + residual.float())
    mean = x.float().mean(-1)
    centred = x.float() - mean[:, None]
    rstd = torch.rsqrt(centred.pow(2).mean(-1) + eps)
    y = centred * rstd[:, None] * weight.float()
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return (y if out is None else out.copy_(y)), mean, rstd


def backward(  # type: ignore[no-untyped-def]
    dy, x, weight, mean, rstd, residual=None, out=None, need_dweight=False, need_dbias=False
):
    normed = (x.float() - mean[:, None]) * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (dy.float() * normed).sum(0) if need_dweight else None
    dbias = dy.float().sum(0) if need_dbias else None
    if residual is not None:
        dx = dx + residual.float()
    dx = dx.to(x.dtype)
    return (dx if out is None else out.copy_(dx)), dweight, dbias
