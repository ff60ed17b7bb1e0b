"""LayerNorm by csrc/layer_norm/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses, rows

__all__ = ["backward", "forward", "refuses"]


def forward(x, weight, bias, eps, out=None, residual=None, summed=None):  # type: ignore[no-untyped-def]
    x, weight, bias = rows(x), weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    given = (
        DTYPE_CODES[weight.dtype], weight.data_ptr(), address(bias), y.data_ptr(), y.stride(0), mean.data_ptr(),
        rstd.data_ptr(), *x.shape, eps,
    )  # fmt: skip
    if residual is None:
        lib.layer_norm_forward(DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *given)
    else:
        residual = rows(residual)
        lib.add_layer_norm_forward(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
            summed.data_ptr(), summed.stride(0), *given,
        )  # fmt: skip
    return y, mean, rstd


def backward(  # type: ignore[no-untyped-def]
    dy, x, weight, mean, rstd, residual=None, out=None, need_dweight=False, need_dbias=False
):
    dy, x, weight, mean, rstd = rows(dy), rows(x), weight.contiguous(), mean.contiguous(), rstd.contiguous()
    residual = None if residual is None else rows(residual)
    dx = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    dweight, dbias = (torch.empty(x.shape[1], dtype=torch.float32) if n else None for n in (need_dweight, need_dbias))
    lib.layer_norm_backward(
        DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0),
        DTYPE_CODES[weight.dtype], weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        address(residual), 0 if residual is None else residual.stride(0),
        dx.data_ptr(), dx.stride(0), address(dweight), address(dbias), *x.shape,
    )  # fmt: skip
    return dx, dweight, dbias
