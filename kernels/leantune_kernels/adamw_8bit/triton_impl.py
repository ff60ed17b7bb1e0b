"""AdamW with 8-bit moments in Triton: one launch for all tensors, four blocks of 256 at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.adamw.triton_impl import adamw_update, numbers_of, rates
from leantune_kernels.adamw_8bit import code_book
from leantune_kernels.triton_runtime import on_device, refuses
from leantune_kernels.triton_tensor_list import (
    GRAD,
    GRAD_DTYPE,
    STATES,
    elements,
    launch,
    load_as_float,
    load_value,
    locate,
    span,
    store_value,
    typed,
)

__all__ = ["refuses", "update"]

CODES = tl.constexpr(code_book.BLOCK)  # that share a maximum
CELLS = tl.constexpr(code_book.CELLS)
LOWEST_CELL = tl.constexpr((127 - 23) << 7)


@triton.jit
def decode(row, NUMBER: tl.constexpr, book, first, offset, mask, count, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The moment whose codes are state NUMBER and whose maxima, `count` of them from `first` on, are the next state."""
    zero: tl.constexpr = 127 if NUMBER == 0 else 0  # the code of 0, also for what is not there
    codes = tl.load(typed(tl.load(row + STATES + NUMBER), tl.uint8, ALIGNED) + offset, mask, other=zero)
    blocks = tl.arange(0, BLOCK // CODES)
    absmax = typed(tl.load(row + STATES + NUMBER + 1), tl.float32, False)
    scale = tl.load(absmax + first + blocks, blocks < count, other=0.0)
    numbers = tl.reshape(tl.load(book + codes.to(tl.int32)), [BLOCK // CODES, CODES])
    return tl.reshape(numbers * scale[:, None], [BLOCK])


@triton.jit
def encode(
    row,
    NUMBER: tl.constexpr,
    x,
    cells,
    first,
    offset,
    mask,
    count,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Writes the moment `x` as `decode` reads it; magnitudes are compared by their bits, where NaN is the largest."""
    blocks = tl.arange(0, BLOCK // CODES)
    magnitude = tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = tl.max(tl.reshape(magnitude, [BLOCK // CODES, CODES]), 1)
    absmax = largest.to(tl.float32, bitcast=True)
    tl.store(typed(tl.load(row + STATES + NUMBER + 1), tl.float32, False) + first + blocks, absmax, mask=blocks < count)
    usable = absmax >= 1.1754943508222875e-38
    inverse = tl.where(
        usable, tl.div_rn(tl.full([BLOCK // CODES], 1.0, tl.float32), tl.where(usable, absmax, 1.0)), 0.0
    )
    scaled = tl.reshape(tl.reshape(x, [BLOCK // CODES, CODES]) * inverse[:, None], [BLOCK])
    bits = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    cell = tl.minimum(tl.maximum((bits >> 16) - LOWEST_CELL, 0), CELLS - 1)
    entry = tl.load(cells + cell)
    rank = (entry >> 16) + ((bits & 0xFFFF) > (entry & 0xFFFF)).to(tl.int32)
    if SIGNED:
        rank = tl.where(x < 0, 127 - tl.minimum(rank, 127), 127 + rank)
    tl.store(typed(tl.load(row + STATES + NUMBER), tl.uint8, ALIGNED) + offset, rank.to(tl.uint8), mask)


@triton.jit(do_not_specialize=["step", "seed"])
def adamw_8bit_kernel(
    rows,
    pieces,
    books,
    cells,
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
            first = (begin + start) // CODES
            count = (left - start + CODES - 1) // CODES
            g = load_as_float(grad, tl.load(row + GRAD_DTYPE), offset, mask, ALIGNED)
            p = load_value(row, offset, mask, ALIGNED)
            m = decode(row, 0, books, first, offset, mask, count, BLOCK, ALIGNED)
            v = decode(row, 2, books + 256, first, offset, mask, count, BLOCK, ALIGNED)
            p, m, v = adamw_update(p, g, m, v, decay, step_size, rest1, beta2, rest2, eps, grad_scale, correction)
            encode(row, 0, m, cells, first, offset, mask, count, True, BLOCK, ALIGNED)
            encode(row, 2, v, cells + CELLS, first, offset, mask, count, False, BLOCK, ALIGNED)
            store_value(row, p, tensor, begin + start, offset, mask, step, seed, BLOCK, ALIGNED)


@on_device
def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):
    grid, arguments = launch(table, grads, lr, weight_decay, seed)
    if grid[0]:
        tables = code_book.tables(table.params[0].device)
        adamw_8bit_kernel[grid](
            **arguments,
            books=tables[: 2 * 256].view(torch.float32),
            cells=tables[2 * 256 :],
            **numbers_of(beta1, beta2, eps, grad_scale, step),
        )
