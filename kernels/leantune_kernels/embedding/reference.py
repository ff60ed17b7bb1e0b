"""Embedding in plain PyTorch: `plain` is PyTorch's own, forward and backward are fp32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from leantune_kernels.embedding import check_ids


def plain(ids, weight, scale=1.0, padding_idx=None, dtype=None):  # type: ignore[no-untyped-def]
    y = F.embedding(ids, weight, padding_idx) * scale
    return y if dtype is None or weight.dtype == torch.float64 else y.to(dtype)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(ids, weight, scale, out):  # type: ignore[no-untyped-def]
    check_ids(ids, weight.shape[0])
    out.copy_(weight.index_select(0, ids).float() * scale)


def backward(dy, ids, dweight, scale, padding_idx, accumulate):  # type: ignore[no-untyped-def]
    """Sorted, each id's rows lie together: segment_reduce adds them in the order of the tokens, on every device."""
    kept = ids != (-1 if padding_idx is None else padding_idx)
    if not accumulate:
        dweight.zero_()
    sorted_ids, order = torch.sort(ids[kept], stable=True)
    if order.numel() == 0:
        return
    named, counts = sorted_ids.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(dy[kept].float()[order], "sum", lengths=counts, axis=0) * scale
    if accumulate:
        sums += dweight[named].float()
    dweight[named] = sums.to(dweight.dtype)
