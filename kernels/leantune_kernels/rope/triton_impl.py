"""Rotary embedding in Triton: one program a token, which holds the token's angles for all heads of q and k."""

from __future__ import annotations

import triton
import triton.language as tl

from leantune_kernels.triton_runtime import on_device, power_of_two, refuses

__all__ = ["apply_", "refuses"]

TILE = 4096  # elements of a tile of heads and pairs


@triton.jit
def _rotate(
    x_ptr, head_stride, heads, half, c, s, first_pair,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Turns `PAIRS` pairs of every head of the token at x_ptr."""
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        row = x_ptr + head.to(tl.int64) * head_stride
        if INTERLEAVED:
            column = 2 * first_pair + tl.arange(0, 2 * PAIRS)[None, :]
            mask = (head < heads) & (column < 2 * half)
            x = tl.load(row + column, mask=mask, other=0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
            turned = tl.join(a * c - b * s, b * c + a * s)
            tl.store(row + column, tl.reshape(turned, (HEADS, 2 * PAIRS)), mask=mask)
        else:
            pair = first_pair + tl.arange(0, PAIRS)[None, :]
            mask = (head < heads) & (pair < half)
            a = tl.load(row + pair, mask=mask, other=0).to(tl.float32)
            b = tl.load(row + half + pair, mask=mask, other=0).to(tl.float32)
            tl.store(row + pair, a * c - b * s, mask=mask)
            tl.store(row + half + pair, b * c + a * s, mask=mask)


@triton.jit(do_not_specialize=["table_rows", "sign"])
def _rope_kernel(
    q_ptr, q_token_stride, q_head_stride, q_heads, k_ptr, k_token_stride, k_head_stride, k_heads,
    cos_ptr, sin_ptr, positions_ptr, table_rows, half, sign,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    known = tl.where((position >= 0) & (position < table_rows), half, 0)  # pairs whose angles the tables have
    for first_pair in range(0, half, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)[None, :]
        angle = position * half + pair
        c = tl.load(cos_ptr + angle, mask=pair < known, other=float("nan"))
        s = tl.load(sin_ptr + angle, mask=pair < known, other=float("nan")) * sign
        q_row, k_row = q_ptr + token * q_token_stride, k_ptr + token * k_token_stride
        _rotate(q_row, q_head_stride, q_heads, half, c, s, first_pair, INTERLEAVED, HEADS, PAIRS)
        _rotate(k_row, k_head_stride, k_heads, half, c, s, first_pair, INTERLEAVED, HEADS, PAIRS)


@on_device
def apply_(x, k, cos, sin, positions, inverse, interleaved):
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    tokens, half = x.shape[0], cos.shape[1]
    if tokens == 0 or half == 0:
        return
    pairs = power_of_two(half, at_most=TILE)
    heads = power_of_two(max(x.shape[1], 0 if k is None else k.shape[1]), at_least=1, at_most=TILE // pairs)
    _rope_kernel[(tokens,)](
        q_ptr=x, q_token_stride=x.stride(0), q_head_stride=x.stride(1), q_heads=x.shape[1],
        k_ptr=x if k is None else k, k_token_stride=0 if k is None else k.stride(0),
        k_head_stride=0 if k is None else k.stride(1), k_heads=0 if k is None else k.shape[1],
        cos_ptr=cos, sin_ptr=sin, positions_ptr=positions, table_rows=cos.shape[0], half=half,
        sign=-1.0 if inverse else 1.0, INTERLEAVED=interleaved, HEADS=heads, PAIRS=pairs,
    )  # fmt: skip
