"""The bottleneck adapter by csrc/bottleneck/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels import cuda
from leantune_kernels.bottleneck import ACTIVATIONS
from leantune_kernels.cuda import DTYPE_CODES, address, lib, rows, stream
from leantune_kernels.low_rank.device import chunk_rows

__all__ = ["backward", "forward", "refuses"]

SHARED = {4: 106496, 2: 92160}  # bytes that the backward kernel needs, by an element's


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the kernels cannot take `x`, None if they can."""
    return cuda.refuses(x) or cuda.lacks_shared(x, SHARED[x.element_size()])


def forward(x, weights, scale, activation, out):  # type: ignore[no-untyped-def]
    x = rows(x)
    with stream(x) as on:
        lib.bottleneck_forward(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), weights.down.data_ptr(), address(weights.down_bias),
            weights.up.data_ptr(), address(weights.up_bias), scale, ACTIVATIONS[activation],
            out.data_ptr(), out.stride(0), *x.shape, weights.down.shape[0], on,
        )  # fmt: skip


def backward(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias):  # type: ignore[no-untyped-def]
    dy, x, rank = rows(dy), rows(x), weights.down.shape[0]
    in_chunk = chunk_rows(x.shape[0])
    h, dz = torch.empty(2, x.shape[0], rank, device=x.device)
    partials = torch.empty(-(-x.shape[0] // in_chunk) * (rank * x.shape[1] + max(x.shape[1], rank)), device=x.device)
    with stream(x) as on:
        lib.bottleneck_backward(
            DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weights.down.data_ptr(),
            address(weights.down_bias), weights.up.data_ptr(), scale, ACTIVATIONS[activation],
            address(dx), 0 if dx is None else dx.stride(0), address(ddown), address(ddown_bias), address(dup),
            address(dup_bias), *x.shape, rank, h.data_ptr(), dz.data_ptr(), partials.data_ptr(), in_chunk, on,
        )  # fmt: skip
