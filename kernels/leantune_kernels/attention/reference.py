"""Packed attention in plain PyTorch by sequence: `plain` in its inputs' dtype, the rest fp32 inside."""

from __future__ import annotations

import itertools

import torch


def plain(q, k, v, cu_seqlens, scale=None, causal=True, window=None):  # type: ignore[no-untyped-def]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for a, b in _sequences(cu_seqlens):
        scores, _, value = _scores(q[a:b], k[a:b], v[a:b], scale, causal, window)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat([q[:0], *outputs])


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(q, k, v, cu_seqlens, scale, causal, out=None, window=None):  # type: ignore[no-untyped-def]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for a, b in _sequences(cu_seqlens):
        scores, _, value = _scores(q[a:b].float(), k[a:b].float(), v[a:b].float(), scale, causal, window)
        lse[:, a:b] = scores.logsumexp(-1)
        o[a:b] = (scores.softmax(-1) @ value).transpose(0, 1)
    return o, lse


def backward(  # type: ignore[no-untyped-def]
    do, q, k, v, o, lse, cu_seqlens, scale, causal, dq=None, dk=None, dv=None, window=None
):
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if y is None else y for x, y in ((q, dq), (k, dk), (v, dv))
    )
    group = q.shape[1] // k.shape[1]
    for a, b in _sequences(cu_seqlens):
        query, grad = q[a:b].float().transpose(0, 1), do[a:b].float().transpose(0, 1)
        scores, key, value = _scores(q[a:b].float(), k[a:b].float(), v[a:b].float(), scale, causal, window)
        p = (scores - lse[:, a:b, None]).exp()
        delta = (grad * o[a:b].float().transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (grad @ value.mT - delta) * scale
        dq[a:b] = (ds @ key).transpose(0, 1)
        dk[a:b] = (ds.mT @ query).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        dv[a:b] = (p.mT @ grad).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return dq, dk, dv


def forward_shapes(q, k, v, cu_seqlens, scale, causal, out=None, window=None):  # type: ignore[no-untyped-def]
    o = q.new_empty(q.shape) if out is None else out
    return o, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def backward_shapes(  # type: ignore[no-untyped-def]
    do, q, k, v, o, lse, cu_seqlens, scale, causal, dq=None, dk=None, dv=None, window=None
):
    return tuple(x.new_empty(x.shape) if y is None else y for x, y in ((q, dq), (k, dk), (v, dv)))


def _sequences(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def _scores(q, k, v, scale, causal, window):  # type: ignore[no-untyped-def]
    """Scores [Hq, S, S] of one sequence, with k and v as [Hq, S, D]."""
    group = q.shape[1] // k.shape[1]
    query, key, value = q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = query @ key.mT * scale
    if causal or window is not None:
        token = torch.arange(q.shape[0], device=q.device)
        before = token[:, None] - token  # of a query, by how much a key precedes it
        unseen = before < 0 if causal else torch.zeros_like(before, dtype=torch.bool)
        if window is not None:
            unseen = unseen | (before.abs() >= window)
        scores = scores.masked_fill(unseen, float("-inf"))
    return scores, key, value
