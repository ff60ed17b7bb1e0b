"""AdamW in Triton: one launch for all tensors, a program for each piece of 16384 elements."""

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

__all__ = ["adamw_update", "numbers_of", "rates", "refuses", "update"]


@triton.jit
def adamw_update(p, g, m, v, decay, step_size, rest1, beta2, rest2, eps, grad_scale, correction):
    """(p, m, v) after the step, in float32; what the numbers are: see numbers_of."""
    g = g * grad_scale
    m = m + (g - m) * rest1
    v = v * beta2 + g * rest2 * g
    return p * decay - step_size * m / (tl.sqrt(v) * correction + eps), m, v


@triton.jit
def rates(row, lr_factor):
    """(decay, step_size) of a tensor, from its learning rate and weight decay."""
    lr = load_double(row, LR)
    return (1.0 - lr * load_double(row, WEIGHT_DECAY)).to(tl.float32), (lr * lr_factor).to(tl.float32)


def numbers_of(beta1: float, beta2: float, eps: float, grad_scale: float, step: int) -> dict[str, float]:
    """The kernel's arguments that are the same for all tensors; they travel as float32, but are computed before."""
    return {
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "eps": eps,
        "grad_scale": grad_scale,
        "correction": (1.0 - beta2**step) ** -0.5,
        "lr_factor": 1.0 / (1.0 - beta1**step),
        "step": step,
    }


@triton.jit(do_not_specialize=["step", "seed"])
def adamw_kernel(
    rows,
    pieces,
    rest1,
    beta2,
    rest2,
    eps,
    grad_scale,
    correction,
    lr_factor,
    step: tl.int64,
    seed: tl.int64,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row, tensor, begin, left = locate(rows, pieces)
    grad = tl.load(row + GRAD)
    if grad == 0:
        return
    decay, step_size = rates(row, lr_factor)
    for TAIL in tl.static_range(2):
        low, high = span(left, TAIL, BLOCK)
        for start in range(low, high, BLOCK):
            offset, mask = elements(begin, start, left, TAIL, BLOCK)
            g = load_as_float(grad, tl.load(row + GRAD_DTYPE), offset, mask, ALIGNED)
            p = load_value(row, offset, mask, ALIGNED)
            m = load_state(row, 0, offset, mask, ALIGNED)
            v = load_state(row, 1, offset, mask, ALIGNED)
            p, m, v = adamw_update(p, g, m, v, decay, step_size, rest1, beta2, rest2, eps, grad_scale, correction)
            store_state(row, 0, m, offset, mask, ALIGNED)
            store_state(row, 1, v, offset, mask, ALIGNED)
            store_value(row, p, tensor, begin + start, offset, mask, step, seed, BLOCK, ALIGNED)


@on_device
def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):
    grid, arguments = launch(table, grads, lr, weight_decay, seed)
    if grid[0]:
        adamw_kernel[grid](**arguments, **numbers_of(beta1, beta2, eps, grad_scale, step))
