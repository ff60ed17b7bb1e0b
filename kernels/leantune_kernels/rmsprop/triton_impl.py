"""RMSprop in Triton: one launch for all tensors, a program for each piece of 16384 elements."""

from __future__ import annotations

import triton
import triton.language as tl

from leantune_kernels.triton_runtime import on_device, refuses
from leantune_kernels.triton_tensor_list import (
    GRAD,
    GRAD_DTYPE,
    LR,
    WEIGHT_DECAY,
    elements,
    launch,
    load_as_float,
    load_double,
    load_state,
    load_value,
    locate,
    span,
    store_state,
    store_value,
)

__all__ = ["refuses", "update"]


@triton.jit(do_not_specialize=["step", "seed"])
def rmsprop_kernel(
    rows,
    pieces,
    alpha,
    rest,
    eps,
    momentum,
    grad_scale,
    step: tl.int64,
    seed: tl.int64,
    MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row, tensor, begin, left = locate(rows, pieces)
    grad = tl.load(row + GRAD)
    if grad == 0:
        return
    lr = load_double(row, LR).to(tl.float32)
    weight_decay = load_double(row, WEIGHT_DECAY).to(tl.float32)
    for TAIL in tl.static_range(2):
        low, high = span(left, TAIL, BLOCK)
        for start in range(low, high, BLOCK):
            offset, mask = elements(begin, start, left, TAIL, BLOCK)
            p = load_value(row, offset, mask, ALIGNED)
            g = load_as_float(grad, tl.load(row + GRAD_DTYPE), offset, mask, ALIGNED)
            g = g * grad_scale + p * weight_decay
            v = load_state(row, 0, offset, mask, ALIGNED) * alpha + g * rest * g
            store_state(row, 0, v, offset, mask, ALIGNED)
            if CENTERED:
                a = load_state(row, 2, offset, mask, ALIGNED)
                a = a + (g - a) * rest
                store_state(row, 2, a, offset, mask, ALIGNED)
                v = v - a * a
            d = g / (tl.sqrt(v) + eps)
            if MOMENTUM:
                d = load_state(row, 1, offset, mask, ALIGNED) * momentum + d
                store_state(row, 1, d, offset, mask, ALIGNED)
            store_value(row, p - lr * d, tensor, begin + start, offset, mask, step, seed, BLOCK, ALIGNED)


@on_device
def update(table, grads, *, lr, weight_decay, alpha, eps, momentum, grad_scale, step, seed):
    grid, arguments = launch(table, grads, lr, weight_decay, seed)
    if grid[0]:
        rmsprop_kernel[grid](
            **arguments,
            alpha=alpha,
            rest=1.0 - alpha,
            eps=eps,
            momentum=momentum,
            grad_scale=grad_scale,
            step=step,
            MOMENTUM=table.states[1] is not None,
            CENTERED=table.states[2] is not None,
        )
