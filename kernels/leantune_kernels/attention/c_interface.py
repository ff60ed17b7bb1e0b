"""Packed attention by the C interface, which the C++ and the CUDA kernels share but for their last arguments.

`kernel` is the function of the library; it takes what is passed to it here, and adds what it alone needs.
"""

from __future__ import annotations

import torch

from leantune_kernels.checks import out_or_new, rows
from leantune_kernels.cpu import DTYPE_CODES


def forward(  # type: ignore[no-untyped-def]
    kernel, q, k, v, cu_seqlens, scale, causal, out=None, window=None
):
    q, k, v, cu_seqlens = rows(q), rows(k), rows(v), cu_seqlens.contiguous()
    o = out_or_new(out, q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    kernel(
        DTYPE_CODES[q.dtype], *_views(q, k, v, o), lse.data_ptr(),
        cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, q.shape[1], k.shape[1], q.shape[2], scale, causal, window or 0,
    )  # fmt: skip
    return o, lse


def backward(  # type: ignore[no-untyped-def]
    kernel, do, q, k, v, o, lse, cu_seqlens, scale, causal, dq=None, dk=None, dv=None, window=None
):
    do, q, k, v, o = rows(do), rows(q), rows(k), rows(v), rows(o)
    lse, cu_seqlens = lse.contiguous(), cu_seqlens.contiguous()
    dq, dk, dv = out_or_new(dq, q), out_or_new(dk, k), out_or_new(dv, v)
    kernel(
        DTYPE_CODES[q.dtype], *_views(do, q, k, v, o), lse.data_ptr(), *_views(dq, dk, dv),
        cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, q.shape[1], k.shape[1], q.shape[2], scale, causal, window or 0,
    )  # fmt: skip
    return dq, dk, dv


def _views(*tensors: torch.Tensor) -> list[int]:
    """Address, distance between tokens and distance between heads of each."""
    return [number for x in tensors for number in (x.data_ptr(), x.stride(0), x.stride(1))]
