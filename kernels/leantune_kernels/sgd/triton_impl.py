"""SGD in Triton: one launch for all tensors, a program for each piece of 16384 elements."""

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
def sgd_kernel(
    rows,
    pieces,
    momentum,
    share,
    grad_scale,
    step: tl.int64,
    seed: tl.int64,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
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
            if MOMENTUM:
                b = load_state(row, 0, offset, mask & (step > 1), ALIGNED)  # nothing before the first
                b = b * momentum + g * share
                store_state(row, 0, b, offset, mask, ALIGNED)
                if NESTEROV:
                    g = g + b * momentum
                else:
                    g = b
            store_value(row, p - lr * g, tensor, begin + start, offset, mask, step, seed, BLOCK, ALIGNED)


@on_device
def update(table, grads, *, lr, weight_decay, momentum, dampening, nesterov, grad_scale, step, seed):
    grid, arguments = launch(table, grads, lr, weight_decay, seed)
    if grid[0]:
        sgd_kernel[grid](
            **arguments,
            momentum=momentum,
            share=1.0 if step == 1 else 1.0 - dampening,
            grad_scale=grad_scale,
            step=step,
            MOMENTUM=momentum != 0,
            NESTEROV=nesterov,
        )
