"""Packed attention with grouped heads, causal or bidirectional, with or without a sliding window.

o = softmax(scale * Q K^T) V within each sequence (Dao et al. 2022, arXiv:2205.14135).

Shapes: T tokens of all sequences one after another, Hq query heads, Hk key and value heads, D head dimension.
q [T, Hq, D]; k, v [T, Hk, D]; Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk). lse
[Hq, T] fp32 is the logarithm of the softmax's denominator, kept for the backward pass. Any of the tensors may be
slices of one projection's output.
"""

from __future__ import annotations

import itertools

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import can_read, expect, expect_dims, expect_rows
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(
    __name__,
    effects={"forward": Effects((6,), returns=True), "backward": Effects((9, 10, 11), returns=True)},
    dims=(-1,),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of packed sequences, [T, Hq, D] like `q`, differentiable in q, k and v.

    q [T, Hq, D], k and v [T, Hk, D]: one dtype of float32, bfloat16, float16, any strides; sums are fp32.
    cu_seqlens: int32 [n + 1]; sequence i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.
    scale: of the scores; 1 / sqrt(D) where None. causal: a token sees itself and what precedes it in its
    sequence; otherwise all of its sequence. window: token i sees of these the keys j with |i - j| < window alone,
    itself included, and the cost falls with it. Causal, this is Hugging Face's `sliding_window` (Mistral, Gemma);
    bidirectional, a token sees window - 1 on either side: for ModernBERT, window = local_attention // 2 + 1.
    Raises ValueError for shapes that do not fit, a window below 1, and for a cu_seqlens that does not rise from 0
    to T; on a device other than cpu its values are not read.
    """
    expect_rows("q", q, "D")
    return call(_Attention, q, k, v, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, causal, window)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    out: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [T, Hq, D], lse [Hq, T] fp32); o goes to `out` where given. ValueError for what does not fit q."""
    _check(q, k, v, cu_seqlens, window)
    if out is not None:
        expect("out", out, q.shape, q.dtype, q.device, written=True)
    return OP.pick(q).forward(q, k, v, cu_seqlens, scale, causal, out, window)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for the upstream gradient `do` [T, Hq, D]; each goes to its tensor where given.

    o and lse are what `forward` returned for the same q, k, v. The results may be slices of one buffer. Raises
    ValueError for what does not fit q, k, v.
    """
    _check(q, k, v, cu_seqlens, window)
    expect("do", do, q.shape, q.dtype, q.device)
    expect("o", o, q.shape, q.dtype, q.device)
    expect("lse", lse, (q.shape[1], q.shape[0]), torch.float32, q.device)
    for name, result, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        if result is not None:
            expect(name, result, like.shape, q.dtype, q.device, written=True)
    return OP.pick(q).backward(do, q, k, v, o, lse, cu_seqlens, scale, causal, dq, dk, dv, window)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window}; a token sees at least itself: use 1 or more, or None for no window")
    expect_dims("q", q, "tokens", "heads", "head_dim")
    expect_dims("k", k, "tokens", "kv_heads", "head_dim")
    tokens, heads, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        expect(name, x, (tokens, k.shape[1], dim), q.dtype, q.device)
    if heads == 0 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {k.shape[1]} heads of k and v")
    expect_dims("cu_seqlens", cu_seqlens, "sequences + 1")
    expect("cu_seqlens", cu_seqlens, (max(1, cu_seqlens.numel()),), torch.int32, q.device)
    if can_read(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens={bounds} must start at 0, never fall and end at {tokens}, the tokens of q")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale, causal, window):  # type: ignore[no-untyped-def]
        o, lse = forward(q, k, v, cu_seqlens, scale, causal, window=window)
        save(ctx, q, k, v, o, lse, cu_seqlens, exact=(lse,))
        ctx.scale, ctx.causal, ctx.window = scale, causal, window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        grads = backward(do, q, k, v, o, lse, cu_seqlens, ctx.scale, ctx.causal, window=ctx.window)
        return (*grads, None, None, None, None)
