"""RMSNorm by csrc/rms_norm/cuda.cu."""

from __future__ import annotations

import torch

from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream

__all__ = ["backward", "forward", "groups", "readable", "refuses"]

ROWS_PER_GROUP = 16  # kRowsPerGroup in cuda.cu


def forward(x, weight, eps, out=None, residual=None, summed=None):  # type: ignore[no-untyped-def]
    x, weight = rows(x), readable(weight, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    given = DTYPE_CODES[weight.dtype], weight.data_ptr(), y.data_ptr(), y.stride(0), rstd.data_ptr(), *x.shape, eps
    with stream(x) as s:
        if residual is None:
            lib.rms_norm_forward(DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *given, s)
        else:
            residual = rows(residual)
            lib.add_rms_norm_forward(
                DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
                summed.data_ptr(), summed.stride(0), *given, s,
            )  # fmt: skip
    return y, rstd


def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):  # type: ignore[no-untyped-def]
    dy, x, weight, rstd = rows(dy), rows(x), readable(weight, x), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    dweight = partials = None
    if need_dweight:
        dweight = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        partials = dweight.new_empty(groups(x, ROWS_PER_GROUP), x.shape[1])
    with stream(x) as s:
        lib.rms_norm_backward(
            DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
            DTYPE_CODES[weight.dtype], weight.data_ptr(), rstd.data_ptr(),
            address(residual), 0 if residual is None else residual.stride(0), dx.data_ptr(), dx.stride(0),
            address(dweight), address(partials), x.shape[0], x.shape[1], s,
        )  # fmt: skip
    return dx, dweight


def groups(x: torch.Tensor, rows_each: int) -> int:
    """Partial sums of a parameter's gradient: norm_groups in csrc/common/cuda_norm.cuh."""
    return min(1024, -(-x.shape[0] // rows_each))


def readable(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight as the kernels read it: contiguous, of x's dtype or fp32."""
    return (weight if weight.dtype == x.dtype else weight.float()).contiguous()
