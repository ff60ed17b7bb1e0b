"""The low-rank products in plain PyTorch: `plain` in its inputs' dtype, the others in fp32."""

from __future__ import annotations

import torch


def plain(x, weight, bias, A, B, scale):  # type: ignore[no-untyped-def]
    low_rank = x @ A.to(x.dtype).t() @ B.to(x.dtype).t()
    return torch.nn.functional.linear(x, weight, bias) + scale * low_rank


def refuses(x: torch.Tensor) -> str | None:
    return None


def merge(weight, A, B, scale, out):  # type: ignore[no-untyped-def]
    out.copy_(weight.float() + scale * (B @ A))


def gradients_group(x, adapters, out, accumulate):  # type: ignore[no-untyped-def]
    for (dy, A, B, scale), (dA, dB) in zip(adapters, out, strict=True):
        if not accumulate:
            dA.zero_()
            dB.zero_()
        dA += scale * (dy.float() @ B).t() @ x.float()
        dB += scale * dy.float().t() @ (x.float() @ A.t())


def add_(y, x, P, Q, scale):  # type: ignore[no-untyped-def]
    y.copy_(y.float() + scale * (x.float() @ P @ Q))
