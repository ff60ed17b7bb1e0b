"""The bottleneck adapter by csrc/bottleneck/cpu.cpp, or where factors are large by the vendor's products.

Blocks of rows that stay in the cache win while both factors do too. Measured on one core with AVX-512, in fp32, as
time of plain PyTorch over ours, forward and backward together: hidden size 576 at rank 8 to 64, and 4096 at rank 8 to
32, 1.3 to 2.6; 576 at rank 128, 0.9; 4096 at rank 64, 0.85. Hence the rule of `_large`.
"""

from __future__ import annotations

import torch

from leantune_kernels.activation import native_impl as elementwise
from leantune_kernels.bottleneck import ACTIVATIONS, Weights
from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses, rows

__all__ = ["backward", "forward", "refuses"]


def _large(x: torch.Tensor, weights: Weights) -> bool:
    return x.dtype == torch.float32 and (weights.down.shape[0] > 96 or weights.down.numel() > 200_000)


def forward(x, weights, scale, activation, out):  # type: ignore[no-untyped-def]
    x = rows(x)
    if _large(x, weights):
        h = _activate(_project_down(x, weights), activation)
        torch.addmm(x, h, weights.up.t(), alpha=scale, out=out)
        if weights.up_bias is not None:
            out.add_(weights.up_bias, alpha=scale)
        return
    lib.bottleneck_forward(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), weights.down.data_ptr(), address(weights.down_bias),
        weights.up.data_ptr(), address(weights.up_bias), scale, ACTIVATIONS[activation],
        out.data_ptr(), out.stride(0), *x.shape, weights.down.shape[0],
    )  # fmt: skip


def backward(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias):  # type: ignore[no-untyped-def]
    dy, x = rows(dy), rows(x)
    if _large(x, weights):
        _backward_of_large(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias)
        return
    lib.bottleneck_backward(
        DTYPE_CODES[x.dtype], dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), weights.down.data_ptr(),
        address(weights.down_bias), weights.up.data_ptr(), scale, ACTIVATIONS[activation],
        address(dx), 0 if dx is None else dx.stride(0), address(ddown), address(ddown_bias), address(dup),
        address(dup_bias), *x.shape, weights.down.shape[0],
    )  # fmt: skip


def _project_down(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    down = weights.down.t()
    return torch.mm(x, down) if weights.down_bias is None else torch.addmm(weights.down_bias, x, down)


def _activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """act(z), which may be z itself, overwritten."""
    if activation == "linear":
        return z
    return z.relu_() if activation == "relu" else elementwise.forward(z, activation, z)


def _backward_of_large(  # type: ignore[no-untyped-def]
    dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias
):
    z = _project_down(x, weights)
    dz = torch.addmm(z, dy, weights.up, beta=0, alpha=scale)
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    elif activation != "linear":
        dz = elementwise.backward(dz, z, activation, dz)
    if dx is not None:
        torch.addmm(dy, dz, weights.down, out=dx)
    if ddown is not None:
        torch.mm(dz.t(), x, out=ddown)
    if ddown_bias is not None:
        torch.sum(dz, 0, out=ddown_bias)
    if dup is not None:
        torch.addmm(dup, dy.t(), _activate(z, activation), beta=0, alpha=scale, out=dup)
    if dup_bias is not None:
        torch.sum(dy, 0, out=dup_bias).mul_(scale)
