"""The elementwise part of linear_cross_entropy by csrc/linear_cross_entropy/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream

__all__ = ["cross_entropy_rows", "distillation_rows", "refuses"]


def cross_entropy_rows(  # type: ignore[no-untyped-def]
    *, logits, targets, row_scale, scale, label_smoothing, z_loss, need_gradient
):
    losses = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    with stream(logits) as s:
        lib.cross_entropy_rows(
            logits.data_ptr(), logits.stride(0), targets.data_ptr(), address(row_scale), scale,
            label_smoothing, z_loss, need_gradient, losses.data_ptr(), logits.shape[0], logits.shape[1], s,
        )  # fmt: skip
    return losses


def distillation_rows(  # type: ignore[no-untyped-def]
    *, logits, teacher, targets, alpha, temperature, row_scale, scale, need_gradient
):
    teacher = rows(teacher)
    losses = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    with stream(logits) as s:
        lib.distillation_rows(
            logits.data_ptr(), logits.stride(0), DTYPE_CODES[teacher.dtype], teacher.data_ptr(), teacher.stride(0),
            address(targets), address(row_scale), scale, alpha, temperature, need_gradient, losses.data_ptr(),
            logits.shape[0], logits.shape[1], s,
        )  # fmt: skip
    return losses
