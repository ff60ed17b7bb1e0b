"""Embedding by csrc/embedding/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.cuda import DTYPE_CODES, lib, refuses, rows, stream

__all__ = ["backward", "forward", "refuses"]

PIECE = 64  # kPiece in cuda.cu


def forward(ids, weight, scale, out):  # type: ignore[no-untyped-def]
    ids, weight = ids.contiguous(), rows(weight)
    with stream(weight) as s:
        lib.embedding_forward(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), ids.data_ptr(), DTYPE_CODES[out.dtype],
            out.data_ptr(), out.stride(0), ids.shape[0], weight.shape[0], weight.shape[1], scale, s,
        )  # fmt: skip


def backward(dy, ids, dweight, scale, padding_idx, accumulate):  # type: ignore[no-untyped-def]
    dy = rows(dy)
    sorted_ids, order = torch.sort(ids, stable=True)
    pieces = -(-ids.shape[0] // PIECE)
    sums = torch.empty((2 * pieces, dweight.shape[1]), dtype=torch.float32, device=dy.device)
    with stream(dy) as s:
        lib.embedding_backward(
            DTYPE_CODES[dy.dtype], dy.data_ptr(), dy.stride(0), sorted_ids.data_ptr(), order.data_ptr(),
            DTYPE_CODES[dweight.dtype], dweight.data_ptr(), dweight.stride(0), ids.shape[0], dweight.shape[0],
            dweight.shape[1], scale, -1 if padding_idx is None else padding_idx, accumulate, sums.data_ptr(), s,
        )  # fmt: skip
