"""The low-rank products in plain PyTorch: `plain` in its inputs' dtype, the others in fp32."""

from __future__ import annotations

import torch

from leantune_kernels.dropout.reference import plain as plain_dropout


def plain(x, weight, bias, A, B, scale, dropout_p=0.0, seed=0, offset=0):  # type: ignore[no-untyped-def]
    source = plain_dropout(x, dropout_p, seed, offset) if dropout_p else x
    low_rank = source @ A.to(x.dtype).t() @ B.to(x.dtype).t()
    return torch.nn.functional.linear(x, weight, bias) + scale * low_rank


def refuses(x: torch.Tensor) -> str | None:
    return None


def merge(weight, A, B, scale, out):  # type: ignore[no-untyped-def]
    out.copy_(weight.float() + scale * (B @ A))


def linear_group(x, source, layers, outs):  # type: ignore[no-untyped-def]
    """Writes each layer's output; `source` is x, or x after dropout. Returns S of each layer."""
    projected = []
    for (weight, bias, A, B, scale), out in zip(layers, outs, strict=True):
        S = source.float() @ A.t()
        y = x.float() @ weight.float().t() + scale * (S @ B.t())
        out.copy_(y if bias is None else y + bias.float())
        projected.append(S)
    return projected


def input_gradient_group(dx, dys, layers):  # type: ignore[no-untyped-def]
    """dx [T, K] = sum over the layers of dy W + scale * (dy B) A. Returns dS = dy B of each layer."""
    total, projected = torch.zeros(dx.shape, device=dx.device), []
    for (weight, _, A, B, scale), dy in zip(layers, dys, strict=True):
        dS = dy.float() @ B
        total += dy.float() @ weight.float() + scale * (dS @ A)
        projected.append(dS)
    dx.copy_(total)
    return projected


def gradients_group(x, adapters, out, accumulate, S=None, dS=None):  # type: ignore[no-untyped-def]
    for i, ((dy, A, B, scale), (dA, dB)) in enumerate(zip(adapters, out, strict=True)):
        if dA is not None:
            found = scale * (dS[i] if dS else dy.float() @ B).t() @ x.float()
            dA.copy_(dA + found if accumulate else found)
        if dB is not None:
            found = scale * dy.float().t() @ (S[i] if S else x.float() @ A.t())
            dB.copy_(dB + found if accumulate else found)


def add_(y, x, P, Q, scale):  # type: ignore[no-untyped-def]
    y.copy_(y.float() + scale * (x.float() @ P @ Q))
