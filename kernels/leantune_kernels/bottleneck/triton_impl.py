"""The bottleneck adapter in Triton.

A program owns a block of rows: it forms the hidden activations [rows of the block, r] on chip, then goes through the
columns of y. The backward pass forms them again; h and dz [T, r], small beside x, are then what the gradients of the
weights are products of, as those of LoRA's factors are (low_rank/triton_impl.py): partial sums over chunks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.activation.triton_impl import value_slope
from leantune_kernels.checks import rows
from leantune_kernels.low_rank.triton_impl import partial_gradients, product_type, reduce_partials
from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["backward", "forward", "refuses"]


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z))."""
    if ACTIVATION == "relu":  # NaN stays; the slope at 0 is 0, as in PyTorch
        value, slope = tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "linear":
        value, slope = z, tl.full(z.shape, 1.0, tl.float32)
    else:
        value, slope = value_slope(z, ACTIVATION)
    return value, slope


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, y_ptr, rows, x_stride, y_stride, scale, H, R,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    t_in, r_in, t_wide = (t < rows)[:, None], r < R, t.to(tl.int64)
    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for begin in range(0, H, BLOCK_H):
        h_in = begin + k < H
        x = tl.load(x_ptr + t_wide[:, None] * x_stride + begin + k[None, :], mask=t_in & h_in[None, :], other=0.0)
        down = tl.load(down_ptr + r[None, :] * H + begin + k[:, None], mask=h_in[:, None] & r_in[None, :], other=0.0)
        z = tl.dot(x.to(DOT), down.to(DOT), z, input_precision="ieee")
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + r, mask=r_in, other=0.0)[None, :]
    hidden, _ = _activate(z, ACTIVATION)
    hidden = hidden.to(DOT)
    for begin in range(0, H, BLOCK_H):
        n = begin + k
        n_in = n < H
        inside = t_in & n_in[None, :]
        up = tl.load(up_ptr + n[None, :] * R + r[:, None], mask=r_in[:, None] & n_in[None, :], other=0.0)
        y = tl.dot(hidden, up.to(DOT), input_precision="ieee")
        if up_bias_ptr is not None:
            y += tl.load(up_bias_ptr + n, mask=n_in, other=0.0)[None, :]
        x = tl.load(x_ptr + t_wide[:, None] * x_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + t_wide[:, None] * y_stride + n[None, :], x + scale * y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr, x_ptr, down_ptr, down_bias_ptr, up_ptr, dx_ptr, h_ptr, dz_ptr, dz_sum_ptr, dy_sum_ptr, rows,
    dy_stride, x_stride, dx_stride, scale, H, R, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h, dz [rows, R]; where asked for dx, and the sums of dz and dy over the block's rows, [blocks, R] and [.., H]."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    t_in, r_in, t_wide = (t < rows)[:, None], r < R, t.to(tl.int64)
    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    dz = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for begin in range(0, H, BLOCK_H):
        n = begin + k
        n_in = n < H
        inside, factor_in = t_in & n_in[None, :], n_in[:, None] & r_in[None, :]
        x = tl.load(x_ptr + t_wide[:, None] * x_stride + n[None, :], mask=inside, other=0.0).to(DOT)
        down = tl.load(down_ptr + r[None, :] * H + n[:, None], mask=factor_in, other=0.0).to(DOT)
        z = tl.dot(x, down, z, input_precision="ieee")
        dy = tl.load(dy_ptr + t_wide[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(DOT)
        up = tl.load(up_ptr + n[:, None] * R + r[None, :], mask=factor_in, other=0.0).to(DOT)
        dz = tl.dot(dy, up, dz, input_precision="ieee")
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + r, mask=r_in, other=0.0)[None, :]
    h, slope = _activate(z, ACTIVATION)
    dz *= scale * slope
    at = t_wide[:, None] * R + r[None, :]
    tl.store(h_ptr + at, h, mask=t_in & r_in[None, :])
    tl.store(dz_ptr + at, dz, mask=t_in & r_in[None, :])
    if dz_sum_ptr is not None:  # rows past the end have dy = 0, so dz = 0
        tl.store(dz_sum_ptr + block.to(tl.int64) * R + r, tl.sum(dz, 0), mask=r_in)
    if dx_ptr is not None or dy_sum_ptr is not None:
        narrow = dz.to(DOT)
        for begin in range(0, H, BLOCK_H):
            n = begin + k
            n_in = n < H
            inside = t_in & n_in[None, :]
            dy = tl.load(dy_ptr + t_wide[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
            if dy_sum_ptr is not None:
                tl.store(dy_sum_ptr + block.to(tl.int64) * H + n, tl.sum(dy, 0), mask=n_in)
            if dx_ptr is not None:
                down = tl.load(down_ptr + r[:, None] * H + n[None, :], mask=r_in[:, None] & n_in[None, :], other=0.0)
                dx = tl.dot(narrow, down.to(DOT), dy, input_precision="ieee")
                tl.store(dx_ptr + t_wide[:, None] * dx_stride + n[None, :], dx, mask=inside)


def _blocks(rank: int) -> dict[str, int]:
    """Sizes for which the accumulators [BLOCK_T, BLOCK_R] and the operands of a product stay in registers."""
    return {
        "BLOCK_T": 16,
        "BLOCK_R": power_of_two(rank),
        "BLOCK_H": 16,
        "num_warps": 8,
        "num_stages": 2,
        "maxnreg": 255,  # left to itself the assembler prefers spilling to fewer blocks on a multiprocessor
    }


@on_device
def forward(x, weights, scale, activation, out):
    x, (down, up, down_bias, up_bias) = rows(x), weights
    blocks = _blocks(down.shape[0])
    if x.numel():
        _forward_kernel[(ceil_div(x.shape[0], blocks["BLOCK_T"]),)](
            x_ptr=x, down_ptr=down, down_bias_ptr=down_bias, up_ptr=up, up_bias_ptr=up_bias, y_ptr=out,
            rows=x.shape[0], x_stride=x.stride(0), y_stride=out.stride(0), scale=scale, H=x.shape[1],
            R=down.shape[0], ACTIVATION=activation, DOT=product_type(x.dtype), **blocks,
        )  # fmt: skip


@on_device
def backward(dy, x, weights, scale, activation, dx, ddown, dup, ddown_bias, dup_bias):
    dy, x, (down, up, down_bias, _) = rows(dy), rows(x), weights
    (T, H), R = x.shape, down.shape[0]
    blocks = _blocks(R)
    count = ceil_div(T, blocks["BLOCK_T"])
    h, dz = torch.empty(2, T, R, device=x.device)
    dz_sums = None if ddown_bias is None else torch.empty(count, 1, R, device=x.device)
    dy_sums = None if dup_bias is None else torch.empty(count, 1, H, device=x.device)
    if x.numel():
        _backward_kernel[(count,)](
            dy_ptr=dy, x_ptr=x, down_ptr=down, down_bias_ptr=down_bias, up_ptr=up, dx_ptr=dx, h_ptr=h, dz_ptr=dz,
            dz_sum_ptr=dz_sums, dy_sum_ptr=dy_sums, rows=T, dy_stride=dy.stride(0), x_stride=x.stride(0),
            dx_stride=0 if dx is None else dx.stride(0), scale=scale, H=H, R=R, ACTIVATION=activation,
            DOT=product_type(x.dtype), **blocks,
        )  # fmt: skip
    if ddown is not None:
        reduce_partials(partial_gradients(dz, x), 1.0, ddown)
    if dup is not None:
        reduce_partials(partial_gradients(h, dy), scale, dup.t())
    if dz_sums is not None:
        reduce_partials(dz_sums, 1.0, ddown_bias[None])
    if dy_sums is not None:
        reduce_partials(dy_sums, scale, dup_bias[None])
