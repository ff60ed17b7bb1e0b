"""Gradient norm by csrc/grad_norm/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.cuda import lib, refuses, stream
from leantune_kernels.tensor_list import grad_rows, pieces

__all__ = ["refuses", "scale", "sum_of_squares"]


def sum_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    cut = pieces([g.numel() for g in grads], grads[0].device)
    rows = grad_rows(grads).to(cut.device, non_blocking=True)
    sums = torch.empty(len(cut) + 1, dtype=torch.float64, device=cut.device)  # the last one is the total
    with stream(cut) as s:
        lib.sum_of_squares(
            rows.data_ptr(), cut.data_ptr(), len(cut), sums.data_ptr(), sums[-1:].data_ptr(), s
        )  # fmt: skip
    return sums[-1]


def scale(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    cut = pieces([g.numel() for g in grads], grads[0].device)
    rows = grad_rows(grads).to(cut.device, non_blocking=True)
    with stream(cut) as s:
        lib.scale(rows.data_ptr(), cut.data_ptr(), len(cut), factor.data_ptr(), s)
