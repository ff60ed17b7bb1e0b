"""Embedding in plain PyTorch: `plain` is PyTorch's own, forward and backward are fp32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def plain(ids, weight, scale=1.0, padding_idx=None, dtype=None):  # type: ignore[no-untyped-def]
    y = F.embedding(ids, weight, padding_idx) * scale
    return y if dtype is None or weight.dtype == torch.float64 else y.to(dtype)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(ids, weight, scale, out):  # type: ignore[no-untyped-def]
    out.copy_(weight.index_select(0, ids).float() * scale)


def backward(dy, ids, dweight, scale, padding_idx, accumulate):  # type: ignore[no-untyped-def]
    """Row after row in a sorted order: index_put_ with accumulate sums equal ids in the order of the tokens."""
    kept = ids != (-1 if padding_idx is None else padding_idx)
    sums = torch.zeros(dweight.shape, dtype=torch.float32, device=dy.device)
    sums.index_put_((ids[kept],), dy[kept].float(), accumulate=True)
    sums *= scale
    if accumulate:
        touched = ids[kept].unique()
        dweight[touched] = (dweight[touched].float() + sums[touched]).to(dweight.dtype)
    else:
        dweight.copy_(sums)
