"""Gradient norm by csrc/grad_norm/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses

__all__ = ["refuses", "sum_of_squares"]


def sum_of_squares(grads: list[torch.Tensor]) -> float:
    dense = [g.contiguous() for g in grads]
    columns = [
        [g.numel() for g in dense],
        [g.data_ptr() for g in dense],
        [DTYPE_CODES[g.dtype] for g in dense],
    ]
    sizes, data, dtypes = torch.tensor(columns, dtype=torch.int64)
    result = torch.empty((), dtype=torch.float64)
    lib.sum_of_squares(len(dense), sizes.data_ptr(), data.data_ptr(), dtypes.data_ptr(), result.data_ptr())
    return result.item()
