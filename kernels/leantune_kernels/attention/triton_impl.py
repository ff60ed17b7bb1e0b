"""Packed attention in Triton: online softmax forward, and a backward that forms the probabilities again from lse.

A program has one block of one sequence: of queries in one head (forward, dq), or of keys in one key head, whose query
heads it goes through in order (dk, dv). Sequence s owns the slots of the grid from cu_seqlens[s] // BLOCK + s on, as
many as its blocks or one more, so that the host knows the size of the grid from the number of tokens and of sequences
alone. Scores are in units of log2(e), as exp2 wants them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels import triton_runtime
from leantune_kernels.checks import out_or_new, rows
from leantune_kernels.low_rank.triton_impl import product_type
from leantune_kernels.triton_runtime import autotune, ceil_div, on_device, power_of_two

__all__ = ["backward", "forward", "refuses"]

MOST_DIM = 256
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below any score, and finite: a row may see no key of the first block


@triton.jit
def _own_block(cu_ptr, sequences, BLOCK: tl.constexpr):
    """(first token of the sequence, its length, first position of the block, which may lie beyond the length)."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # late blocks first: under a causal mask they cost the most
    low = slot * 0
    high = low + sequences
    while high - low > 1:  # the last sequence whose slots begin at or before this one
        middle = (low + high) // 2
        right = tl.load(cu_ptr + middle) // BLOCK + middle <= slot
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    begin = tl.load(cu_ptr + low)
    return begin, tl.load(cu_ptr + low + 1) - begin, (slot - begin // BLOCK - low) * BLOCK


@triton.jit
def _met(first, length, back, ahead, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(start, end) of what the positions [first, first + BLOCK) meet, `back` before to `ahead` after each, by STEP."""
    return tl.maximum(first - back, 0) // STEP * STEP, tl.minimum(length, first + BLOCK + ahead)


@triton.jit
def _mask(scores, row, key, first, start, length, before, after, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Scores of the rows from `first` on and the keys from `start` on, -inf where a row does not see a key."""
    if (start < first + ROWS - 1 - before) | (start + KEYS - 1 > first + after) | (start + KEYS > length):
        ahead = key - row
        scores = tl.where((ahead >= -before) & (ahead <= after) & (key < length), scores, float("-inf"))
    return scores


@triton.jit
def _load(ptr, stride, at, length, d, dim: tl.constexpr, DOT: tl.constexpr):
    """Rows `at` of a [length, dim] matrix, zeros beyond its edges, as the products take them."""
    inside = (at < length)[:, None] & (d < dim)[None, :]
    return tl.load(ptr + at.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["tokens", "sequences", "before", "after"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_ptr, q_stride, q_head, k_stride, k_head, v_stride, v_head, o_stride,
    o_head, tokens, sequences, group, before, after, scale, dim: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, length, first = _own_block(cu_ptr, sequences, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    token = begin.to(tl.int64)
    q_ptr += token * q_stride + head * q_head
    k_ptr += token * k_stride + head // group * k_head
    v_ptr += token * v_stride + head // group * v_head
    row = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _load(q_ptr, q_stride, row, length, d, dim, DOT)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, end = _met(first, length, before, after, BLOCK_M, BLOCK_N)
    for key in range(start, end, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, k_stride, j, length, d, dim, DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _mask(s, row[:, None], j[None, :], first, key, length, before, after, BLOCK_M, BLOCK_N)
        highest = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - highest)
        p = tl.exp2(s - highest[:, None])
        v = _load(v_ptr, v_stride, j, length, d, dim, DOT)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        l = l * shrink + tl.sum(p, 1)
        m = highest
    inside = row < length
    l = tl.where(inside, l, 1.0)  # rows beyond the sequence may have seen nothing
    o_at = o_ptr + (token + row)[:, None] * o_stride + head * o_head + d[None, :]
    tl.store(o_at, acc / l[:, None], mask=inside[:, None] & (d < dim)[None, :])
    tl.store(lse_ptr + head * tokens + token + row, (m + tl.log2(l)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _delta_kernel(
    do_ptr, o_ptr, delta_ptr, do_stride, do_head, o_stride, o_head, tokens,
    dim: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """delta [heads, tokens] = sum_d do * o, what the softmax's gradient takes off every dp of a row."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    do = _load(do_ptr + head * do_head, do_stride, t, tokens, d, dim, tl.float32)
    o = _load(o_ptr + head * o_head, o_stride, t, tokens, d, dim, tl.float32)
    tl.store(delta_ptr + head * tokens + t, tl.sum(do * o, 1), mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "sequences", "before", "after"])
def _query_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, lse_ptr, delta_ptr, cu_ptr, do_stride, do_head, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, dq_stride, dq_head, tokens, sequences, group, before, after, scale, scale_log2,
    dim: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, length, first = _own_block(cu_ptr, sequences, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    token = begin.to(tl.int64)
    k_ptr += token * k_stride + head // group * k_head
    v_ptr += token * v_stride + head // group * v_head
    row = first + tl.arange(0, BLOCK_M)
    inside = row < length
    d = tl.arange(0, BLOCK_D)
    q = _load(q_ptr + token * q_stride + head * q_head, q_stride, row, length, d, dim, DOT)
    do = _load(do_ptr + token * do_stride + head * do_head, do_stride, row, length, d, dim, DOT)
    lse = tl.load(lse_ptr + head * tokens + token + row, mask=inside, other=0.0) / LN_2
    delta = tl.load(delta_ptr + head * tokens + token + row, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    start, end = _met(first, length, before, after, BLOCK_M, BLOCK_N)
    for key in range(start, end, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, k_stride, j, length, d, dim, DOT)
        v = _load(v_ptr, v_stride, j, length, d, dim, DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        s = _mask(s, row[:, None], j[None, :], first, key, length, before, after, BLOCK_M, BLOCK_N)
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(DOT), k, acc, input_precision="ieee")
    at = dq_ptr + (token + row)[:, None] * dq_stride + head * dq_head + d[None, :]
    tl.store(at, acc * scale, mask=inside[:, None] & (d < dim)[None, :])


@triton.jit(do_not_specialize=["tokens", "sequences", "before", "after"])
def _key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, cu_ptr, do_stride, do_head, q_stride, q_head,
    k_stride, k_head, v_stride, v_head, dk_stride, dk_head, dv_stride, dv_head, tokens, sequences, group, before, after,
    scale, scale_log2, dim: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, length, first = _own_block(cu_ptr, sequences, BLOCK_N)
    if first >= length:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    token = begin.to(tl.int64)
    j = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = _load(k_ptr + token * k_stride + kv_head * k_head, k_stride, j, length, d, dim, DOT)
    v = _load(v_ptr + token * v_stride + kv_head * v_head, v_stride, j, length, d, dim, DOT)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start, end = _met(first, length, after, before, BLOCK_N, BLOCK_M)
    for i in range(group):
        head = kv_head * group + i
        q_at = q_ptr + token * q_stride + head * q_head
        do_at = do_ptr + token * do_stride + head * do_head
        at = head * tokens + token
        for r in range(start, end, BLOCK_M):  # scores are transposed, [keys, rows]
            row = r + tl.arange(0, BLOCK_M)
            q = _load(q_at, q_stride, row, length, d, dim, DOT)
            do = _load(do_at, do_stride, row, length, d, dim, DOT)
            lse = tl.load(lse_ptr + at + row, mask=row < length, other=0.0) / LN_2
            delta = tl.load(delta_ptr + at + row, mask=row < length, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
            s = _mask(s, row[None, :], j[:, None], r, first, length, before, after, BLOCK_M, BLOCK_N)
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(DOT), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(DOT), q, dk, input_precision="ieee")
    inside = (j < length)[:, None] & (d < dim)[None, :]
    tl.store(dk_ptr + (token + j)[:, None] * dk_stride + kv_head * dk_head + d[None, :], dk * scale, mask=inside)
    tl.store(dv_ptr + (token + j)[:, None] * dv_stride + kv_head * dv_head + d[None, :], dv, mask=inside)


def _tuned(kernel, *choices: tuple[int, int, int, int]):
    """`kernel` with configurations of (BLOCK_M, BLOCK_N, warps, stages); one that does not fit is passed over.

    maxnreg: left to itself the assembler prefers spilling to fewer blocks on a multiprocessor.
    """
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages, maxnreg=255)
        for m, n, warps, stages in choices
    ]
    return autotune(configs, key=["dim"])(kernel)


# Products of 2-byte elements run on tensor cores; those of float32, IEEE, in the registers of smaller blocks.
_FORWARD = {
    2: _tuned(_forward_kernel, (128, 64, 8, 3), (64, 64, 4, 2), (32, 32, 4, 1)),
    4: _tuned(_forward_kernel, (32, 32, 8, 1), (32, 16, 4, 1)),
}
_QUERY_GRADIENT = {
    2: _tuned(_query_gradient_kernel, (64, 64, 8, 2), (64, 32, 4, 2), (32, 16, 4, 1)),
    4: _tuned(_query_gradient_kernel, (32, 16, 8, 1), (32, 16, 4, 1)),
}
_KEY_GRADIENT = {
    2: _tuned(_key_gradient_kernel, (32, 32, 4, 2), (32, 32, 8, 1), (16, 32, 4, 1)),
    4: _tuned(_key_gradient_kernel, (16, 32, 8, 1), (16, 32, 4, 1)),
}


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the kernels cannot take `x` [T, heads, head_dim], None if they can."""
    if x.shape[-1] > MOST_DIM:
        return f"head_dim={x.shape[-1]} exceeds {MOST_DIM}"
    return triton_runtime.refuses(x)


def _arguments(q, k, cu_seqlens, causal, window):
    """What the three kernels take alike."""
    tokens, heads, dim = q.shape
    before = tokens if window is None else min(window - 1, tokens)
    return {
        "cu_ptr": cu_seqlens.contiguous(), "tokens": tokens, "sequences": cu_seqlens.numel() - 1,
        "group": heads // k.shape[1], "before": before, "after": 0 if causal else before, "dim": dim,
        "BLOCK_D": power_of_two(dim), "DOT": product_type(q.dtype),
    }  # fmt: skip


def _matrix(name: str, x: torch.Tensor) -> dict[str, torch.Tensor | int]:
    return {f"{name}_ptr": x, f"{name}_stride": x.stride(0), f"{name}_head": x.stride(1)}


@on_device
def forward(q, k, v, cu_seqlens, scale, causal, out=None, window=None):
    q, k, v, o = rows(q), rows(k), rows(v), out_or_new(out, q)
    shared = _arguments(q, k, cu_seqlens, causal, window)
    tokens, sequences = shared["tokens"], shared["sequences"]
    lse = torch.empty(q.shape[1], tokens, dtype=torch.float32, device=q.device)
    if tokens:
        _FORWARD[q.element_size()][lambda meta: (tokens // meta["BLOCK_M"] + sequences, q.shape[1])](
            **_matrix("q", q), **_matrix("k", k), **_matrix("v", v), **_matrix("o", o),
            lse_ptr=lse, scale=scale * LOG2_E, **shared,
        )  # fmt: skip
    return o, lse


@on_device
def backward(do, q, k, v, o, lse, cu_seqlens, scale, causal, dq=None, dk=None, dv=None, window=None):
    do, q, k, v, o, lse = rows(do), rows(q), rows(k), rows(v), rows(o), lse.contiguous()
    dq, dk, dv = out_or_new(dq, q), out_or_new(dk, k), out_or_new(dv, v)
    shared = _arguments(q, k, cu_seqlens, causal, window)
    tokens, sequences, dim = shared["tokens"], shared["sequences"], shared["dim"]
    if tokens == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    _delta_kernel[(ceil_div(tokens, 16), q.shape[1])](
        **_matrix("do", do), **_matrix("o", o), delta_ptr=delta, tokens=tokens, dim=dim, BLOCK_D=shared["BLOCK_D"],
        BLOCK_T=16,
    )  # fmt: skip
    shared |= {"lse_ptr": lse, "delta_ptr": delta, "scale": scale, "scale_log2": scale * LOG2_E}
    inputs = {**_matrix("do", do), **_matrix("q", q), **_matrix("k", k), **_matrix("v", v)}
    _QUERY_GRADIENT[q.element_size()][lambda meta: (tokens // meta["BLOCK_M"] + sequences, q.shape[1])](
        **inputs, **_matrix("dq", dq), **shared
    )
    _KEY_GRADIENT[q.element_size()][lambda meta: (tokens // meta["BLOCK_N"] + sequences, k.shape[1])](
        **inputs, **_matrix("dk", dk), **_matrix("dv", dv), **shared
    )
    return dq, dk, dv
