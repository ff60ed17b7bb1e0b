"""The low-rank products by csrc/low_rank/cpu.cpp, or in fp32 and at a rank where it is faster by the vendor's library.

A product with a factor of large rank is a dense product like any other, which the vendor's library blocks for all
levels of the cache. From what rank on it wins was measured on one core with AVX-512 (SmolLM2-135M's layers at 1600
tokens, 4096 x 4096 at 512 tokens), as time of the vendor's formulation over ours:
    merge      rank 8 to 64: 0.9 to 1.6; 128: 0.6 to 0.9; 256: 0.4 to 0.9
    add_       rank 8: 1.0 to 1.3; 16 to 64: 1.0 to 1.1 where inputs >= 2 outputs, else 0.85 to 1.05; 128: 0.5 to 1.0
    gradients  rank * (inputs + outputs) up to 131 072: 1.0 to 2.1; from 262 144 on, and from rank 64 on: 0.3 to 0.95
The rules below follow. bf16 and fp16 are widened block by block and always ours. There the outputs and the gradient of
a group's input are rounded after each product: twice a layer, where plain PyTorch rounds four times.
"""

from __future__ import annotations

import ctypes

import torch

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses, rows

__all__ = ["add_", "gradients_group", "input_gradient_group", "linear_group", "merge", "refuses"]


class _Adapter(ctypes.Structure):
    """lt_low_rank_adapter of leantune_kernels.h."""

    _fields_ = (
        *((name + part, ctypes.c_int64) for name in ("dy", "a", "b", "da", "db") for part in ("", "_stride")),
        ("outputs", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def merge(weight, A, B, scale, out):  # type: ignore[no-untyped-def]
    if A.shape[0] > 64:
        wide = weight if weight.dtype == torch.float32 else out.copy_(weight)
        torch.addmm(wide, B, A, alpha=scale, out=out)
        return
    weight, A, B = rows(weight), rows(A), rows(B)
    lib.low_rank_merge(
        DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), A.data_ptr(), A.stride(0),
        B.data_ptr(), B.stride(0), out.data_ptr(), out.stride(0), *weight.shape, A.shape[0], scale,
    )  # fmt: skip


def linear_group(x, source, layers, outs):  # type: ignore[no-untyped-def]
    """The vendor's product, then the update. S is not kept: the pass over x for the gradients forms it on its way."""
    for (weight, bias, A, B, scale), out in zip(layers, outs, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        add_(out, source, A.t(), B.t(), scale)


def input_gradient_group(dx, dys, layers):  # type: ignore[no-untyped-def]
    for i, ((weight, _, A, B, scale), dy) in enumerate(zip(layers, dys, strict=True)):
        if i == 0:
            torch.mm(dy, weight, out=dx)
        else:
            dx.addmm_(dy, weight)
        add_(dx, dy, B, A, scale)


def gradients_group(x, adapters, out, accumulate, S=None, dS=None):  # type: ignore[no-untyped-def]
    assert S is None and dS is None, "this implementation forms S and dS itself, a block of rows at a time"
    rank = max(a.A.shape[0] for a in adapters)
    if x.dtype == torch.float32 and (rank >= 64 or any(a.A.numel() + a.B.numel() > 200_000 for a in adapters)):
        _vendors_gradients(x, adapters, out, accumulate)
        return
    x = rows(x)
    inputs = [tuple(rows(t) for t in a[:3]) for a in adapters]  # kept alive during the call
    group = (_Adapter * len(adapters))()
    for entry, tensors, targets, adapter in zip(group, inputs, out, adapters, strict=True):
        values = [v for t in (*tensors, *targets) for v in ((0, 0) if t is None else (t.data_ptr(), t.stride(0)))]
        values += [tensors[0].shape[1], tensors[1].shape[0], adapter.scale]
        for field, value in zip(_Adapter._fields_, values, strict=True):
            setattr(entry, field[0], value)
    lib.low_rank_gradients(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *x.shape, ctypes.addressof(group), len(group),
        accumulate,
    )  # fmt: skip


def add_(y, x, P, Q, scale):  # type: ignore[no-untyped-def]
    (inputs, rank), outputs = P.shape, Q.shape[1]
    if x.dtype == torch.float32 and rank > (64 if inputs >= 2 * outputs else 16):
        torch.addmm(y, torch.mm(x, P), Q, alpha=scale, out=y)
        return
    x = rows(x)
    lib.low_rank_add(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), Q.data_ptr(), *Q.stride(),
        y.data_ptr(), y.stride(0), *x.shape, P.shape[1], Q.shape[1], scale,
    )  # fmt: skip


def _vendors_gradients(x, adapters, out, accumulate):  # type: ignore[no-untyped-def]
    for (dy, A, B, scale), (dA, dB) in zip(adapters, out, strict=True):
        if dA is not None:
            torch.addmm(dA, torch.mm(dy, B).t(), x, beta=int(accumulate), alpha=scale, out=dA)
        if dB is not None:
            torch.addmm(dB, dy.t(), torch.mm(x, A.t()), beta=int(accumulate), alpha=scale, out=dB)
