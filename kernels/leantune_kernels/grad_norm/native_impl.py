"""Gradient norm by csrc/grad_norm/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import lib, refuses
from leantune_kernels.tensor_list import grad_rows

__all__ = ["refuses", "scale", "sum_of_squares"]


def sum_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    rows = grad_rows(grads)
    result = torch.empty((), dtype=torch.float64)
    lib.sum_of_squares(rows.data_ptr(), len(rows), result.data_ptr())
    return result


def scale(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    rows = grad_rows(grads)
    lib.scale(rows.data_ptr(), len(rows), factor.data_ptr())
