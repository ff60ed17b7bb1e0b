"""Embedding in Triton. Backward: one program for a piece of the sorted ids and a block of columns; then, for ids whose
segments go on over several pieces, one that adds the parts in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.triton_runtime import ceil_div, on_device, power_of_two, refuses

__all__ = ["backward", "forward", "refuses"]

PIECE = tl.constexpr(64)  # sorted ids whose rows one program adds up


@triton.jit(do_not_specialize=["vocabulary", "scale"])
def _gather_kernel(
    weight_ptr, weight_stride, ids_ptr, y_ptr, y_stride, vocabulary, cols, scale: tl.float32, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    known = tl.where((row >= 0) & (row < vocabulary), cols, 0)  # columns to read: none of a row that is not there
    for begin in range(0, cols, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(weight_ptr + row * weight_stride + column, mask=column < known, other=float("nan")).to(tl.float32)
        tl.store(y_ptr + token * y_stride + column, x * scale, mask=column < cols)


@triton.jit
def _write(row_ptr, column, cols, total, scale, ACCUMULATE: tl.constexpr):
    value = total * scale
    if ACCUMULATE:
        value += tl.load(row_ptr + column, mask=column < cols, other=0).to(tl.float32)
    tl.store(row_ptr + column, value, mask=column < cols)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "padding", "scale"])
def _pieces_kernel(
    dy_ptr, dy_stride, ids_ptr, order_ptr, dweight_ptr, dweight_stride, sums_ptr, tokens, vocabulary, cols, padding,
    scale: tl.float32, ACCUMULATE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of equal ids within the piece is written; what came in from the piece before, or goes on in the next, is
    left in sums[piece, 0] and sums[piece, 1]."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, tokens)
    previous = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1)
    came_in = (begin > 0) & (tl.load(ids_ptr + begin) == previous)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(begin, end):
        row = tl.load(ids_ptr + i)
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < tokens, other=-1)
        goes_on = (i + 1 < tokens) & (row == following)
        kept = (row >= 0) & (row < vocabulary) & (row != padding)
        token = tl.load(order_ptr + i)
        wanted = tl.where(kept, cols, 0)
        total += tl.load(dy_ptr + token * dy_stride + column, mask=column < wanted, other=0).to(tl.float32)
        if (i + 1 == end) | (not goes_on):
            if came_in | goes_on:
                part_ptr = sums_ptr + (2 * piece + tl.where(came_in, 0, 1)) * cols
                tl.store(part_ptr + column, total, mask=column < cols)
            elif kept:
                _write(dweight_ptr + row * dweight_stride, column, cols, total, scale, ACCUMULATE)
            came_in = came_in & goes_on
            total = tl.zeros((BLOCK,), tl.float32)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "padding", "scale"])
def _join_kernel(
    ids_ptr, dweight_ptr, dweight_stride, sums_ptr, tokens, vocabulary, cols, padding,
    scale: tl.float32, ACCUMULATE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The run that begins in this piece and goes on: its part here and its parts in the pieces that follow."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = piece * PIECE
    end = begin + PIECE  # there is a piece after this one
    row = tl.load(ids_ptr + end)
    previous = tl.load(ids_ptr + begin - 1, mask=begin > 0, other=-1)
    starts = (tl.load(ids_ptr + end - 1) == row) & ((begin == 0) | (previous != row))
    if starts & (row >= 0) & (row < vocabulary) & (row != padding):
        total = tl.load(sums_ptr + (2 * piece + 1) * cols + column, mask=column < cols, other=0)
        following = row
        while following == row:
            piece += 1
            total += tl.load(sums_ptr + 2 * piece * cols + column, mask=column < cols, other=0)
            begin = (piece + 1) * PIECE
            following = tl.load(ids_ptr + begin, mask=begin < tokens, other=-1)
        _write(dweight_ptr + row * dweight_stride, column, cols, total, scale, ACCUMULATE)


@on_device
def forward(ids, weight, scale, out):
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if out.numel():
        _gather_kernel[(ids.shape[0],)](
            weight_ptr=weight, weight_stride=weight.stride(0), ids_ptr=ids.contiguous(), y_ptr=out,
            y_stride=out.stride(0), vocabulary=weight.shape[0], cols=weight.shape[1], scale=scale,
            BLOCK=power_of_two(weight.shape[1], at_most=4096),
        )  # fmt: skip


@on_device
def backward(dy, ids, dweight, scale, padding_idx, accumulate):
    if not accumulate:
        dweight.zero_()
    if dy.numel() == 0:
        return
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    sorted_ids, order = torch.sort(ids, stable=True)
    pieces, cols = ceil_div(ids.shape[0], PIECE.value), dweight.shape[1]
    sums = torch.empty((2 * pieces, cols), dtype=torch.float32, device=dy.device)
    block = power_of_two(cols, at_most=512)
    common = {
        "dweight_ptr": dweight, "dweight_stride": dweight.stride(0), "sums_ptr": sums, "tokens": ids.shape[0],
        "vocabulary": dweight.shape[0], "cols": cols, "padding": -1 if padding_idx is None else padding_idx,
        "scale": scale, "ACCUMULATE": accumulate, "PIECE": PIECE, "BLOCK": block,
    }  # fmt: skip
    _pieces_kernel[(pieces, ceil_div(cols, block))](
        dy_ptr=dy, dy_stride=dy.stride(0), ids_ptr=sorted_ids, order_ptr=order, **common
    )
    if pieces > 1:
        _join_kernel[(pieces - 1, ceil_div(cols, block))](ids_ptr=sorted_ids, **common)
