"""The elementwise part by the C interface, which the C++ and the CUDA kernels share but for the stream at the end.

`kernel` is the function of the library; it takes what is passed to it here.
"""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, address, rows


def cross_entropy_rows(  # type: ignore[no-untyped-def]
    kernel, *, logits, targets, row_scale, scale, label_smoothing, z_loss, need_gradient
):
    losses = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    kernel(
        logits.data_ptr(), logits.stride(0), targets.data_ptr(), address(row_scale), scale,
        label_smoothing, z_loss, need_gradient, losses.data_ptr(), logits.shape[0], logits.shape[1],
    )  # fmt: skip
    return losses


def distillation_rows(  # type: ignore[no-untyped-def]
    kernel, *, logits, teacher, targets, alpha, temperature, row_scale, scale, need_gradient
):
    teacher = rows(teacher)
    losses = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    kernel(
        logits.data_ptr(), logits.stride(0), DTYPE_CODES[teacher.dtype], teacher.data_ptr(), teacher.stride(0),
        address(targets), address(row_scale), scale, alpha, temperature, need_gradient, losses.data_ptr(),
        logits.shape[0], logits.shape[1],
    )  # fmt: skip
    return losses
