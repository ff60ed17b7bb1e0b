"""Dropout in Triton: each program makes the words of a block of counters and masks their elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.triton_philox import philox_words
from leantune_kernels.triton_runtime import ceil_div, on_device, refuses

__all__ = ["forward", "refuses"]

COUNTERS = 256  # of a program, four elements each


@triton.jit(do_not_specialize=["size", "first_counter", "seed", "threshold", "scale"])
def _dropout_kernel(
    x_ptr, y_ptr, size: tl.int64, first_counter: tl.int64, seed: tl.int64, threshold: tl.uint32, scale: tl.float32,
    SKIP: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """SKIP: words of the first counter that belong to elements before x."""
    block = tl.program_id(0).to(tl.int64)
    words = philox_words(first_counter + block * COUNTERS, COUNTERS, 0, 0, seed)
    element = block * (4 * COUNTERS) - SKIP + tl.arange(0, 4 * COUNTERS)
    mask = (element >= 0) & (element < size)
    x = tl.load(x_ptr + element, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + element, x * tl.where(words >= threshold, scale, 0.0), mask=mask)


@on_device
def forward(x, threshold, scale, seed, offset, out=None):
    x = x.contiguous()
    y = torch.empty_like(x) if out is None else out
    skip = offset % 4
    if x.numel():
        _dropout_kernel[(ceil_div(skip + x.numel(), 4 * COUNTERS),)](
            x_ptr=x, y_ptr=y, size=x.numel(), first_counter=offset // 4, seed=seed - (seed >> 63 << 64),
            threshold=threshold, scale=scale, SKIP=skip, COUNTERS=COUNTERS,
        )  # fmt: skip
    return y
