"""Embedding by csrc/embedding/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses, rows
from leantune_kernels.embedding import check_ids

__all__ = ["backward", "forward", "refuses"]


def forward(ids, weight, scale, out):  # type: ignore[no-untyped-def]
    ids, weight = ids.contiguous(), rows(weight)
    try:
        lib.embedding_forward(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), ids.data_ptr(), DTYPE_CODES[out.dtype],
            out.data_ptr(), out.stride(0), ids.shape[0], weight.shape[0], weight.shape[1], scale,
        )  # fmt: skip
    except RuntimeError:
        check_ids(ids, weight.shape[0])  # the same complaint, worded alike for all implementations
        raise


def backward(dy, ids, dweight, scale, padding_idx, accumulate):  # type: ignore[no-untyped-def]
    dy = rows(dy)
    sorted_ids, order = torch.sort(ids, stable=True)
    lib.embedding_backward(
        DTYPE_CODES[dy.dtype], dy.data_ptr(), dy.stride(0), sorted_ids.data_ptr(), order.data_ptr(),
        DTYPE_CODES[dweight.dtype], dweight.data_ptr(), dweight.stride(0), ids.shape[0], dweight.shape[0],
        dweight.shape[1], scale, -1 if padding_idx is None else padding_idx, accumulate,
    )  # fmt: skip
