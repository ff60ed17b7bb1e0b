"""Gradient norm in Triton: a sum for each piece of 16384 elements, then one program adds them in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.tensor_list import grad_rows, pieces
from leantune_kernels.triton_runtime import on_device, refuses
from leantune_kernels.triton_tensor_list import (
    BLOCK,
    GRAD,
    GRAD_DTYPE,
    aligned,
    elements,
    load_as_float,
    locate,
    span,
    store_nearest,
)

__all__ = ["refuses", "scale", "sum_of_squares"]


@triton.jit
def sum_of_squares_kernel(rows, pieces, sums, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    row, _, begin, left = locate(rows, pieces)
    grad = tl.load(row + GRAD)
    total = tl.zeros([BLOCK], tl.float32)
    for TAIL in tl.static_range(2):
        low, high = span(left, TAIL, BLOCK)
        for start in range(low, high, BLOCK):
            offset, mask = elements(begin, start, left, TAIL, BLOCK)
            x = load_as_float(grad, tl.load(row + GRAD_DTYPE), offset, mask, ALIGNED)
            total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total).to(tl.float64))


@triton.jit(do_not_specialize=["count"])
def add_sums_kernel(sums, result, count: tl.int64, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        total += tl.load(sums + number, number < count, other=0.0)
    tl.store(result, tl.sum(total))


@triton.jit
def scale_kernel(rows, pieces, factor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:
        return
    row, _, begin, left = locate(rows, pieces)
    grad = tl.load(row + GRAD)
    code = tl.load(row + GRAD_DTYPE)
    for TAIL in tl.static_range(2):
        low, high = span(left, TAIL, BLOCK)
        for start in range(low, high, BLOCK):
            offset, mask = elements(begin, start, left, TAIL, BLOCK)
            x = load_as_float(grad, code, offset, mask, ALIGNED)
            store_nearest(grad, code, x * by, offset, mask, ALIGNED)


def _launch(grads: list[torch.Tensor]) -> tuple[tuple[int], dict[str, object]]:
    rows, device = grad_rows(grads), grads[0].device
    cut = pieces([g.numel() for g in grads], device)
    on_device = rows.to(device, non_blocking=True)
    return (len(cut),), {"rows": on_device, "pieces": cut, "BLOCK": BLOCK, "ALIGNED": aligned(rows)}


@on_device
def sum_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    grid, arguments = _launch(grads)
    sums = torch.empty(grid, dtype=torch.float64, device=grads[0].device)
    result = sums.new_empty(())
    if grid[0]:
        sum_of_squares_kernel[grid](**arguments, sums=sums)
    add_sums_kernel[(1,)](sums=sums, result=result, count=grid[0], BLOCK=BLOCK)
    return result


@on_device
def scale(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    grid, arguments = _launch(grads)
    if grid[0]:
        scale_kernel[grid](**arguments, factor=factor)
