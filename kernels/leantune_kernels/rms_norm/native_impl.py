"""RMSNorm by csrc/rms_norm/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses, rows

__all__ = ["backward", "forward", "refuses"]


def forward(x, weight, eps, out=None, residual=None, summed=None):  # type: ignore[no-untyped-def]
    x, weight = rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=torch.float32)
    given = DTYPE_CODES[weight.dtype], weight.data_ptr(), y.data_ptr(), y.stride(0), rstd.data_ptr(), *x.shape, eps
    if residual is None:
        lib.rms_norm_forward(DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *given)
    else:
        residual = rows(residual)
        lib.add_rms_norm_forward(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
            summed.data_ptr(), summed.stride(0), *given,
        )  # fmt: skip
    return y, rstd


def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):  # type: ignore[no-untyped-def]
    dy, x, weight, rstd = rows(dy), rows(x), weight.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    dweight = torch.empty(x.shape[1], dtype=torch.float32) if need_dweight else None
    lib.rms_norm_backward(
        DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
        DTYPE_CODES[weight.dtype], weight.data_ptr(), rstd.data_ptr(),
        address(residual), 0 if residual is None else residual.stride(0),
        dx.data_ptr(), dx.stride(0), address(dweight), x.shape[0], x.shape[1],
    )  # fmt: skip
    return dx, dweight
