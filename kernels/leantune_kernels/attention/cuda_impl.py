"""Packed attention by csrc/attention/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels import cuda
from leantune_kernels.attention import c_interface
from leantune_kernels.cuda import lib, stream

__all__ = ["backward", "forward", "refuses"]

MOST_DIM = 256


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the kernels cannot take `x` [T, heads, head_dim], None if they can."""
    if x.shape[-1] > MOST_DIM:
        return f"head_dim={x.shape[-1]} exceeds {MOST_DIM}"
    return cuda.refuses(x)


def forward(q, *rest, **options):  # type: ignore[no-untyped-def]
    with stream(q) as s:
        return c_interface.forward(lambda *given: lib.attention_forward(*given, q.shape[0], s), q, *rest, **options)


def backward(do, q, *rest, **options):  # type: ignore[no-untyped-def]
    delta = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    with stream(q) as s:
        return c_interface.backward(
            lambda *given: lib.attention_backward(*given, delta.data_ptr(), q.shape[0], s), do, q, *rest, **options
        )
