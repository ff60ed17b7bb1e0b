"""Packed attention by csrc/attention/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels import cuda
from leantune_kernels.attention import c_interface
from leantune_kernels.cuda import lib, stream

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


def forward(q, *rest, **options):  # type: ignore[no-untyped-def]
    with stream(q) as s:
        return c_interface.forward(lambda *given: lib.attention_forward(*given, q.shape[0], s), q, *rest, **options)


def backward(do, q, *rest, **options):  # type: ignore[no-untyped-def]
    delta = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    with stream(q) as s:
        return c_interface.backward(
            lambda *given: lib.attention_backward(*given, delta.data_ptr(), q.shape[0], s), do, q, *rest, **options
        )
