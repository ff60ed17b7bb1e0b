"""What the Triton and the CUDA implementation share: which products, in which order, and what is kept between them.

S = x A^T and dS = dy B of all layers of a group lie side by side in one buffer [T, sum of ranks], so that what reads x
reads it once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

MOST_CHUNKS = 32  # partial sums of a gradient


class Products(NamedTuple):
    """One implementation's kernels."""

    project: Callable[..., torch.Tensor]  # (x [T, K], P [K, R], out=None) -> x P, float32
    linear: Callable[..., None]  # (x, layer, S, out): out = x W^T + bias + scale * S B^T
    input_gradient: Callable[..., None]  # (dx, dys, layers, dS): dx = sum of dy W + scale * dS A
    partial_gradients: Callable[..., torch.Tensor]  # (C [T, R], x [T, K]) -> [chunks, R, K], whose sum is C^T x
    reduce_partials: Callable[..., None]  # (partials, scale, out, accumulate): out (+)= scale * sum


def chunk_rows(rows: int) -> int:
    """Rows that one set of partial sums covers."""
    return max(256, -(-rows // (64 * MOST_CHUNKS)) * 64)


def linear_group(products: Products, x, source, layers, outs):  # type: ignore[no-untyped-def]
    """Writes each layer's output; `source` is x, or x after dropout. Returns S of each layer."""
    factors = [layer.A for layer in layers]
    S = products.project(source, (torch.cat(factors) if len(factors) > 1 else factors[0]).t())
    projected = list(S.split([A.shape[0] for A in factors], dim=1))
    for layer, part, out in zip(layers, projected, outs, strict=True):
        products.linear(x, layer, part, out)
    return projected


def input_gradient_group(products: Products, dx, dys, layers):  # type: ignore[no-untyped-def]
    """dx = sum over the layers of dy W + scale * (dy B) A. Returns dS = dy B of each layer."""
    projected = _columns(dx.shape[0], [layer.A.shape[0] for layer in layers], dx.device)
    for layer, dy, part in zip(layers, dys, projected, strict=True):
        products.project(dy, layer.B, part)
    products.input_gradient(dx, dys, layers, projected)
    return projected


def gradients_group(products: Products, x, adapters, out, accumulate, S=None, dS=None):  # type: ignore[no-untyped-def]
    """Each gradient is written where `out` has a tensor for it; S and dS as the functions above returned them."""
    ranks = [adapter.A.shape[0] for adapter in adapters]
    for_A = [i for i, (dA, _) in enumerate(out) if dA is not None]
    for_B = [i for i, (_, dB) in enumerate(out) if dB is not None]
    if for_B and S is None:
        S = products.project(x, torch.cat([adapter.A for adapter in adapters]).t()).split(ranks, dim=1)
    for i in for_B:
        partials = products.partial_gradients(S[i], adapters[i].dy)
        products.reduce_partials(partials, adapters[i].scale, out[i][1].t(), accumulate)
    if not for_A:
        return
    if dS is None:
        dS = _columns(x.shape[0], ranks, x.device)
        for i in for_A:
            products.project(adapters[i].dy, adapters[i].B, dS[i])
    partials = products.partial_gradients(_side_by_side([dS[i] for i in for_A]), x)
    for i, part in zip(for_A, partials.split([ranks[i] for i in for_A], dim=1), strict=True):
        products.reduce_partials(part, adapters[i].scale, out[i][0], accumulate)


def _columns(rows: int, ranks: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    return list(torch.empty(rows, sum(ranks), device=device).split(list(ranks), dim=1))


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """The columns of all parts: the buffer that they are consecutive slices of, where they are, else a copy."""
    whole = parts[0]
    for part in parts[1:]:
        if part.data_ptr() != whole.data_ptr() + 4 * whole.shape[1] or part.stride(0) != whole.stride(0):
            return torch.cat(parts, 1)
        whole = whole.as_strided((whole.shape[0], whole.shape[1] + part.shape[1]), whole.stride())
    return whole
