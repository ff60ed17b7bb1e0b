"""Packed attention by csrc/attention/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels import cuda
from leantune_kernels.cuda import DTYPE_CODES, lib, rows, stream

__all__ = ["backward", "forward", "refuses"]

MOST_DIM = 256

# Bytes that the hungriest of the three kernels needs, by the head_dim that it is compiled for and an element's bytes.
SHARED = {(64, 4): 52480, (64, 2): 46080, (128, 4): 101632, (128, 2): 70144, (256, 4): 133376, (256, 2): 135168}


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the kernels cannot take `x` [T, heads, head_dim], None if they can."""
    dim = x.shape[-1]
    if dim > MOST_DIM:
        return f"head_dim={dim} exceeds {MOST_DIM}"
    compiled = next(most for most in (64, 128, 256) if dim <= most)
    return cuda.refuses(x) or cuda.lacks_shared(x, SHARED[compiled, x.element_size()])


def _view(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _result(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out


def forward(q, k, v, cu_seqlens, scale, causal, out=None, window=None):  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens = rows(q), rows(k), rows(v), cu_seqlens.contiguous()
    o = _result(out, q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    with stream(q) as s:
        lib.attention_forward(
            DTYPE_CODES[q.dtype], *_view(q), *_view(k), *_view(v), *_view(o), lse.data_ptr(),
            cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, q.shape[1], k.shape[1], q.shape[2], scale, causal,
            window or 0, q.shape[0], s,
        )  # fmt: skip
    return o, lse


def backward(  # type: ignore[no-untyped-def]
    do, q, k, v, o, lse, cu_seqlens, scale, causal, dq=None, dk=None, dv=None, window=None
):
    do, q, k, v, o = rows(do), rows(q), rows(k), rows(v), rows(o)
    lse, cu_seqlens = lse.contiguous(), cu_seqlens.contiguous()
    dq, dk, dv = _result(dq, q), _result(dk, k), _result(dv, v)
    delta = torch.empty_like(lse)
    with stream(q) as s:
        lib.attention_backward(
            DTYPE_CODES[q.dtype], *_view(do), *_view(q), *_view(k), *_view(v), *_view(o), lse.data_ptr(),
            *_view(dq), *_view(dk), *_view(dv),
            cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, q.shape[1], k.shape[1], q.shape[2], scale, causal,
            window or 0, delta.data_ptr(), q.shape[0], s,
        )  # fmt: skip
    return dq, dk, dv
