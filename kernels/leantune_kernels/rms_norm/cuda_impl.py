"""RMSNorm by csrc/rms_norm/cuda.cu. Compiled and loaded in the tests, not yet run on a device."""

from __future__ import annotations

from ctypes import c_float, c_int

import torch

from leantune_kernels.cuda import call, refuses
from leantune_kernels.native import DTYPE_CODES, rows

__all__ = ["backward", "forward", "refuses"]

ROWS_PER_PARTIAL = 256  # kRowsPerPartial in cuda.cu


def forward(x, weight, eps, out=None):  # type: ignore[no-untyped-def]
    x, weight = rows(x), weight.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    call(
        "rms_norm_forward", c_int(DTYPE_CODES[x.dtype]), x, x.stride(0), c_int(DTYPE_CODES[weight.dtype]), weight,
        y, y.stride(0), rstd, x.shape[0], x.shape[1], c_float(eps), device=x.device,
    )  # fmt: skip
    return y, rstd


def backward(dy, x, weight, rstd, residual=None, out=None, need_dweight=False):  # type: ignore[no-untyped-def]
    dy, x, weight, rstd = rows(dy), rows(x), weight.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    dweight = partials = None
    if need_dweight:
        dweight = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        partials = dweight.new_empty(-(-x.shape[0] // ROWS_PER_PARTIAL), x.shape[1])
    call(
        "rms_norm_backward", c_int(DTYPE_CODES[x.dtype]), dy, dy.stride(0), x, x.stride(0),
        c_int(DTYPE_CODES[weight.dtype]), weight, rstd, residual, 0 if residual is None else residual.stride(0),
        dx, dx.stride(0), dweight, partials, x.shape[0], x.shape[1], device=x.device,
    )  # fmt: skip
    return dx, dweight
