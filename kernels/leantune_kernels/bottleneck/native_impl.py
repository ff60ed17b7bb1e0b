"""The bottleneck adapter by csrc/bottleneck/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.bottleneck import ACTIVATIONS
from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses, rows

__all__ = ["backward", "forward", "refuses"]


def forward(x, weights, scale, activation, out):  # type: ignore[no-untyped-def]
    x = rows(x)
    lib.bottleneck_forward(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), weights.down.data_ptr(), address(weights.down_bias),
        weights.up.data_ptr(), address(weights.up_bias), scale, ACTIVATIONS[activation],
        out.data_ptr(), out.stride(0), *x.shape, weights.down.shape[0],
    )  # fmt: skip


def backward(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias):  # type: ignore[no-untyped-def]
    dy, x = rows(dy), rows(x)
    lib.bottleneck_backward(
        DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weights.down.data_ptr(),
        address(weights.down_bias), weights.up.data_ptr(), scale, ACTIVATIONS[activation],
        address(dx), 0 if dx is None else dx.stride(0), address(ddown), address(ddown_bias), address(dup),
        address(dup_bias), *x.shape, weights.down.shape[0],
    )  # fmt: skip
